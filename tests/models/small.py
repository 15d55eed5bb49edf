"""Our configurations of the small models that `stack.build` makes of KerasCV's blocks."""

from __future__ import annotations

from typing import Any

import keras
import numpy as np

from kcv2diffusers.models import TextEncoderConfig, UNetConfig, VAEConfig

UNET1 = UNetConfig(widths=(32, 64, 64, 64), heads=(2, 2, 2, 2), context_width=48)
UNET2 = UNetConfig(widths=(32, 64, 64, 64), heads=(2, 2, 2, 2), context_width=48, linear_projection=True)
TEXT1 = TextEncoderConfig(width=48, layers=3, heads=2, vocabulary=300)
TEXT2 = TextEncoderConfig(width=48, layers=3, heads=2, vocabulary=300, activation="exact")  # as in `stack`
VAE = VAEConfig(widths=(32, 64, 96, 96))


def relative_error(got: Any, expected: Any) -> float:
    """Largest absolute difference over the largest absolute value."""
    got, expected = (np.asarray(keras.ops.convert_to_numpy(x), dtype="float64") for x in (got, expected))
    return float(np.abs(got - expected).max() / np.abs(expected).max())
