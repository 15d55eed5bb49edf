"""Inputs of both sides: the same numbers, drawn by NumPy independently of the frameworks."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np

from kcv2diffusers.diffusion import PIXELS_PER_LATENT, Array
from kcv2diffusers.verification.parts import Inputs, adapter
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.sides import Side

# Image size in pixels for comparing blocks, whose arrays are all kept. It is also the minimum for parts: if a
# feature map shrinks to one pixel, norm groups of two channels amplify every rounding error.
BLOCK_SIZE = 128
_BATCH = 256  # side in pixels of the area that one batch may cover


def module_inputs(sides: Mapping[str, Side], size: int) -> dict[str, Inputs]:
    """Inputs of each part that has a source and an adapter.

    Arrays are channels-last, float32 or int32. `size` is in pixels.
    """
    rng = np.random.default_rng(7)
    drawn = {
        part: adapted.inputs(side, size, rng)
        for part, side in sides.items()
        if side.given and (adapted := adapter(part)) is not None
    }
    return {
        part: {k: v.astype("float32" if v.dtype.kind == "f" else "int32") for k, v in given.items()}
        for part, given in drawn.items()
    }


def block_inputs(given: Inputs, *, crop: bool) -> Inputs:
    """The first of a part's inputs; with `crop`, its upper left corner if it is larger than blocks need."""
    first = {name: values[:1] for name, values in given.items()}
    if crop:
        for name, limit in (("latent", BLOCK_SIZE // PIXELS_PER_LATENT), ("image", BLOCK_SIZE)):
            if name in first:
                first[name] = np.ascontiguousarray(first[name][:, :limit, :limit])
    return first


def batches(request: Request, size: int) -> list[list[tuple[int, str, int]]]:
    """The images to generate as (number, prompt, seed), in batches; small images share a batch."""
    runs = list(product(request.prompts, range(request.seeds)))
    count = 1 if request.reference == "keras-cv" else max(1, (_BATCH // size) ** 2)
    numbered = [(number, prompt, seed) for number, (prompt, seed) in enumerate(runs)]
    return [numbered[first : first + count] for first in range(0, len(numbered), count)]


def initial_noise(size: int, seed: int, channels: int) -> Array:
    """Standard normal noise (1, size / 8, size / 8, channels) float32."""
    shape = (1, size // PIXELS_PER_LATENT, size // PIXELS_PER_LATENT, channels)
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")
