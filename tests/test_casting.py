"""The cast to float16 equals NumPy's, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from kcv2diffusers.casting import _PIECE, cast


def check(values: np.ndarray) -> None:
    into = np.empty(values.shape, np.float16)
    cast(values, into)
    with np.errstate(all="ignore"):
        np.testing.assert_array_equal(into.view(np.uint16), values.astype(np.float16).view(np.uint16))


def test_every_half_and_what_lies_between() -> None:
    """All float16 values, the ties between neighbours, and the floats next to both; both signs."""
    halves = np.arange(0x7C00, dtype=np.uint16).view(np.float16).astype(np.float32)
    ties = ((halves[:-1].astype(np.float64) + halves[1:]) / 2).astype(np.float32)
    exact = np.concatenate([halves, ties]).view(np.int32)
    near = np.concatenate([exact, exact + 1, np.maximum(exact - 1, 0)]).view(np.float32)
    check(near)
    check(-near)


@pytest.mark.parametrize("low, high", [(0, 0x3380_0000), (0x3300_0000, 0x3900_0000), (0, 2**32)])
def test_random_bits(low: int, high: int) -> None:
    """Below and among the subnormal halves, and everything, NaN and infinity included."""
    bits = np.random.default_rng(0).integers(low, high, 300_001, np.uint32)
    check(bits.view(np.float32))
    check((bits ^ 0x8000_0000).view(np.float32))


@pytest.mark.parametrize("size", [0, 1, *(n * _PIECE + more for n in (1, 2) for more in (-1, 0, 1))])
def test_sizes(size: int) -> None:
    check(np.linspace(-2, 2, size, dtype=np.float32))


def test_other_dtypes() -> None:
    values = np.linspace(-3, 3, 100, dtype=np.float32)
    into = np.empty(100, ml_dtypes.bfloat16)
    cast(values, into)
    np.testing.assert_array_equal(into, values.astype(ml_dtypes.bfloat16))
