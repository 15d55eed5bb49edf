"""Changing the dtype of weights, rounding to nearest even, and whether they are finite."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numkong
import numpy as np


@cache
def _infinity(dtype: np.dtype) -> int:
    return int(np.array(np.inf, dtype).view(f"u{dtype.itemsize}"))


def is_finite(values: np.ndarray) -> bool:
    """Whether all of these floats are: none is NaN or infinite."""
    size = values.itemsize
    bits = values.view(f"u{size}")
    # Bit patterns order like magnitudes, NaN last. As signed numbers the largest is the largest positive
    # value, as unsigned ones the most negative value (or, where there is none, again the largest positive).
    # `np.isfinite` takes ten times as long for float16.
    positive, any_sign = int(bits.view(f"i{size}").max(initial=0)), int(bits.max(initial=0))
    return max(positive, any_sign & ~(1 << 8 * size - 1)) < _infinity(values.dtype)


_FAST: dict[np.dtype, Literal["float32", "float16"]] = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
}


def cast(values: np.ndarray, into: np.ndarray) -> None:
    """Copy `values` to the dtype of `into`, which is contiguous. What overflows becomes infinite.

    NumPy casts from and to float16 value by value, NumKong in SIMD units. It takes no unaligned values. It is
    not used for others: it makes zeros of some bfloat16 NaN, and rounds float64 twice.
    """
    if values.dtype == into.dtype:
        into[...] = values
    elif {values.dtype, into.dtype} == _FAST.keys() and values.flags.aligned:
        numkong.astype(values, _FAST[into.dtype], out=into)
    else:
        with np.errstate(all="ignore"):
            np.copyto(into, values, casting="unsafe")
