"""The sizes of a Stable Diffusion model, including those that the shapes of a checkpoint do not show.

The number of attention heads, the number of norm groups and the kind of GELU cannot be inferred from weights;
`base` gets them from elsewhere. `SD1` and `SD2` are the released sizes.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Gelu = Literal["tanh", "exact"]


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """Config of the denoising UNet.

    `widths` are the channels at each resolution, finest first; the coarsest has no attention. `heads` is the
    number of attention heads at each resolution. `linear_projection` makes the projections around a
    transformer block Dense layers, as in SD2, instead of 1x1 convolutions. `gelu` is KerasCV's tanh
    approximation or the exact function that diffusers computes. Raises ValueError for widths that the heads
    or the norm groups do not divide.
    """

    widths: tuple[int, ...] = (320, 640, 1280, 1280)
    heads: tuple[int, ...] = (8, 8, 8, 8)
    context_width: int = 768
    linear_projection: bool = False
    blocks: int = 2
    norm_groups: int = 32
    gelu: Gelu = "tanh"

    def __post_init__(self) -> None:
        if len(self.heads) != len(self.widths):
            raise ValueError(f"{len(self.widths)} widths need as many heads, not {len(self.heads)}")
        for width, heads in zip(self.widths, self.heads, strict=True):
            if width % heads or width % self.norm_groups:
                raise ValueError(
                    f"width {width} does not divide into {heads} heads and {self.norm_groups} groups"
                )

    @property
    def timestep_width(self) -> int:
        """Length of the sinusoidal timestep embedding that the UNet takes as input."""
        return self.widths[0]


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """Config of CLIP's text transformer.

    `activation` is SD1's `x * sigmoid(1.702 x)` ("quick_gelu") or one of the two GELUs.
    """

    width: int = 768
    layers: int = 12
    heads: int = 12
    vocabulary: int = 49408
    max_length: int = 77
    activation: Literal["quick_gelu", "tanh", "exact"] = "quick_gelu"


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """Config of the autoencoder: `widths` are the channels at each resolution, finest first."""

    widths: tuple[int, ...] = (128, 256, 512, 512)
    norm_groups: int = 32


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """Config of a complete Stable Diffusion model. Defaults are SD1."""

    unet: UNetConfig = UNetConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    vae: VAEConfig = VAEConfig()


SD1 = ModelConfig()
SD2 = ModelConfig(
    unet=UNetConfig(heads=(5, 10, 20, 20), context_width=1024, linear_projection=True),
    text_encoder=TextEncoderConfig(width=1024, layers=23, heads=16, activation="tanh"),
)
