"""The MMDiT of Stable Diffusion 3."""

from __future__ import annotations

from typing import Any

import numpy as np

from kcv2diffusers.diffusion import PIXELS_PER_LATENT
from kcv2diffusers.verification.parts import Inputs
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.sides import Side
from kcv2diffusers.verification.torch_arrays import first

TIMESTEPS = (1000.0, 500.0, 1.0)  # sigma * 1000
LABELS = tuple(f"timestep {t:g}" for t in TIMESTEPS)
DRAWS = True
LOOSE = None
OUTPUTS = {"mm_di_t_block": (1, 0)}  # diffusers returns the context first
_TOKENS = 77


def inputs(side: Side, size: int, rng: np.random.Generator) -> Inputs:
    """See `Adapter.inputs`."""
    dims, cells, count = side.source.dims, size // PIXELS_PER_LATENT, len(TIMESTEPS)
    return {
        "latent": rng.standard_normal((count, cells, cells, dims["latent"])),
        "context": rng.standard_normal((count, 2 * _TOKENS, dims["context"])),
        "pooled": rng.standard_normal((count, dims["pooled"])),
        "timesteps": np.array(TIMESTEPS),
    }


def keras_hub(model: Any, part: Any, given: Inputs) -> Any:
    """See `Adapter.keras_hub`."""
    return part(
        {
            "latent": given["latent"],
            "context": given["context"],
            "pooled_projection": given["pooled"],
            "timestep": given["timesteps"][:, None],
        },
        training=False,
    )


def forward(model: Any, given: Inputs) -> Any:
    """See `Adapter.forward`."""
    return model(*(first(given[name]) for name in ("latent", "context", "pooled", "timesteps"))).sample


def kinds(side: Side, request: Request) -> list[str]:
    """See `Adapter.kinds`."""
    return ["stock"]
