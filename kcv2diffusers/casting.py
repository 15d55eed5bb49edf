"""Changing the dtype of weights, rounding to nearest even."""

from __future__ import annotations

import numpy as np

_PIECE = 1 << 16  # values at a time: the intermediate results stay in the L2 cache
_EXPONENT = np.uint32(0x7F800000)  # of a float32
_MAGNITUDE = np.uint32(0x7FFFFFFF)  # all of it but the sign
_OVERFLOW = 0x47000000  # the exponent of 2**15: what may round to infinity
_SMALLEST = np.full(_PIECE, 2**-14, np.float32).view(np.uint32)  # the smallest normal float16; an array,
# because NumPy's maximum with a number is three times slower
_MIDDLE = np.uint32((13 << 23) + (1 << 22) - (127 - 15 + 1 << 10))  # see `_halve`
_SIGN = np.uint32(0x8000)  # of a float16
_RESULTS = [np.empty(_PIECE, np.uint32) for _ in range(3)]  # kept: fresh memory costs a page fault every
# 4 KB. So one thread at a time; conversions run in processes.


def cast(values: np.ndarray, into: np.ndarray) -> None:
    """Copy `values` to the dtype of `into`, both contiguous. What overflows becomes infinite."""
    if values.dtype == np.float32 and into.dtype == np.float16 and values.size:
        _halve(values.reshape(-1), into.reshape(-1))
        return
    with np.errstate(all="ignore"):
        np.copyto(into, values, casting="unsafe")


def _halve(values: np.ndarray, into: np.ndarray) -> None:
    """float32 to float16 in whole-array operations, which SIMD units do; NumPy casts value by value.

    A half of exponent e is a multiple of 2**(e - 10), and so are the floats around 1.5 * 2**(e + 13):
    adding that to a magnitude rounds it, to even, and leaves the multiple in the low bits. e is at least
    -14, below which halves are subnormal. The half's own bits are the multiple, with 1024 of it and e in the
    exponent: the difference is added beforehand, in the low bits of 1.5 * 2**(e + 13). The sign comes last.
    """
    for start in range(0, values.size, _PIECE):
        piece, target = values[start : start + _PIECE], into[start : start + _PIECE]
        magnitude, wide, other = (result[: piece.size] for result in _RESULTS)
        bits = piece.view(np.uint32)
        np.bitwise_and(bits, _MAGNITUDE, out=magnitude)
        if magnitude.max() >= _OVERFLOW:
            with np.errstate(all="ignore"):
                np.copyto(target, piece, casting="unsafe")
            continue
        np.bitwise_and(magnitude, _EXPONENT, out=wide)
        np.maximum(wide, _SMALLEST[: piece.size], out=wide)
        np.right_shift(wide, np.uint32(13), out=other)  # the exponent in its place
        np.add(wide, other, out=wide)
        np.add(wide, _MIDDLE, out=wide)
        np.add(wide.view(np.float32), magnitude.view(np.float32), out=wide.view(np.float32))
        np.right_shift(bits, np.uint32(16), out=other)
        np.bitwise_and(other, _SIGN, out=other)
        np.bitwise_or(wide, other, out=wide)
        np.copyto(target.view(np.uint16), wide, casting="unsafe")  # the low half of the bits
