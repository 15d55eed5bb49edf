"""The block-wise way of a tensor equals the plain statement of its layout, for any shape, dtype and block."""

from __future__ import annotations

import os
import signal
from pathlib import Path
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import psutil
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kcv2diffusers.conversion.map_check import _not_inverse
from kcv2diffusers.errors import Error, SourceError
from kcv2diffusers.maps.layouts import LAYOUTS, core, reverse
from kcv2diffusers.maps.sizes import Size
from kcv2diffusers.sources.tensor import Tensor
from kcv2diffusers.system.processes import FORKS
from kcv2diffusers.targets import stream, transfer

FORKED = pytest.mark.skipif(not FORKS, reason="a signal ends threads and the whole process alike")
DTYPES = [np.dtype(d) for d in ("<f4", "<f2", ml_dtypes.bfloat16)]


def through(
    folder: Path,
    values: np.ndarray,
    axes: tuple[int, int, int] | None,
    dtype: np.dtype,
    crc: int | None = None,
) -> tuple[np.ndarray, list[transfer.NotFinite]]:
    """`values` written to a file, streamed to another, read back."""
    source, target = folder / "source", folder / "target"
    source.write_bytes(b"head" + values.tobytes())
    target.write_bytes(b"\0" * (12 + values.size * dtype.itemsize))
    tensor = Tensor("t", values.shape, values.dtype, source, 4, crc32c=crc)
    found = stream.run([transfer.Job("t", tensor, axes, dtype, target, 12)])
    return np.frombuffer(target.read_bytes()[12:], dtype), found


@pytest.mark.slow
@settings(max_examples=120, deadline=None)
@given(
    shape=st.tuples(st.integers(1, 12), st.integers(1, 40), st.integers(1, 40)),
    source=st.sampled_from(DTYPES),
    target=st.sampled_from(DTYPES),
    turned=st.booleans(),
    block=st.sampled_from([64, 1000, 1 << 20]),
    seed=st.integers(0, 2**32 - 1),
)
def test_any_shape(tmp_path_factory, shape, source, target, turned, block, seed) -> None:
    values = (np.random.default_rng(seed).standard_normal(shape) * 100).astype(source)
    with pytest.MonkeyPatch.context() as patch:
        for name in ("_BAND", "_PIECE", "_SLICE", "_WRITE"):
            patch.setattr(transfer, name, block)
        for name, count in (("_ROWS", 11), ("_WIDTH", 30)):
            patch.setattr(transfer, name, count)
        got, found = through(tmp_path_factory.mktemp("s"), values, shape if turned else None, target)
    wanted = reverse(values, shape, shape[::-1]) if turned else values
    np.testing.assert_array_equal(got.view(np.uint8), wanted.astype(target).reshape(-1).view(np.uint8))
    assert found == []


@pytest.mark.parametrize("layout", LAYOUTS)
def test_layouts_are_inverted_by_the_stream_too(tmp_path: Path, layout: str) -> None:
    sizes = {"size": 3, "in": 6, "out": 4, "width": 5, "rows": 7, "heads": 2, "head": 8, "side": 3}
    for variable in LAYOUTS[layout].variables:
        shape, target = (
            tuple(Size.parse(s).value(sizes) or 0 for s in side)
            for side in (variable.keras, variable.diffusers)
        )
        values = np.random.default_rng(0).standard_normal(shape).astype(np.float32)
        axes = core(target) if variable.reverses else None
        there, _ = through(tmp_path, values, axes, np.dtype("<f4"))
        back, _ = through(tmp_path, there, axes[::-1] if axes else None, np.dtype("<f4"))
        np.testing.assert_array_equal(back.reshape(shape), values)
    assert _not_inverse() == []


@pytest.mark.parametrize(
    ("value", "source", "target", "problem"),
    [
        (np.nan, "f4", "f4", "NaN"),
        (np.inf, "f4", "f2", "NaN or inf"),
        (-np.inf, "f2", "f2", "NaN or inf"),
        (65520.0, "f4", "f2", "6.552e+04, too large for float16"),
        (-70000.0, "f4", "f2", "too large for float16"),
        (3.4e38, "f4", ml_dtypes.bfloat16, "too large for bfloat16"),
        (65504.0, "f4", "f2", None),
        (65519.0, "f4", "f2", None),
        (-3e38, "f4", ml_dtypes.bfloat16, None),
    ],
)
@pytest.mark.parametrize("axes", [None, (1, 30, 40)])
def test_values_that_are_not_finite(tmp_path: Path, value, source, target, problem, axes) -> None:
    values = np.full((30, 40), -1.5, source)
    values[17, 23] = value
    _, found = through(tmp_path, values, axes, np.dtype(target))
    assert [problem in f.problem for f in found] == ([True] if problem else [])


