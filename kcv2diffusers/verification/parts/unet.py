"""The UNet."""

from __future__ import annotations

from typing import Any

import numpy as np

from kcv2diffusers.diffusion import PIXELS_PER_LATENT, timestep_embedding
from kcv2diffusers.verification.parts import Inputs
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.sides import Side
from kcv2diffusers.verification.torch_arrays import first

TIMESTEPS = (999, 500, 1)
LABELS = tuple(f"timestep {t}" for t in TIMESTEPS)
DRAWS = True
LOOSE = "gelu, epsilon"
_TOKENS = 77


def inputs(side: Side, size: int, rng: np.random.Generator) -> Inputs:
    """See `Adapter.inputs`."""
    dims, cells, count = side.source.dims, size // PIXELS_PER_LATENT, len(TIMESTEPS)
    return {
        "latent": rng.standard_normal((count, cells, cells, dims["latent"])),
        "context": rng.standard_normal((count, _TOKENS, dims["context"])),
        "timesteps": np.array(TIMESTEPS),
    }


def build(side: Side, request: Request) -> Any:
    """See `Adapter.build`."""
    from kcv2diffusers.models import build_unet
    from kcv2diffusers.models.base import unet_config

    return build_unet(unet_config(side.source, side.config, side.unet_gelu(request)))


def kerascv_model(cls: Any, side: Side, size: int) -> Any:
    """See `Adapter.kerascv_model`."""
    return cls(size, size, _TOKENS, download_weights=False)


def keras_inputs(side: Side, given: Inputs) -> Any:
    """See `Adapter.keras_inputs`."""
    embedding = timestep_embedding(given["timesteps"], side.source.dims["c0"])
    return [given["latent"], embedding, given["context"]]


def forward(model: Any, given: Inputs) -> Any:
    """See `Adapter.forward`."""
    import torch

    timesteps = torch.from_numpy(given["timesteps"])
    return model(first(given["latent"]), timesteps, first(given["context"])).sample


def kinds(side: Side, request: Request) -> list[str]:
    """See `Adapter.kinds`."""
    if side.unet_gelu(request) == "tanh":
        return ["stock", "epsilon", "gelu", "gelu, epsilon"]
    return ["stock", "epsilon"]
