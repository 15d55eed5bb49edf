"""What both sides are given: the same numbers, drawn by NumPy, whatever the frameworks."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np

from kcv2diffusers.diffusion import PIXELS_PER_LATENT, Array
from kcv2diffusers.verification.parts import Inputs, adapter
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.sides import Side

# Pixels of the pass in which blocks are compared, whose arrays are kept. It is also the least for parts:
# where a feature map shrinks to one pixel, norm groups of two channels blow up every rounding error.
BLOCK_SIZE = 128
_BATCH = 256  # the side in pixels of what a batch may have together


def module_inputs(sides: Mapping[str, Side], size: int) -> dict[str, Inputs]:
    """Inputs of each part that has a source and an adapter; channels last, float32 or int32, `size` in
    pixels, at least 128.
    """
    rng = np.random.default_rng(7)
    size = max(size, BLOCK_SIZE)
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
    """The first of a part's inputs; its upper left corner where that is larger than blocks need."""
    first = {name: values[:1] for name, values in given.items()}
    if crop:
        for name, limit in (("latent", BLOCK_SIZE // PIXELS_PER_LATENT), ("image", BLOCK_SIZE)):
            if name in first:
                first[name] = np.ascontiguousarray(first[name][:, :limit, :limit])
    return first


def batches(request: Request, size: int) -> list[list[tuple[int, str, int]]]:
    """The pictures to draw as (number, prompt, seed), in batches: small ones are drawn together."""
    runs = list(product(request.prompts, range(request.seeds)))
    count = 1 if request.reference == "keras-cv" else max(1, (_BATCH // size) ** 2)
    numbered = [(number, prompt, seed) for number, (prompt, seed) in enumerate(runs)]
    return [numbered[first : first + count] for first in range(0, len(numbered), count)]


def initial_noise(size: int, seed: int) -> Array:
    """Standard normal noise (1, size / 8, size / 8, 4) float32."""
    shape = (1, size // PIXELS_PER_LATENT, size // PIXELS_PER_LATENT, 4)
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")
