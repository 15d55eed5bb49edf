"""The way without what only Linux has: threads for forks, processes that are asked, files with one position.

tests/support/portable hides from the package what Windows does not have: a stand-in for Windows itself, which
cannot run here. `make test-portable` runs the tests of conversions so.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
import time
from collections.abc import Iterator
from pathlib import Path

import h5py
import numpy as np
import psutil
import pytest
from support.checkpoints import ROOT, Checkpoints
from support.hdf5 import compress, datasets
from support.waiting import LONG, until

from kcv2diffusers.errors import Error
from kcv2diffusers.sources import isolated as isolation
from kcv2diffusers.sources.hdf5 import read_tree
from kcv2diffusers.sources.isolated import Died, isolated, start
from kcv2diffusers.system.workers import _threads

HIDING = ROOT / "tests" / "support" / "portable"

CONVERT = """
import sys
from kcv2diffusers import convert, to_keras
from kcv2diffusers.system import processes
assert processes.FORKS is (sys.argv[1] == "forked")
*sources, out = sys.argv[2:]
convert(*sources, out=out + "/there", base="none", dtype="float16")
to_keras(out + "/there", out=out + "/back")
"""


def files(folder: Path) -> dict[str, bytes]:
    """What they hold; of HDF5, which stores times, the datasets."""
    found = {path: path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    for path in [path for path in found if path.suffix == ".h5"]:
        found[path] = b"".join(name.encode() + v.tobytes() for name, v in datasets(path).items())
    return {str(path.relative_to(folder)): data for path, data in found.items()}


@pytest.mark.slow
def test_the_same_files(checkpoints: Checkpoints, tmp_path: Path) -> None:
    """Plain, compressed, in an archive, in a SavedModel, there and back: byte for byte."""
    plain, packed = checkpoints("keras3", "vae_decoder"), tmp_path / "text_encoder.h5"
    compress(checkpoints("keras2", "text_encoder") / "legacy.h5", packed)
    heads = {"text_encoder": {"num_attention_heads": 2}}
    (tmp_path / "kcv2diffusers.json").write_text(json.dumps(heads))
    sources = [packed, plain / "model.keras", checkpoints("keras3", "vae_encoder") / "export"]
    found = filter(None, os.environ.get("PYTHONPATH", "").split(os.pathsep))
    others = [path for path in found if Path(path).resolve() != HIDING]
    for way, paths in (("forked", others), ("portable", [str(HIDING), *others])):
        kept = {"PYTHONPATH": os.pathsep.join(paths)}
        subprocess.run(
            [sys.executable, "-c", CONVERT, way, *map(str, sources), str(tmp_path / way)],
            env={**os.environ, **kept},
            check=True,
        )
    forked, portable = files(tmp_path / "forked"), files(tmp_path / "portable")
    assert len(forked) > 5 and forked == portable


@pytest.fixture
def spawned(monkeypatch: pytest.MonkeyPatch) -> Iterator[list[subprocess.Popen[bytes]]]:
    """The processes that wait for work; all end with the test."""
    waiting: list[subprocess.Popen[bytes]] = []
    monkeypatch.setattr(isolation, "FORKS", False)
    monkeypatch.setattr(isolation._Spawned, "_waiting", waiting)
    yield waiting
    for process in waiting:
        process.kill()
        process.wait()


def test_a_spawned_child_that_crashes_or_raises(spawned: list[subprocess.Popen[bytes]]) -> None:
    with pytest.raises(Died):
        isolated(os.abort)
    with pytest.raises(Died):
        isolated(shutil.rmtree, "/nowhere/at/all")
    assert spawned == []


def test_a_python_that_cannot_start(
    spawned: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    """It is not the file that is damaged."""
    monkeypatch.setattr(sys, "executable", shutil.which("false"))
    with h5py.File(tmp_path / "file.h5", "w") as file:
        file["a"] = np.ones(3)
    with pytest.raises(Error, match="false: cannot be started once more"):
        read_tree(tmp_path / "file.h5")


def test_a_spawned_child_that_never_ends(
    spawned: list[subprocess.Popen[bytes]], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(isolation, "_SPAWNED_SECONDS", 0.5)
    with pytest.raises(Died):
        isolated(time.sleep, LONG)


def test_one_process_answers_again(spawned: list[subprocess.Popen[bytes]]) -> None:
    first, second = start(os.urandom, 5_000_000), start(os.urandom, 3)
    assert (len(first.result()), len(second.result())) == (5_000_000, 3)
    processes = {process.pid for process in spawned}
    assert len(processes) == 2
    for _ in range(3):
        assert len(isolated(os.urandom, 10)) == 10
    assert {process.pid for process in spawned} == processes
    spawned[-1].kill()  # one that has died while it waited is not asked
    spawned[-1].wait()
    assert len(isolated(os.urandom, 10)) == 10


def test_a_spawned_child_that_is_stopped(spawned: list[subprocess.Popen[bytes]]) -> None:
    before = psutil.Process().children()
    child = start(time.sleep, 60)
    child.stop()
    assert spawned == [] and psutil.Process().children() == before


def test_spawned_children_end_with_their_parent() -> None:
    code = f"""
import sys
sys.path.insert(0, {str(HIDING)!r})
import sitecustomize
from kcv2diffusers.sources.isolated import isolated, _Spawned
import os
isolated(os.urandom, 1)
print(_Spawned._waiting[0].pid, flush=True)
os._exit(0)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    until(lambda: not psutil.pid_exists(int(done.stdout)))


def test_threads_do_each_job_once() -> None:
    made = []

    def make() -> object:
        made.append(1)
        return lambda number: number**2

    assert sorted(_threads(range(100), make, 3)) == [(n, n**2) for n in range(100)]
    assert len(made) == 3


def test_threads_stop_at_an_error_or_when_nobody_asks() -> None:
    done: list[int] = []

    def do(number: int) -> int:
        if number == 5:
            raise ValueError("the fifth")
        done.append(number)
        time.sleep(0.001)
        return number

    with pytest.raises(ValueError, match="the fifth"):
        list(_threads(range(10_000), lambda: do, 2))
    assert len(done) < 5_000
    done.clear()
    results = _threads(range(6, 10_000), lambda: do, 2)
    next(results)
    results.close()
    assert len(done) < 5_000


def test_positions(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from kcv2diffusers.system import positioned

    for name in ("pwrite", "preadv", "posix_fallocate"):
        monkeypatch.delattr(os, name, raising=False)
    path = tmp_path / "file"
    with path.open("w+b") as file:
        fd = file.fileno()
        positioned.allocate(fd, 20)
        for start_, text in ((10, b"later"), (0, b"first")):
            assert positioned.write_at(fd, memoryview(text), start_) == 5
        into = bytearray(8)
        assert positioned.read_at(fd, memoryview(into), 10) == 8 and into == b"later\0\0\0"
        assert positioned.read_at(fd, memoryview(into), 16) == 4
    assert path.read_bytes() == b"first" + b"\0" * 5 + b"later" + b"\0" * 5
    assert np.frombuffer(path.read_bytes(), np.uint8).size == 20
