"""Error metrics between two arrays."""

from __future__ import annotations

import math

import numpy as np

from kcv2diffusers.diffusion import Array


def relative_error(got: Array, expected: Array) -> tuple[float, float]:
    """The largest absolute difference, and its ratio to the largest absolute value of `expected`.

    Both are infinite if sizes differ or a value is not finite.
    """
    if got.size != expected.size or not (np.isfinite(got).all() and np.isfinite(expected).all()):
        return math.inf, math.inf
    apart = float(np.abs(got.reshape(expected.shape).astype(np.float64) - expected).max(initial=0.0))
    scale = float(np.abs(expected).max(initial=0.0))
    return apart, apart / scale if scale else (math.inf if apart else 0.0)
