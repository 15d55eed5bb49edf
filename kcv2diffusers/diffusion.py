"""Constants and schedules of latent diffusion: latent sizes, the noise schedule that a UNet was trained with,
and the timesteps at which it is sampled. NumPy only.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np

from kcv2diffusers.errors import Error

Array = np.ndarray[Any, Any]

LATENT_CHANNELS = 4
LATENT_SCALE = 0.18215
"""Latents are the VAE's means multiplied by this factor, which gives them approximately unit variance."""
PIXELS_PER_LATENT = 8
TRAIN_STEPS = 1000
SPACINGS = ("leading", "linspace", "trailing")
_MOST_STEPS = 100_000


def _linear(start: float, end: float, count: int) -> Array:
    return np.linspace(start, end, count, dtype="float64")


def _scaled_linear(start: float, end: float, count: int) -> Array:
    return np.square(_linear(start**0.5, end**0.5, count))


def _cosine(start: float, end: float, count: int) -> Array:
    """Nichol and Dhariwal 2021, arXiv:2102.09672, as implemented in diffusers. Ignores start and end."""
    left = np.square(np.cos((np.arange(count + 1) / count + 0.008) / 1.008 * math.pi / 2))
    return np.minimum(1 - left[1:] / left[:-1], 0.999)


BETAS: Mapping[str, Callable[[float, float, int], Array]] = {
    "linear": _linear,
    "scaled_linear": _scaled_linear,
    "squaredcos_cap_v2": _cosine,
}


@dataclass(frozen=True)
class Schedule:
    """A noise schedule. The fields have the names of the entries of diffusers' scheduler configs.

    The defaults are those of Stable Diffusion and KerasCV. `timestep_spacing` and `steps_offset` do not
    change the noise; they only select the timesteps at which diffusers samples. Raises ValueError for invalid
    values.
    """

    beta_start: float = 0.00085
    beta_end: float = 0.012
    beta_schedule: str = "scaled_linear"
    trained_betas: tuple[float, ...] | None = None
    num_train_timesteps: int = TRAIN_STEPS
    rescale_betas_zero_snr: bool = False
    timestep_spacing: str = "leading"
    steps_offset: int = 1

    def __post_init__(self) -> None:
        count, betas = self.num_train_timesteps, self.trained_betas
        given = (self.beta_start, self.beta_end) if betas is None else betas
        for name, right in (
            ("num_train_timesteps", type(count) is int and 2 <= count <= _MOST_STEPS),
            ("trained_betas", betas is None or (isinstance(betas, tuple) and len(betas) == count)),
            ("beta_schedule", isinstance(self.beta_schedule, str) and self.beta_schedule in BETAS),
            ("timestep_spacing", self.timestep_spacing in SPACINGS),
            ("steps_offset", type(self.steps_offset) is int and 0 <= self.steps_offset < _MOST_STEPS),
            ("rescale_betas_zero_snr", isinstance(self.rescale_betas_zero_snr, bool)),
        ):
            if not right:
                raise ValueError(f"{name} {str(getattr(self, name))[:40]!r}")
        if not all(type(beta) in (int, float) and 0 < beta < 1 for beta in given):
            raise ValueError("betas that are not between 0 and 1")

    @property
    def alphas_cumprod(self) -> Array:
        """Share of the image's variance that remains at each timestep, descending.

        Shape (num_train_timesteps,), float32.
        The last value is 0 if `rescale_betas_zero_snr` is set (Lin et al. 2023, arXiv:2305.08891).
        """
        if self.trained_betas is None:
            betas = BETAS[self.beta_schedule](self.beta_start, self.beta_end, self.num_train_timesteps)
        else:
            betas = np.array(self.trained_betas, dtype="float64")
        signal = np.cumprod(1 - betas)
        if self.rescale_betas_zero_snr:
            root = np.sqrt(signal)
            signal = ((root - root[-1]) * root[0] / (root[0] - root[-1])) ** 2
        return signal.astype("float32")

    def timesteps(self, steps: int) -> Array:
        """Return the timesteps of a sampling run of `steps` steps: (steps,) int64, ascending.

        They are KerasCV's timesteps, evenly spaced from the first to the last and rounded as in KerasCV. For
        the spacing "trailing", with which few-step models are trained, they are those of diffusers. Raises
        Error if `steps` is less than 1.
        """
        count = self.num_train_timesteps
        if steps < 1:
            raise Error(f"{steps} steps: a picture needs at least 1.\nGive more --steps.")
        if self.timestep_spacing == "trailing":
            return np.arange(count, 0, -count / steps).round().astype("int64")[steps - 1 :: -1] - 1
        ratio = (count - 1) / (steps - 1) if steps > 1 else count
        return (np.arange(steps) * ratio).round().astype("int64")

    def check(self, prediction_type: str) -> None:
        """Raise Error for a UNet that cannot be sampled.

        At zero SNR the input is pure noise, and the predicted noise (epsilon) says nothing about the image.
        """
        if self.rescale_betas_zero_snr and prediction_type == "epsilon":
            raise Error(
                "The base predicts noise (epsilon), and its noise schedule (rescale_betas_zero_snr) ends in "
                "noise alone, of which nothing can be predicted.\n"
                "Correct the base's scheduler_config.json: such models predict v (v_prediction)."
            )


SD = Schedule()
"""The noise schedule of Stable Diffusion."""


def alphas_cumprod() -> Array:
    """Return `Schedule.alphas_cumprod` of Stable Diffusion: 1000 values from 0.9991 down to 0.0047."""
    return SD.alphas_cumprod


def min_snr_weights(signal: Array, gamma: float, prediction_type: str) -> Array:
    """Return the min-SNR loss weight of each timestep (Hang et al. 2023, arXiv:2303.09556).

    `signal` are the `alphas_cumprod`. The result is float32 of the same shape. A `gamma` of 0 gives ones.
    """
    if not gamma:
        return np.ones_like(signal)
    ratio = signal.astype("float64") / (1 - signal.astype("float64"))
    weights = np.minimum(ratio, gamma) / (ratio + 1 if prediction_type == "v_prediction" else ratio)
    return np.asarray(weights, "float32")


def sampling_timesteps(steps: int) -> Array:
    """Return `Schedule.timesteps` of Stable Diffusion, from 0 to 999, as in KerasCV."""
    return SD.timesteps(steps)


def timestep_embedding(timesteps: Array, width: int) -> Array:
    """Return sinusoidal embeddings of (batch,) timesteps, cosines first: (batch, width) float32."""
    half = width // 2
    frequencies = np.exp(-math.log(10000) * np.arange(half, dtype="float32") / half)
    angles = np.asarray(timesteps, dtype="float32")[:, None] * frequencies
    return np.concatenate([np.cos(angles), np.sin(angles)], axis=1)
