"""Casts equal NumPy's, bit for bit."""

from __future__ import annotations

import ml_dtypes
import numpy as np
import pytest

from kcv2diffusers.dtypes import DTYPES
from kcv2diffusers.targets.casting import cast, is_finite


def check(values: np.ndarray, dtype: np.dtype | type = np.float16) -> None:
    """All bits, but for those of NaN: which of its bits survive is the processor's choice."""
    into = np.empty(values.shape, dtype)
    cast(values, into)
    bits = f"u{into.itemsize}"
    with np.errstate(all="ignore"):
        expected = values.astype(dtype)
        number = ~np.isnan(expected)
        np.testing.assert_array_equal(np.isnan(into), ~number)
    np.testing.assert_array_equal(into.view(bits)[number], expected.view(bits)[number])


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


@pytest.mark.parametrize("source", [*DTYPES, "float64"])
@pytest.mark.parametrize("target", DTYPES)
def test_dtypes(source: str, target: str) -> None:
    """Random bits, in rows that lie apart; also where the values are not aligned."""
    dtype = DTYPES.get(source, np.dtype(source))
    stored = np.random.default_rng(0).integers(0, 256, 40 * 1000 * dtype.itemsize + 1, np.uint8)
    for start in (0, 1):
        values = stored[start : stored.size - 1 + start].view(dtype).reshape(40, 1000)
        check(values, DTYPES[target])
        check(values[:, 3:995], DTYPES[target])


def test_float64_is_rounded_once() -> None:
    """Not to float32 first, where these become ties."""
    values = np.array([1 + 2**-11 + 2**-40, -1 - 2**-11 - 2**-40])
    check(values)
    assert values.astype(np.float32).astype(np.float16)[0] != values.astype(np.float16)[0]


@pytest.mark.parametrize("shape", [(0,), (1,), (), (3, 0)])
def test_shapes(shape: tuple[int, ...]) -> None:
    check(np.ones(shape, np.float32))


@pytest.mark.parametrize("dtype", [*DTYPES.values(), np.dtype("f8")])
def test_is_finite(dtype: np.dtype) -> None:
    limit = ml_dtypes.finfo(dtype)
    values = np.array([0, -0.0, limit.smallest_subnormal, limit.max, limit.min], dtype)
    assert is_finite(values) and is_finite(values[:3]) and is_finite(values[:0])
    for at in range(values.size):
        for wrong in (np.inf, -np.inf, np.nan, -np.nan):
            changed = values.copy()
            changed[at] = wrong
            assert not is_finite(changed)
            assert not is_finite(changed.reshape(5, 1))
