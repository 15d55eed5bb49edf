"""Changing the dtype of weights, rounding to nearest even, and the largest magnitude among them."""

from __future__ import annotations

import ml_dtypes
import numpy as np

_PIECE = 1 << 16  # values at a time: the intermediate results stay in the L2 cache
# Arrays, which NumPy's operations take faster than numbers.
_EXPONENT = np.array(0x7F800000, np.uint32)  # of a float32
_MAGNITUDE = np.array(0x7FFFFFFF, np.uint32)  # all of it but the sign
_SMALLEST = np.full(_PIECE, 2**-14, np.float32).view(np.uint32)  # the smallest normal float16
_MIDDLE = np.array((13 << 23) + (1 << 22) - (127 - 15 + 1 << 10), np.uint32)  # see `_halve`
_SIGN = np.array(0x8000, np.uint32)  # of a float16
_TO_EXPONENT, _TO_SIGN = np.array(13, np.uint32), np.array(16, np.uint32)  # bits to shift by
_OVERFLOW = 0x47000000  # the exponent of 2**15: what may round to infinity
_RESULTS = [np.empty(_PIECE, np.uint32) for _ in range(3)]  # kept: fresh memory costs a page fault every
# 4 KB. So one thread at a time; conversions run in processes.


def is_float(dtype: np.dtype) -> bool:
    """Whether it may hold values that are not finite."""
    return dtype.kind == "f" or dtype == ml_dtypes.bfloat16


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


def cast(values: np.ndarray, into: np.ndarray) -> int:
    """Copy `values` to the dtype of `into`, both contiguous. What overflows becomes infinite.

    Returns their `largest`, which is known on the way.
    """
    if values.dtype == np.float32 and into.dtype == np.float16:
        return _halve(values.reshape(-1), into.reshape(-1))
    with np.errstate(all="ignore"):
        np.copyto(into, values, casting="unsafe")
    return largest(values)


def _halve(values: np.ndarray, into: np.ndarray) -> int:
    """float32 to float16 in whole-array operations, which SIMD units do; NumPy casts value by value.

    A half of exponent e is a multiple of 2**(e - 10), and so are the floats around 1.5 * 2**(e + 13):
    adding that to a magnitude rounds it, to even, and leaves the multiple in the low bits. e is at least
    -14, below which halves are subnormal. The half's own bits are the multiple, with 1024 of it and e in the
    exponent: the difference is added beforehand, in the low bits of 1.5 * 2**(e + 13). The sign comes last.
    """
    found = 0
    for start in range(0, values.size, _PIECE):
        piece, target = values[start : start + _PIECE], into[start : start + _PIECE]
        magnitude, wide, other = (result[: piece.size] for result in _RESULTS)
        bits = piece.view(np.uint32)
        np.bitwise_and(bits, _MAGNITUDE, out=magnitude)
        highest = int(magnitude.max())
        found = max(found, highest)
        if highest >= _OVERFLOW:
            with np.errstate(all="ignore"):
                np.copyto(target, piece, casting="unsafe")
            continue
        np.bitwise_and(magnitude, _EXPONENT, out=wide)
        np.maximum(wide, _SMALLEST[: piece.size], out=wide)
        np.right_shift(wide, _TO_EXPONENT, out=other)  # the exponent in its place
        np.add(wide, other, out=wide)
        np.add(wide, _MIDDLE, out=wide)
        np.add(wide.view(np.float32), magnitude.view(np.float32), out=wide.view(np.float32))
        np.right_shift(bits, _TO_SIGN, out=other)
        np.bitwise_and(other, _SIGN, out=other)
        np.bitwise_or(wide, other, out=wide)
        np.copyto(target.view(np.uint16), wide, casting="unsafe")  # the low half of the bits
    return found
