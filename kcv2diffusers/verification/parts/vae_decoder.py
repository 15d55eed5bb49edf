"""The VAE decoder: latents to images."""

from __future__ import annotations

from typing import Any

import numpy as np

from kcv2diffusers.diffusion import PIXELS_PER_LATENT
from kcv2diffusers.verification.parts import Inputs
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.sides import Side
from kcv2diffusers.verification.torch_arrays import first

LABELS = ()
DRAWS = True
LOOSE = None


def inputs(side: Side, size: int, rng: np.random.Generator) -> Inputs:
    """See `Adapter.inputs`."""
    cells = size // PIXELS_PER_LATENT
    return {"latent": rng.standard_normal((1, cells, cells, side.source.dims["latent"]))}


def build(side: Side, request: Request) -> Any:
    """See `Adapter.build`."""
    from kcv2diffusers.models import build_decoder
    from kcv2diffusers.models.base import vae_config

    return build_decoder(vae_config(side.source, side.config))


def kerascv_model(cls: Any, side: Side, size: int) -> Any:
    """See `Adapter.kerascv_model`."""
    return cls(size, size, download_weights=False)


def keras_inputs(side: Side, given: Inputs) -> Any:
    """See `Adapter.keras_inputs`."""
    return given["latent"]


def forward(model: Any, given: Inputs) -> Any:
    """See `Adapter.forward`."""
    return model.decode(first(given["latent"]) / model.config.scaling_factor).sample


def kinds(side: Side, request: Request) -> list[str]:
    """See `Adapter.kinds`."""
    return ["stock", "epsilon"]
