"""The inputs of each step, as a function of the seed and the step number.

A resumed run therefore sees the same inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import keras
import numpy as np

from kcv2diffusers.diffusion import LATENT_CHANNELS, LATENT_SCALE, TRAIN_STEPS, Array
from kcv2diffusers.dreambooth.photos import Photo, Size, bucket_of, read_photo

Encode = Callable[[Array], Array]
"""Images (n, height, width, 3) in -1..1 to moments (n, height / 8, width / 8, 8): mean, log variance."""


@dataclass
class Examples:
    """Photos that share one prompt.

    `encode` is the VAE encoder. With `cache` it encodes each photo once per size and may be None afterwards.
    `condition` is the conditioning of every image: the prompt's embeddings (length, width) float32, or its
    tokens (length,) int32 if the text encoder is trained.
    """

    photos: Sequence[Photo]
    condition: Array
    encode: Encode | None
    resolution: int
    flip: bool = False
    cache: bool = True
    _moments: dict[tuple[int, Size, bool], Array] = field(default_factory=dict)

    def moments(self, number: int, size: Size, rng: np.random.Generator) -> Array:
        """Moments of a photo. `rng` decides the horizontal flip and, without a cache, the crop."""
        flip, place = self.flip and bool(rng.random() < 0.5), tuple(rng.random(2))
        if not self.cache:
            return self._encoded(number, size, flip, (float(place[0]), float(place[1])))
        key = (number, size, flip)
        if key not in self._moments:
            self._moments[key] = self._encoded(number, size, flip, (0.5, 0.5))
        return self._moments[key]

    def fill(self, wanted: Sequence[tuple[int, Size]], progress: Callable[[int, int], None]) -> None:
        """Encode the photos in `wanted`, given by number and size, into the cache.

        This is done before training, while nothing else needs memory.
        """
        flips = (False, True) if self.flip else (False,)
        for done, (number, size) in enumerate(wanted, start=1):
            for flip in flips:
                self._moments[number, size, flip] = self._encoded(number, size, flip, (0.5, 0.5))
            progress(done, len(wanted))

    def _encoded(self, number: int, size: Size, flip: bool, place: tuple[float, float]) -> Array:
        picture = read_photo(self.photos[number], size, place=place, flip=flip)
        assert self.encode is not None, "everything was to be in the cache"
        return np.asarray(self.encode(picture[None])[0])


class Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """Steps `start` to `steps` of a run, for `fit`: one dictionary per step.

    It holds `latents` and `noise` (n, height / 8, width / 8, 4), `timesteps` (n,) int32, `condition` as in
    Examples and `prior` (n,) float32, 1 for a class image. All images of a step have one size. n is the batch
    size, or twice that with prior preservation. Each epoch contains every photo of the subject at least once,
    and as often as its folder name says.
    """

    def __init__(
        self,
        instance: Examples,
        classes: Examples | None,
        *,
        batch_size: int,
        steps: int,
        start: int = 0,
        seed: int = 0,
        offset_noise: float = 0.0,
        timesteps: int = TRAIN_STEPS,
    ) -> None:
        super().__init__()
        self.instance, self.classes, self.batch_size = instance, classes, batch_size
        self.steps, self.start, self.seed, self.offset_noise = steps, start, seed, offset_noise
        self.timesteps = timesteps
        self.by_size: dict[Size, list[int]] = {}
        for number, photo in enumerate(instance.photos):
            numbers = self.by_size.setdefault(bucket_of(photo.size, instance.resolution), [])
            numbers += [number] * photo.repeats
        self.epoch_length = sum(math.ceil(len(numbers) / batch_size) for numbers in self.by_size.values())

    def __len__(self) -> int:
        return self.steps - self.start

    def __getitem__(self, index: int) -> tuple[dict[str, Array]]:
        return (self.step(self.start + index),)

    def step(self, number: int) -> dict[str, Array]:
        """The inputs of step `number`, counted from 0."""
        epoch, position = divmod(number, self.epoch_length)
        size, chosen = self._epoch(epoch)[position]
        rng = np.random.default_rng((self.seed, 1, number))
        groups = [(self.instance, chosen)]
        if self.classes is not None:
            groups.append((self.classes, self._classes(number)))
        moments = [examples.moments(n, size, rng) for examples, numbers in groups for n in numbers]
        latents = np.stack([_draw(m, rng) for m in moments])
        noise = rng.standard_normal(latents.shape, dtype="float32")
        if self.offset_noise:
            noise += self.offset_noise * rng.standard_normal(
                (len(noise), 1, 1, LATENT_CHANNELS), dtype="float32"
            )
        return {
            "latents": latents,
            "noise": noise,
            "timesteps": rng.integers(0, self.timesteps, len(latents), dtype="int32"),
            "condition": np.stack([examples.condition for examples, numbers in groups for _ in numbers]),
            "prior": np.repeat(np.arange(len(groups), dtype="float32"), self.batch_size),
        }

    def _epoch(self, epoch: int) -> list[tuple[Size, list[int]]]:
        """The batches of an epoch in order.

        A bucket's last batch is filled up with repeated photos of that bucket.
        """
        rng = np.random.default_rng((self.seed, 2, epoch))
        batches = []
        for size, numbers in self.by_size.items():
            order = rng.permutation(numbers).tolist()
            order += rng.choice(numbers, -len(order) % self.batch_size).tolist()
            batches += [(size, order[i : i + self.batch_size]) for i in range(0, len(order), self.batch_size)]
        return [batches[i] for i in rng.permutation(len(batches))]

    def _classes(self, number: int) -> list[int]:
        """The class images of a step, by number. Each pass over all of them is in a new random order."""
        assert self.classes is not None
        count = len(self.classes.photos)
        places = range(number * self.batch_size, (number + 1) * self.batch_size)
        orders = {
            i // count: np.random.default_rng((self.seed, 3, i // count)).permutation(count) for i in places
        }
        return [int(orders[i // count][i % count]) for i in places]


def _draw(moments: Array, rng: np.random.Generator) -> Array:
    """Scaled latents sampled from the encoder's posterior: mean + standard deviation * noise."""
    mean, log_variance = moments[..., :LATENT_CHANNELS], moments[..., LATENT_CHANNELS:]
    deviation = np.exp(np.clip(log_variance, -30, 20) / 2)
    latents = mean + deviation * rng.standard_normal(mean.shape, dtype="float32")
    return np.asarray(latents * LATENT_SCALE, "float32")
