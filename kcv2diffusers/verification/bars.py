"""The default bars: the errors beyond which a pipeline is not what its checkpoints say.

Errors of parts and blocks are largest absolute difference / largest absolute value. What is measured at
full size stands in the README; float32 sums in another order give 1e-6 to 1e-5.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class Bars:
    """By part, `stock` of the pipeline as users run it, `attributed` with KerasCV's GELU and epsilon in the
    torch side, and `block` of a block given the same inputs. `psnr` is in decibels.

    The wrong GELU in a UNet is 5e-5 in a block of the tiny base and more in random weights.
    """

    stock: Mapping[str, float] = field(
        default_factory=lambda: {"text_encoder": 2e-5, "unet": 1e-3, "vae_decoder": 1e-4, "vae_encoder": 1e-4}
    )
    attributed: Mapping[str, float] = field(
        default_factory=lambda: {"text_encoder": 2e-5, "unet": 3e-5, "vae_decoder": 1e-4, "vae_encoder": 1e-4}
    )
    block: Mapping[str, float] = field(
        default_factory=lambda: {"text_encoder": 2e-5, "unet": 3e-5, "vae_decoder": 1e-4, "vae_encoder": 1e-4}
    )
    psnr: float = 40.0
    psnr_attributed: float = 55.0


BARS = Bars()
