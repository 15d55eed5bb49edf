"""What both sides are given: the same numbers, drawn by NumPy, whatever the frameworks."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import product

import numpy as np

from kcv2diffusers.schedule import Array
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.sides import Side

TIMESTEPS = (999, 500, 1)
# Pixels of the pass in which blocks are compared, whose arrays are kept. It is also the least for parts:
# where a feature map shrinks to one pixel, norm groups of two channels blow up every rounding error.
BLOCK_SIZE = 128
_TEXTS = 2
_BATCH = 256  # the side in pixels of what a batch may have together
_PIXELS_PER_LATENT = 8

Inputs = dict[str, Array]


def module_inputs(sides: Mapping[str, Side], size: int) -> dict[str, Inputs]:
    """Inputs of each part that has a source; channels last, float32, `size` in pixels, at least 128.

    The text encoder: `tokens` (2, 77). The UNet: `latent` (3, size / 8, size / 8, 4), `context` (3, 77,
    width) and `timesteps` (3,). The VAE decoder: `latent` (1, ...), scaled. The VAE encoder: `image` (1,
    size, size, 3) in -1..1, coarse squares and noise.
    """
    rng = np.random.default_rng(7)
    size = max(size, BLOCK_SIZE)
    cells = size // _PIXELS_PER_LATENT
    inputs: dict[str, Inputs] = {}
    for part, side in sides.items():
        if not side.given:
            continue
        dims = side.source.dims
        if part == "text_encoder":
            inputs[part] = {"tokens": rng.integers(0, dims["vocabulary"], (_TEXTS, dims["length"]))}
        elif part == "unet":
            count = len(TIMESTEPS)
            inputs[part] = {
                "latent": rng.standard_normal((count, cells, cells, dims["latent"])),
                "context": rng.standard_normal((count, 77, dims["context"])),
                "timesteps": np.array(TIMESTEPS),
            }
        elif part == "vae_decoder":
            inputs[part] = {"latent": rng.standard_normal((1, cells, cells, dims["latent"]))}
        else:
            coarse = rng.uniform(-0.5, 0.5, (1, size // 16, size // 16, 3))
            squares = coarse.repeat(16, 1).repeat(16, 2)
            inputs[part] = {"image": squares + rng.uniform(-0.5, 0.5, squares.shape)}
    return {
        part: {k: v.astype("float32" if v.dtype.kind == "f" else "int32") for k, v in given.items()}
        for part, given in inputs.items()
    }


def block_inputs(given: Inputs, *, crop: bool) -> Inputs:
    """The first of a part's inputs; its upper left corner where that is larger than blocks need."""
    first = {name: values[:1] for name, values in given.items()}
    if crop:
        for name, limit in (("latent", BLOCK_SIZE // _PIXELS_PER_LATENT), ("image", BLOCK_SIZE)):
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
    shape = (1, size // _PIXELS_PER_LATENT, size // _PIXELS_PER_LATENT, 4)
    return np.random.default_rng(seed).standard_normal(shape).astype("float32")
