"""The sizes of a Stable Diffusion model: what a checkpoint's shapes tell, and what they do not.

Numbers of attention heads and of norm groups, and the kind of GELU, leave no trace in the weights; `base`
finds them elsewhere. `SD1` and `SD2` are the released sizes.
"""

from __future__ import annotations

import dataclasses
from typing import Literal

Gelu = Literal["tanh", "exact"]


@dataclasses.dataclass(frozen=True)
class UNetConfig:
    """The denoising network.

    `widths` are the channels of each resolution, finest first; the coarsest has no attention. `heads` gives
    each of them its number of attention heads. `linear_projection` makes the projections around a transformer
    block Dense layers, as SD2 has them, instead of 1x1 convolutions. `gelu` is KerasCV's tanh approximation
    or the exact function that diffusers computes.
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
        """Length of the sinusoidal timestep embedding the network takes."""
        return self.widths[0]


@dataclasses.dataclass(frozen=True)
class TextEncoderConfig:
    """CLIP's text transformer. `activation` is SD1's `x * sigmoid(1.702 x)` or one of the two GELUs."""

    width: int = 768
    layers: int = 12
    heads: int = 12
    vocabulary: int = 49408
    max_length: int = 77
    activation: Literal["quick_gelu", "tanh", "exact"] = "quick_gelu"


@dataclasses.dataclass(frozen=True)
class VAEConfig:
    """The autoencoder between pixels and latents: channels per resolution, finest first."""

    widths: tuple[int, ...] = (128, 256, 512, 512)
    norm_groups: int = 32


@dataclasses.dataclass(frozen=True)
class ModelConfig:
    """A whole Stable Diffusion model. Defaults are SD1."""

    unet: UNetConfig = UNetConfig()
    text_encoder: TextEncoderConfig = TextEncoderConfig()
    vae: VAEConfig = VAEConfig()


SD1 = ModelConfig()
SD2 = ModelConfig(
    unet=UNetConfig(heads=(5, 10, 20, 20), context_width=1024, linear_projection=True),
    text_encoder=TextEncoderConfig(width=1024, layers=23, heads=16, activation="tanh"),
)
