"""The VAE encoder: images to latents."""

from __future__ import annotations

from typing import Any

import numpy as np

from kcv2diffusers.verification.parts import Inputs
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.sides import Side
from kcv2diffusers.verification.torch_arrays import first

LABELS = ()
DRAWS = False
LOOSE = None
_SQUARE = 16  # pixels


def inputs(side: Side, size: int, rng: np.random.Generator) -> Inputs:
    """An image in -1..1 of coarse squares plus noise; see `Adapter.inputs`."""
    coarse = rng.uniform(-0.5, 0.5, (1, size // _SQUARE, size // _SQUARE, 3))
    squares = coarse.repeat(_SQUARE, 1).repeat(_SQUARE, 2)
    return {"image": squares + rng.uniform(-0.5, 0.5, squares.shape)}


def build(side: Side, request: Request) -> Any:
    """See `Adapter.build`."""
    from kcv2diffusers.models import build_image_encoder
    from kcv2diffusers.models.base import vae_config

    return build_image_encoder(vae_config(side.source, side.config))


def kerascv_model(cls: Any, side: Side, size: int) -> Any:
    """See `Adapter.kerascv_model`."""
    return cls(download_weights=False)


def keras_inputs(side: Side, given: Inputs) -> Any:
    """See `Adapter.keras_inputs`."""
    return given["image"]


def forward(model: Any, given: Inputs) -> Any:
    """See `Adapter.forward`."""
    return model.encode(first(given["image"])).latent_dist.mean * model.config.scaling_factor


def kinds(side: Side, request: Request) -> list[str]:
    """See `Adapter.kinds`."""
    return ["stock", "epsilon"]
