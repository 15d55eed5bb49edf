"""Changing the dtype of weights, rounding to nearest even."""

from __future__ import annotations

import numpy as np

_PIECE = 1 << 17  # values at a time: the intermediate results stay in the L2 cache
_EXPONENT = np.uint32(0x7F800000)  # of a float32
_OVERFLOW = 0x47000000  # the exponent of 2**15: what may round to infinity
_SMALLEST = np.full(_PIECE, 2**-14, np.float32).view(np.uint32)  # the smallest normal float16; an array,
# because NumPy's maximum with a number is three times slower
_MIDDLE = np.uint32((13 << 23) + (1 << 22))  # makes 2**e to 1.5 * 2**(e + 13)
_BIAS = np.uint16((127 - 15 + 1 << 10) % (1 << 16))


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
    adding that to a value rounds it, to even, and leaves the multiple in the low bits. e is at least -14,
    below which halves are subnormal. The half's own bits are the multiple, with 1024 of it and e in the
    exponent, and the sign.
    """
    size = min(_PIECE, values.size)
    wide, shifted, half, part = (np.empty(size, kind) for kind in ("u4", "u4", "u2", "u2"))
    for start in range(0, values.size, size):
        piece, target = values[start : start + size], into[start : start + size]
        n = piece.size
        w, s, h, p = wide[:n], shifted[:n], half[:n], part[:n]
        bits = piece.view(np.uint32)
        np.bitwise_and(bits, _EXPONENT, out=w)
        if w.max() >= _OVERFLOW:
            with np.errstate(all="ignore"):
                np.copyto(target, piece, casting="unsafe")
            continue
        np.maximum(w, _SMALLEST[:n], out=w)
        np.right_shift(w, np.uint32(13), out=s)
        np.copyto(p, s, casting="unsafe")  # the exponent in its place
        np.add(w, _MIDDLE, out=w)
        np.add(w.view(np.float32), piece, out=s.view(np.float32))
        np.copyto(h, s, casting="unsafe")  # the multiple: the low half of the bits
        np.absolute(h.view(np.int16), out=h.view(np.int16))
        np.add(h, p, out=h)
        np.subtract(h, _BIAS, out=h)
        np.right_shift(bits, np.uint32(16), out=s)
        np.copyto(p, s, casting="unsafe")
        np.bitwise_and(p, np.uint16(0x8000), out=p)
        np.bitwise_or(h, p, out=target.view(np.uint16))