def test_checksum(tmp_path: Path) -> None:
    values = np.arange(60, dtype=np.float32).reshape(6, 10)
    right = google_crc32c.value(values.tobytes())
    through(tmp_path, values, (1, 6, 10), np.dtype("<f4"), right)
    with pytest.raises(SourceError, match="checksum"):
        through(tmp_path, values, (1, 6, 10), np.dtype("<f4"), right ^ 1)


@pytest.mark.parametrize(("size", "problem"), [(100, "the file ends"), (0, "the file is empty")])
def test_file_that_shrinks_meanwhile(tmp_path: Path, size: int, problem: str) -> None:
    (tmp_path / "source").write_bytes(b"\0" * size)
    (tmp_path / "target").write_bytes(b"\0" * 400)
    tensor = Tensor("t", (100,), np.dtype("<f4"), tmp_path / "source", 0)
    with pytest.raises(SourceError, match=problem):
        stream.run([transfer.Job("t", tensor, None, np.dtype("<f4"), tmp_path / "target", 0)])


@FORKED
@pytest.mark.parametrize(
    ("place", "problem"), [("do", "the file was cut meanwhile"), ("bring", "was killed: .* cut meanwhile")]
)
def test_source_that_is_cut_while_it_is_read(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, place: str, problem: str
) -> None:
    """Before the pages of a tensor are there, and after."""
    source, target = tmp_path / "source", tmp_path / "target"
    source.write_bytes(b"\0" * 80_000)
    target.write_bytes(b"\0" * 80_000)
    plain = getattr(transfer.Worker, place)

    def cut(*arguments: Any) -> Any:
        os.truncate(source, 0)
        return plain(*arguments)

    monkeypatch.setattr(transfer.Worker, place, cut)
    tensor = Tensor("t", (20_000,), np.dtype("<f4"), source, 0)
    with pytest.raises(Error, match=problem):
        stream.run([transfer.Job("t", tensor, None, tensor.dtype, target, 0)])


@FORKED
def test_process_that_is_killed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """As the kernel does where memory runs out."""
    (tmp_path / "source").write_bytes(b"\0" * 400)
    (tmp_path / "target").write_bytes(b"\0" * 400)
    monkeypatch.setattr(transfer.Worker, "do", lambda *_: os.kill(os.getpid(), signal.SIGKILL))
    tensor = Tensor("t", (100,), np.dtype("<f4"), tmp_path / "source", 0)
    before = psutil.Process().children()  # of other tests of this process
    with pytest.raises(Error, match="was killed: memory ran out"):
        stream.run([transfer.Job("t", tensor, None, np.dtype("<f4"), tmp_path / "target", 0)])
    assert psutil.Process().children() == before


def test_progress_and_refusal_name_every_tensor(tmp_path: Path) -> None:
    values = np.array([1.0, np.inf], np.float32)
    (tmp_path / "source").write_bytes(values.tobytes())
    (tmp_path / "target").write_bytes(b"\0" * 8 * 10)
    tensor = Tensor("t", (2,), np.dtype("<f4"), tmp_path / "source", 0)
    target = tmp_path / "target"
    jobs = [transfer.Job(f"t{i}", tensor, None, np.dtype("<f4"), target, 8 * i) for i in range(10)]
    seen: list[tuple[int, int]] = []
    with pytest.raises(Error, match=r"(?s)t0 has NaN.*t7 has NaN.*and 2 more") as refusal:
        stream.run_finite(jobs, lambda *p: seen.append(p), allow_nonfinite=False)
    assert "t8" not in str(refusal.value)
    assert seen[-1] == (80, 80) and len(seen) == 10
    assert stream.run_finite(jobs, lambda *p: None, allow_nonfinite=True) == 80
    assert target.read_bytes() == values.tobytes() * 10
    still_open = [fd.resolve() for fd in Path("/proc/self/fd").iterdir()]
    assert target not in still_open
