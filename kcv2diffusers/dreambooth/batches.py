"""The inputs of each step, as a function of the seed and the step number.

A resumed run therefore sees the same inputs.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

import keras
import numpy as np

from kcv2diffusers.diffusion import LATENT_CHANNELS, LATENT_SCALE, PIXELS_PER_LATENT, TRAIN_STEPS, Array
from kcv2diffusers.dreambooth.photos import Photo, Size, bucket_of, read_mask, read_photo
from kcv2diffusers.dreambooth.ranks import ALONE, Group

Batch = dict[str, Array]
"""Inputs of a step, by name."""
Encode = Callable[[Array], Array]
"""Images (n, height, width, 3) in -1..1 to moments (n, height / 8, width / 8, 8): mean, log variance."""
View = tuple[bool, tuple[float, float]]
"""Whether an image is flipped, and the position of its crop, 0..1 down and across."""
_MIDDLE = (0.5, 0.5)
SIZED = ("latents", "noise", "mask")
"""The inputs of a step whose shape depends on the size of its images."""


@dataclass
class Examples:
    """Photos with their prompts.

    `encode` is the VAE encoder. With `cache` it encodes each photo once per size and may be None afterwards.
    `conditions` has the conditioning of each prompt: its embeddings (length, width) float32, or its tokens
    (length,) int32 if the text encoder is trained. `masked` says whether the photos have masks.
    """

    photos: Sequence[Photo]
    conditions: Mapping[str, Array]
    encode: Encode | None
    resolution: int
    flip: bool = False
    cache: bool = True
    masked: bool = False
    _moments: dict[tuple[int, Size, bool], Array] = field(default_factory=dict)
    _masks: dict[tuple[int, Size, bool], Array] = field(default_factory=dict)

    def view(self, rng: np.random.Generator) -> View:
        """How to show a photo. `rng` decides the horizontal flip and, without a cache, the crop."""
        flip, (down, across) = self.flip and bool(rng.random() < 0.5), rng.random(2)
        return flip, _MIDDLE if self.cache else (float(down), float(across))

    def moments(self, number: int, size: Size, view: View) -> Array:
        """Moments of a photo."""
        if not self.cache:
            return self._encoded(number, size, *view)
        key = (number, size, view[0])
        if key not in self._moments:
            self._moments[key] = self._encoded(number, size, *view)
        return self._moments[key]

    def mask(self, number: int, size: Size, view: View) -> Array:
        """The weight of each latent of a photo in the loss: (height / 8, width / 8, 1) float32 of mean 1.

        It is 0 everywhere if the mask leaves nothing of the crop.
        """
        if not self.masked:
            return np.ones((size[0] // PIXELS_PER_LATENT, size[1] // PIXELS_PER_LATENT, 1), "float32")
        key = (number, size, view[0])
        if not self.cache or key not in self._masks:
            mask = read_mask(self.photos[number], size, place=view[1], flip=view[0])
            self._masks[key] = mask / (mask.mean() or 1)
        return self._masks[key]

    def fill(self, wanted: Sequence[tuple[int, Size]], progress: Callable[[int, int], None]) -> None:
        """Encode the photos in `wanted`, given by number and size, into the cache.

        This is done before training, while nothing else needs memory.
        """
        flips = (False, True) if self.flip else (False,)
        for done, (number, size) in enumerate(wanted, start=1):
            for flip in flips:
                self.moments(number, size, (flip, _MIDDLE))
                self.mask(number, size, (flip, _MIDDLE))
            progress(done, len(wanted))

    def exchange(self, wanted: Sequence[tuple[int, Size]], group: Group) -> None:
        """Complete the cache with what the other processes of `group` encoded, each its share of `wanted`."""
        if group.count == 1:
            return
        for number, (height, width) in wanted:
            shape = (height // PIXELS_PER_LATENT, width // PIXELS_PER_LATENT, 2 * LATENT_CHANNELS)
            for flip in (False, True) if self.flip else (False,):
                key = (number, (height, width), flip)
                own = self._moments.get(key)
                self._moments[key] = group.sum(np.zeros(shape, "float32") if own is None else own)
                self.mask(number, (height, width), (flip, _MIDDLE))

    def _encoded(self, number: int, size: Size, flip: bool, place: tuple[float, float]) -> Array:
        picture = read_photo(self.photos[number], size, place=place, flip=flip)
        assert self.encode is not None, "everything was to be in the cache"
        return np.asarray(self.encode(picture[None])[0])


class Batches(keras.utils.PyDataset):  # type: ignore[misc]
    """Steps `start` to `steps` of a run, for `fit`: one dictionary per step.

    It holds `latents` and `noise` (n, height / 8, width / 8, 4), `timesteps` (n,) int32, `condition` as in
    Examples and `prior` (n,) float32, 1 for a class image. All images of a step have one size. n is the batch
    size, or twice that with prior preservation. If the photos have masks there is `mask` (n, height / 8,
    width / 8, 1) too. A share `caption_dropout` of all images has the empty prompt in place of its own. Each
    epoch contains every photo of the subject at least once, and as often as its folder name says. If `group`
    has several processes, each gets its share of a step's images.
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
        caption_dropout: float = 0.0,
        timesteps: int = TRAIN_STEPS,
        group: Group = ALONE,
    ) -> None:
        super().__init__()
        self.instance, self.classes, self.batch_size = instance, classes, batch_size
        self.steps, self.start, self.seed, self.offset_noise = steps, start, seed, offset_noise
        self.timesteps, self.caption_dropout, self.group = timesteps, caption_dropout, group
        self.by_size: dict[Size, list[int]] = {}
        for number, photo in enumerate(instance.photos):
            numbers = self.by_size.setdefault(bucket_of(photo.size, instance.resolution), [])
            numbers += [number] * photo.repeats
        self.epoch_length = sum(math.ceil(len(numbers) / batch_size) for numbers in self.by_size.values())

    def __len__(self) -> int:
        return self.steps - self.start

    def __getitem__(self, index: int) -> tuple[dict[str, Array]]:
        return (self.group.part(self.step(self.start + index)),)

    def step(self, number: int) -> Batch:
        """The inputs of step `number`, counted from 0, for all processes together."""
        epoch, position = divmod(number, self.epoch_length)
        size, chosen = self._epoch(epoch)[position]
        rng = np.random.default_rng((self.seed, 1, number))
        groups = [(self.instance, chosen)]
        if self.classes is not None:
            groups.append((self.classes, self._classes(number)))
        shown = [(examples, n, examples.view(rng)) for examples, numbers in groups for n in numbers]
        moments = [examples.moments(n, size, view) for examples, n, view in shown]
        latents = np.stack([drawn(m, rng) for m in moments])
        noise = rng.standard_normal(latents.shape, dtype="float32")
        if self.offset_noise:
            noise += self.offset_noise * rng.standard_normal(
                (len(noise), 1, 1, LATENT_CHANNELS), dtype="float32"
            )
        step = {
            "latents": latents,
            "noise": noise,
            "timesteps": rng.integers(0, self.timesteps, len(latents), dtype="int32"),
            "condition": np.stack(
                [
                    examples.conditions["" if drop else examples.photos[n].prompt]
                    for (examples, n, _), drop in zip(shown, self._dropped(number, len(shown)), strict=True)
                ]
            ),
            "prior": np.repeat(np.arange(len(groups), dtype="float32"), self.batch_size),
        }
        if self.instance.masked:
            step["mask"] = np.stack([examples.mask(n, size, view) for examples, n, view in shown])
        return step

    def _dropped(self, number: int, count: int) -> Array:
        """Which of the `count` images of a step have the empty prompt: (count,) bool."""
        return np.random.default_rng((self.seed, 4, number)).random(count) < self.caption_dropout

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


def drawn(moments: Array, rng: np.random.Generator) -> Array:
    """Scaled latents sampled from the encoder's posterior: mean + standard deviation * noise."""
    mean, log_variance = moments[..., :LATENT_CHANNELS], moments[..., LATENT_CHANNELS:]
    deviation = np.exp(np.clip(log_variance, -30, 20) / 2)
    latents = mean + deviation * rng.standard_normal(mean.shape, dtype="float32")
    return np.asarray(latents * LATENT_SCALE, "float32")
