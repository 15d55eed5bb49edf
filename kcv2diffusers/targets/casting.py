"""Casts between the dtypes of weights (round to nearest even), and the check for finite values."""

from __future__ import annotations

from functools import cache
from typing import Literal

import numkong
import numpy as np


@cache
def _infinity(dtype: np.dtype) -> int:
    return int(np.array(np.inf, dtype).view(f"u{dtype.itemsize}"))


def is_finite(values: np.ndarray) -> bool:
    """Return whether all values of a float array are finite: none is NaN or infinite."""
    size = values.itemsize
    bits = values.view(f"u{size}")
    # Bit patterns are ordered like magnitudes, with NaN last. The maximum of the patterns as signed integers
    # is the largest positive value. The maximum as unsigned integers is the most negative value (or the
    # largest positive one, if none is negative). `np.isfinite` takes ten times as long for float16.
    positive, any_sign = int(bits.view(f"i{size}").max(initial=0)), int(bits.max(initial=0))
    return max(positive, any_sign & ~(1 << 8 * size - 1)) < _infinity(values.dtype)


_FAST: dict[np.dtype, Literal["float32", "float16"]] = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
}


def cast(values: np.ndarray, into: np.ndarray) -> None:
    """Copy `values` into the contiguous array `into`, cast to its dtype. Overflow gives infinity.

    Between float16 and float32, NumPy casts value by value and NumKong with SIMD. NumKong does not accept
    unaligned values. It is not used for other dtypes: it turns some bfloat16 NaN into zeros, and it rounds
    float64 twice.
    """
    if values.dtype == into.dtype:
        into[...] = values
    elif {values.dtype, into.dtype} == _FAST.keys() and values.flags.aligned:
        numkong.astype(values, _FAST[into.dtype], out=into)
    else:
        with np.errstate(all="ignore"):
            np.copyto(into, values, casting="unsafe")
