"""The noise schedule of Stable Diffusion and the timesteps at which KerasCV 0.9.0 samples (NumPy only)."""

from __future__ import annotations

import math
from typing import Any

import numpy as np

from kcv2diffusers.errors import Error

Array = np.ndarray[Any, Any]

TRAIN_STEPS = 1000


def alphas_cumprod() -> Array:
    """How much of a picture's variance is left at each of the 1000 timesteps, float32, from 0.9991 down to
    0.0047.
    """
    betas = np.linspace(0.00085**0.5, 0.012**0.5, TRAIN_STEPS, dtype="float64") ** 2
    return np.cumprod(1 - betas).astype("float32")


def sampling_timesteps(steps: int) -> Array:
    """The timesteps of a run of `steps` steps, ascending, from 0 to 999, as KerasCV rounds them."""
    if steps < 1:
        raise Error(f"{steps} steps: at least 1 is needed")
    ratio = (TRAIN_STEPS - 1) / (steps - 1) if steps > 1 else TRAIN_STEPS
    return (np.arange(steps) * ratio).round().astype("int64")


def timestep_embedding(timesteps: Array, width: int) -> Array:
    """Sinusoids of (batch,) timesteps, cosines first: (batch, width) float32."""
    half = width // 2
    frequencies = np.exp(-math.log(10000) * np.arange(half, dtype="float32") / half)
    angles = np.asarray(timesteps, dtype="float32")[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
