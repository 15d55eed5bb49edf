"""Changing the dtype of weights, rounding to nearest even, and the largest magnitude among them."""

from __future__ import annotations

from typing import Literal

import numkong
import numpy as np

from kcv2diffusers.dtypes import DTYPES


def is_float(dtype: np.dtype) -> bool:
    """Whether it may hold values that are not finite."""
    return dtype.kind == "f" or dtype == DTYPES["bfloat16"]


def largest(values: np.ndarray) -> int:
    """The largest magnitude among floats as a bit pattern, which orders like the value: NaN and
    infinity are the largest. 0 for other dtypes.
    """
    if not is_float(values.dtype) or not values.size:
        return 0
    size = values.itemsize
    bits = values.view(f"u{size}")
    # As signed numbers the largest is the largest positive value, as unsigned ones the most negative value
    # (or, where there is none, again the largest positive).
    return max(int(bits.view(f"i{size}").max()), int(bits.max()) & ((1 << 8 * size - 1) - 1))


_FAST: dict[np.dtype, Literal["float32", "float16"]] = {
    np.dtype(np.float32): "float32",
    np.dtype(np.float16): "float16",
}


def cast(values: np.ndarray, into: np.ndarray) -> None:
    """Copy `values` to the dtype of `into`, which is contiguous. What overflows becomes infinite.

    NumPy casts from and to float16 value by value, NumKong in SIMD units. It takes no unaligned values. It is
    not used for others: it makes zeros of some bfloat16 NaN, and rounds float64 twice.
    """
    if {values.dtype, into.dtype} == _FAST.keys() and values.flags.aligned:
        numkong.astype(values, _FAST[into.dtype], out=into)
        return
    with np.errstate(all="ignore"):
        np.copyto(into, values, casting="unsafe")
