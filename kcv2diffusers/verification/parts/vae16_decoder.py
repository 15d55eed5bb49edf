"""The decoder of Stable Diffusion 3's VAE: latents to images."""

from __future__ import annotations

from typing import Any

from kcv2diffusers.verification.parts import Inputs
from kcv2diffusers.verification.parts.vae_decoder import DRAWS, LABELS, LOOSE, inputs
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.sides import Side
from kcv2diffusers.verification.torch_arrays import first

__all__ = ["DRAWS", "LABELS", "LOOSE", "forward", "inputs", "keras_hub", "kinds"]


def keras_hub(model: Any, part: Any, given: Inputs) -> Any:
    """See `Adapter.keras_hub`."""
    return model.decode_step(given["latent"])


def forward(model: Any, given: Inputs) -> Any:
    """See `Adapter.forward`."""
    latent = first(given["latent"]) / model.config.scaling_factor + model.config.shift_factor
    return model.decode(latent).sample


def kinds(side: Side, request: Request) -> list[str]:
    """See `Adapter.kinds`."""
    return ["stock"]
