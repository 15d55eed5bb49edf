"""The encoder of Stable Diffusion 3's VAE: images to the means of latents."""

from __future__ import annotations

from typing import Any

from kcv2diffusers.verification.parts import Inputs
from kcv2diffusers.verification.parts.vae_encoder import DRAWS, LABELS, LOOSE, inputs
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.sides import Side
from kcv2diffusers.verification.torch_arrays import first

__all__ = ["DRAWS", "LABELS", "LOOSE", "forward", "inputs", "keras_hub", "kinds"]


def keras_hub(model: Any, part: Any, given: Inputs) -> Any:
    """See `Adapter.keras_hub`."""
    import keras

    mean, _ = keras.ops.split(part(given["image"], training=False), 2, axis=-1)
    return model.image_rescaling(mean)


def forward(model: Any, given: Inputs) -> Any:
    """See `Adapter.forward`."""
    mean = model.encode(first(given["image"])).latent_dist.mean
    return (mean - model.config.shift_factor) * model.config.scaling_factor


def kinds(side: Side, request: Request) -> list[str]:
    """See `Adapter.kinds`."""
    return ["stock"]
