"""The loss on held-out photos, from the same noise at the same timesteps each time."""

from __future__ import annotations

import csv
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kcv2diffusers.dreambooth.batches import Batch, Examples, drawn
from kcv2diffusers.dreambooth.model import DreamBooth
from kcv2diffusers.dreambooth.photos import Size, bucket_of
from kcv2diffusers.errors import Error
from kcv2diffusers.models.layers import Tensor
from kcv2diffusers.system.output import whole_file

LOG = "validation.csv"
TIMESTEPS = 8  # of each photo, in the middles of that many equal parts of the noise schedule
_PLAIN = (False, (0.5, 0.5))  # not flipped, cropped in the middle


class Validation:
    """The validation losses of a run, which are kept in `folder`.

    Each photo of `examples` is noised at `TIMESTEPS` of the `timesteps` of the noise schedule, by noise from
    `seed`. `batch_size` images are evaluated at a time. Rows of the log after step `start` are dropped.
    Raises Error for a damaged log.
    """

    def __init__(
        self, examples: Examples, folder: Path, *, batch_size: int, timesteps: int, seed: int, start: int = 0
    ) -> None:
        self.path = folder / LOG
        self.rows = [row for row in _read(self.path) if row[0] <= start]
        self.batches = list(_batches(examples, batch_size, timesteps, seed))
        self._model: Any = None

    def loss(self, model: DreamBooth) -> float:
        """The mean loss of all photos and timesteps, weighted as in training."""
        if self._model is None:
            self._model = Errors(model)
        errors = [np.asarray(self._model.predict_on_batch(batch))[:count] for batch, count in self.batches]
        return float(np.concatenate(errors).mean(dtype="float64"))

    def add(self, step: int, loss: float) -> None:
        """Add the loss after `step` steps to the log."""
        self.rows.append((step, loss))
        with whole_file(self.path) as part, part.open("w", newline="", encoding="utf-8") as file:
            csv.writer(file).writerows([("step", "loss"), *self.rows])

    def text(self) -> str:
        """The first, the lowest and the last loss, in a sentence."""
        first, lowest, last = self.rows[0], min(self.rows, key=lambda row: row[1]), self.rows[-1]
        shown = {row[0]: f"{row[1]:.4f} at step {row[0]}" for row in (first, lowest, last)}
        return f"Validation loss: {', '.join(shown.values())}; the lowest is that of step {lowest[0]}."


class Errors(keras.Model):  # type: ignore[misc]
    """The loss of each image of a batch, as a Keras model so that each backend compiles it."""

    def __init__(self, model: DreamBooth) -> None:
        super().__init__(name="errors", autocast=False)
        self.model = model
        self.built = True

    def call(self, inputs: dict[str, Tensor]) -> Tensor:
        return self.model.errors(inputs, self.model(inputs))


def _batches(examples: Examples, size: int, timesteps: int, seed: int) -> Iterator[tuple[Batch, int]]:
    """The batches and how many of their images count; the others fill them up to one size."""
    by_size: dict[Size, list[dict[str, Any]]] = {}
    for number, photo in enumerate(examples.photos):
        bucket = bucket_of(photo.size, examples.resolution)
        moments = examples.moments(number, bucket, _PLAIN)
        rng = np.random.default_rng((seed, 5, number))
        for part in range(TIMESTEPS):
            latents = drawn(moments, rng)
            image: dict[str, Any] = {
                "latents": latents,
                "noise": rng.standard_normal(latents.shape, dtype="float32"),
                "timesteps": np.int32((part + 0.5) / TIMESTEPS * timesteps),
                "condition": examples.conditions[photo.prompt],
                "prior": np.float32(0),
            }
            if examples.masked:
                image["mask"] = examples.mask(number, bucket, _PLAIN)
            by_size.setdefault(bucket, []).append(image)
    for images in by_size.values():
        for first in range(0, len(images), size):
            some = images[first : first + size]
            filled = [*some, *[some[0]] * (size - len(some))]
            yield {name: np.stack([image[name] for image in filled]) for name in some[0]}, len(some)


def _read(path: Path) -> list[tuple[int, float]]:
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [(int(row[0]), float(row[1])) for row in list(csv.reader(file))[1:]]
    except (ValueError, IndexError, csv.Error) as error:
        raise Error(
            f"{path}: is not the log of the validation, or damaged.\n"
            "Move it away to go on without the losses so far, or put the right one there."
        ) from error
