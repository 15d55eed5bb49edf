"""Mutated and truncated files by the thousand: each is read, or refused with an `Error`; nothing else.

A crash of libhdf5 or a loop without end would take this process along, which fails louder than any
assertion; `isolated` is there so that neither happens, and its own tests make both on purpose.
"""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import struct
import time
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import NamedTuple

import h5py
import numpy as np
import psutil
import pytest
from support.checkpoints import Checkpoints
from support.hdf5 import compress
from support.waiting import LONG

from kcv2diffusers import convert
from kcv2diffusers.errors import Error, SourceError
from kcv2diffusers.sources import hdf5, tensorflow
from kcv2diffusers.sources import isolated as isolation
from kcv2diffusers.sources.diffusers_pipeline import read_pipeline
from kcv2diffusers.sources.isolated import Died, isolated
from kcv2diffusers.sources.open import open_all, open_sources
from kcv2diffusers.sources.recognise import recognise_all
from kcv2diffusers.sources.tensor import Tensor
from kcv2diffusers.sources.tensor_bundle import Attribute, Child, Node
from kcv2diffusers.system.processes import FORKS

pytestmark = pytest.mark.slow
FORKED = pytest.mark.skipif(not FORKS, reason="of forks; spawned children are those of test_portable")

INTERESTING = [0, 1, 2, 4, 8, 16, 32, 64, 0x7F, 0x80, 0xFE, 0xFF]


class Case(NamedTuple):
    """A checkpoint to damage: its path in a folder, the files of it to change, how many times."""

    stack: str
    name: str
    files: str
    mutations: int
    truncations: int


CASES = {
    "legacy .h5": Case("keras2", "legacy.h5", "legacy.h5", 200, 80),
    "whole-model .h5": Case("keras3", "model.h5", "model.h5", 100, 40),
    ".weights.h5": Case("keras3", "weights.weights.h5", "weights.weights.h5", 200, 80),
    ".weights.h5 of Keras 2": Case("keras2", "weights.weights.h5", "weights.weights.h5", 100, 40),
    "compressed": Case("keras2", "gzip.h5", "gzip.h5", 60, 40),
    "sharded": Case("keras3", "sharded.weights.json", "sharded*", 100, 60),
    ".keras": Case("keras3", "model.keras", "model.keras", 120, 60),
    "deflated .keras": Case("keras3", "deflated.keras", "deflated.keras", 200, 40),
    "SavedModel": Case("keras3", "export", "export/variables/*", 300, 150),
    "TensorFlow checkpoint": Case("keras2", "checkpoint/ckpt", "checkpoint/ckpt.*", 600, 150),
    "base pipeline": Case("keras3", "pipeline", "pipeline/text_encoder/*", 700, 150),
}


@pytest.fixture(scope="module")
def damaged(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> Callable[[Case], Path]:
    """A copy of the checkpoint of a case that may be damaged."""

    def copy(case: Case) -> Path:
        source = checkpoints(case.stack, "text_encoder")
        folder = tmp_path_factory.mktemp("damaged")
        if case.name == "gzip.h5":
            compress(source / "legacy.h5", folder / case.name)
        elif case.name == "deflated.keras":
            deflate(source / "model.keras", folder / case.name)
        elif case.name == "pipeline":
            given = folder / "weights.weights.h5"
            shutil.copy(source / "weights.weights.h5", given)
            heads = {"text_encoder": {"num_attention_heads": 2}}
            (folder / "kcv2diffusers.json").write_text(json.dumps(heads))
            convert(given, out=folder / case.name, base="none")
        else:
            for path in source.glob(case.files.split("/")[0]):
                copied = folder / path.name
                shutil.copytree(path, copied) if path.is_dir() else shutil.copy(path, copied)
        return folder

    return copy


def deflate(source: Path, target: Path) -> None:
    import zipfile

    with zipfile.ZipFile(source) as old, zipfile.ZipFile(target, "w", zipfile.ZIP_DEFLATED) as new:
        for member in old.infolist():
            new.writestr(member.filename, old.read(member))


class Stuck(BaseException):
    """A reader took too long; not an Exception, so that no reader takes it for damage."""


@contextmanager
def time_limit(seconds: float) -> Iterator[None]:
    def stop(*_: object) -> None:
        raise Stuck

    before = signal.signal(signal.SIGALRM, stop)
    signal.setitimer(signal.ITIMER_REAL, seconds)
    try:
        yield
    finally:
        signal.setitimer(signal.ITIMER_REAL, 0)
        signal.signal(signal.SIGALRM, before)


def read(path: Path) -> list[Tensor] | None:
    """All tensors, each known to lie in its file or unpacked; None if the checkpoint is refused."""
    try:
        with time_limit(LONG):
            if path.name == "pipeline":
                components = read_pipeline(path)
                tensors = [t for c in components.values() for m in c.parts.values() for _, t in m.slots()]
            else:
                sources = open_sources(path)
                tensors = [tensor for source in sources for tensor in source.tensors]
                recognise_all(sources)
            packed = [tensor for tensor in tensors if tensor.load is not None]
            for tensor in tensors:
                assert tensor.nbytes >= 0
                if tensor.load is not None:
                    if tensor not in packed[::8]:
                        continue  # unpacking one takes as long as finding all
                    values = tensor.load()
                    assert (values.shape, values.dtype) == (tensor.shape, tensor.dtype)
                else:
                    assert tensor.offset is not None and tensor.offset >= 0
                    assert tensor.offset + tensor.nbytes <= tensor.path.stat().st_size
    except Error as error:
        assert str(path) in str(error) or str(path.parent) in str(error), "the message names no file"
        return None
    return tensors


def layout(tensors: list[Tensor]) -> list[tuple[str, tuple[int, ...], str, int | None]]:
    return [(t.name, t.shape, t.dtype.name, t.offset) for t in tensors]


def structure(path: Path, tensors: list[Tensor]) -> list[int]:
    """Positions of the bytes that are not tensors': what a reader goes by."""
    data = bytearray(b"\1" * path.stat().st_size)
    for tensor in tensors:
        if tensor.path == path and tensor.offset is not None:
            data[tensor.offset : tensor.offset + tensor.nbytes] = bytes(tensor.nbytes)
    return [position for position, byte in enumerate(data) if byte]


def mutate(rng: random.Random, data: bytes, positions: list[int], used: list[int]) -> bytes:
    """A few bytes changed the way parsers like least; `used` are the positions that are not zero."""
    result = bytearray(data)
    for _ in range(rng.choice([1, 1, 1, 2, 3, 8, 32])):
        at = rng.choice(used if used and rng.random() < 0.7 else positions)
        kind, width = rng.random(), rng.choice([2, 4, 8])
        if kind < 0.35:
            new = bytes([rng.randrange(256)])
        elif kind < 0.55:
            new = bytes([result[at] ^ 1 << rng.randrange(8)])
        elif kind < 0.75:
            new = bytes([rng.choice(INTERESTING)])
        elif kind < 0.85:
            number = rng.choice([0, -1, len(data) - rng.randrange(64), rng.choice(positions)])
            new = struct.pack("<q", number)[:width]
        elif kind < 0.95:
            other = rng.choice(positions)
            new = data[other : other + 4 * width]
        else:
            new = rng.randbytes(width)
        result[at : at + len(new)] = new
    return bytes(result[: len(data)])


@contextmanager
def impatient() -> Iterator[None]:
    """Loops without end are cut off soon: there are dozens of them here. On a slow machine what is intact may
    be cut off too, so it is read outside.
    """
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(isolation, "CPU_SECONDS", 0.1)
        patch.setattr(isolation, "_SPAWNED_SECONDS", 2.0)  # where there are no forks
        yield


@pytest.mark.parametrize("container", CASES)
def test_mutated_files_are_read_or_refused(container: str, damaged: Callable[[Case], Path]) -> None:
    case = CASES[container]
    folder = damaged(case)
    path = folder / case.name
    intact = read(path)
    assert intact, "the checkpoint itself is not read"
    files = {file: file.read_bytes() for file in sorted(folder.glob(case.files))}
    places = {file: structure(file, intact) for file in files}
    used = {file: [p for p in places[file] if files[file][p]] for file in files}
    choice = [file for file in files if places[file]]
    outcomes: Counter[str] = Counter()
    for seed in range(case.mutations):
        rng = random.Random(f"{container} {seed}")
        file = rng.choice(choice)
        file.write_bytes(mutate(rng, files[file], places[file], used[file]))
        try:
            with impatient():
                tensors = read(path)
        except BaseException as error:
            pytest.fail(f"{container}, {file.name}, seed {seed}: {type(error).__name__}: {error}")
        finally:
            file.write_bytes(files[file])
        outcomes["refused" if tensors is None else "read"] += 1
    assert sum(outcomes.values()) == case.mutations
    assert outcomes["refused"] > case.mutations // 10, outcomes
    again = read(path)
    assert again is not None and layout(again) == layout(intact)


@pytest.mark.parametrize("container", CASES)
def test_truncated_files_are_refused(container: str, damaged: Callable[[Case], Path]) -> None:
    """Cut anywhere, wherever a tensor's or the structure's bytes are lost."""
    case = CASES[container]
    folder = damaged(case)
    path = folder / case.name
    assert read(path), "the checkpoint itself is not read"
    files = [file for file in sorted(folder.glob(case.files)) if file.stat().st_size]
    rng = random.Random(container)
    for number in range(case.truncations):
        file = files[number % len(files)]
        data = file.read_bytes()
        ends = (0, 1, 8, 9, len(data) - 1, len(data) - 9, len(data) // 2)
        turn = number // len(files)
        size = ends[turn] if turn < len(ends) else rng.randrange(len(data))
        file.write_bytes(data[:size])
        lost = data[size:].strip()  # a JSON file does without its last line end
        with impatient():
            found = read(path)
        assert found is None or not lost, f"{file.name} cut to {size} of {len(data)} bytes was read"
        file.write_bytes(data)
    assert read(path), "the checkpoint is not whole again"


@pytest.mark.parametrize("container", ["TensorFlow checkpoint", "SavedModel"])
def test_a_mutated_bundle_index_is_never_misread(container: str, damaged: Callable[[Case], Path]) -> None:
    """Its blocks have checksums, so whatever is read must be what was written."""
    case = CASES[container]
    folder = damaged(case)
    path = folder / case.name
    intact = read(path)
    assert intact
    [index] = folder.rglob("*.index")
    data = index.read_bytes()
    rng = random.Random(5)
    refused = 0
    for _ in range(300):
        at = rng.randrange(len(data))
        index.write_bytes(data[:at] + bytes([data[at] ^ 1 << rng.randrange(8)]) + data[at + 1 :])
        tensors = read(path)
        refused += tensors is None
        assert tensors is None or layout(tensors) == layout(intact), f"byte {at}"
    assert refused > 250


def test_random_object_graphs(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Graphs with cycles, layers inside layers and names that are almost numbers, under good checksums."""
    names = ["layer_with_weights-0", "layer_with_weights-1", "layer_with_weights-\u00b2", "_operations"]
    names += ["variables", "kernel", "bias", "model", "0", "1", "\u00b2", "9" * 5000, "", "-1"]
    tensor = Tensor("t", (2, 2), np.dtype("<f4"), tmp_path, 0)
    monkeypatch.setattr(tensorflow, "read_bundle", lambda prefix: {"t": tensor})
    outcomes: Counter[str] = Counter()
    for seed in range(200):
        rng = random.Random(seed)
        size = rng.randrange(1, 30)
        nodes = [
            Node(
                tuple(Child(rng.randrange(size), rng.choice(names)) for _ in range(rng.randrange(6))),
                (Attribute("VARIABLE_VALUE", "", rng.choice(["t", "t", "gone"])),) * (rng.random() < 0.3),
                (),
            )
            for _ in range(size)
        ]
        monkeypatch.setattr(tensorflow, "read_object_graph", lambda prefix, nodes=nodes: nodes)
        try:
            with time_limit(LONG):
                recognise_all(tensorflow.read_checkpoint(tmp_path))
            outcomes["read"] += 1
        except Error:
            outcomes["refused"] += 1
    assert sum(outcomes.values()) == 200 and outcomes["refused"] > 20


def test_an_object_graph_of_endless_paths(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Every layer leads to every object, and there are many of both."""
    count = 2000
    layers = tuple(Child(number + 1, f"layer_with_weights-{number}") for number in range(count))
    everything = tuple(Child(number + 1, f"part{number}") for number in range(count))
    nodes = [Node(layers, (), ()), *(Node(everything, (), ()) for _ in range(count))]
    monkeypatch.setattr(tensorflow, "read_bundle", lambda prefix: {})
    monkeypatch.setattr(tensorflow, "read_object_graph", lambda prefix: nodes)
    with time_limit(LONG), pytest.raises(Error, match="never ends"):
        tensorflow.read_checkpoint(tmp_path)


@pytest.mark.parametrize("suffix", [".h5", ".weights.h5", ".keras", ".weights.json", ".index"])
def test_random_bytes_are_refused(suffix: str, tmp_path: Path) -> None:
    rng = random.Random(suffix)
    path = tmp_path / f"random{suffix}"
    heads = [b"", b"\x89HDF\r\n\x1a\n", b"PK\x03\x04", b"{", b'{"weight_map": {"a": ']
    for number in range(100):
        path.write_bytes(heads[number % len(heads)] + rng.randbytes(rng.randrange(5000)))
        assert read(path) is None


@FORKED
def test_a_child_that_crashes_is_told() -> None:
    with pytest.raises(Died, match=f"{-signal.SIGSEGV}"):
        isolated(lambda: os.kill(os.getpid(), signal.SIGSEGV) or b"")
    with pytest.raises(Died, match=f"{-signal.SIGABRT}"):
        isolated(lambda: os.abort())


@FORKED
@pytest.mark.parametrize("kind", ["busy", "asleep"])
def test_a_child_that_never_ends_is_told(kind: str, monkeypatch: pytest.MonkeyPatch) -> None:
    def work() -> bytes:
        while kind == "busy":
            pass
        time.sleep(LONG)
        return b""

    monkeypatch.setattr(isolation, "CPU_SECONDS" if kind == "busy" else "WALL_SECONDS", 0.2)
    with pytest.raises(Died):
        isolated(work)


@FORKED
@pytest.mark.skipif(not Path("/proc/self/statm").exists(), reason="needs Linux' /proc")
def test_a_child_that_wants_all_memory_is_told() -> None:
    with pytest.raises(Died):
        isolated(lambda: bytes(bytearray(isolation.MEMORY + (1 << 28))[:1]))


@FORKED
def test_a_child_that_raises_says_nothing_and_cleans_nothing_up(capfd: pytest.CaptureFixture[str]) -> None:
    cleaned = []
    try:
        with pytest.raises(Died):
            isolated(lambda: 1 // 0 and b"")
    finally:
        cleaned.append(os.getpid())
    assert cleaned == [os.getpid()]
    assert capfd.readouterr() == ("", "")


@FORKED
def test_a_large_result_comes_back_whole() -> None:
    values = np.arange(3 << 20, dtype=np.uint8)
    assert isolated(lambda: memoryview(values.data)) == values.tobytes()


@FORKED
def test_an_interrupted_parent_leaves_no_child(tmp_path: Path) -> None:
    """As Ctrl-C does while the child works."""
    note, parent = tmp_path / "pid", os.getpid()

    def interrupt_and_sleep() -> bytes:
        note.write_text(str(os.getpid()))
        os.kill(parent, signal.SIGALRM)
        time.sleep(LONG)
        return b""

    with pytest.raises(Stuck), time_limit(LONG):
        isolated(interrupt_and_sleep)
    assert note.exists()
    with pytest.raises(ProcessLookupError):
        os.kill(int(note.read_text()), 0)


@FORKED
def test_files_parsed_side_by_side_leave_no_child(tmp_path: Path) -> None:
    """One of them given twice, more than are parsed at once, and the first of them refused."""
    paths = [tmp_path / f"{number}.h5" for number in range(6)]
    for path in paths:
        with h5py.File(path, "w") as file:
            file["a"] = np.ones(3)
    before = psutil.Process().children()  # such as the process of a KerasCV stack
    with pytest.raises(SourceError, match=r"0\.h5.*not one that Keras"):
        open_all([paths[0], paths[0], *paths, tmp_path / "missing.h5"])
    with hdf5.ahead(paths):
        trees = [hdf5.read_tree(path) for path in paths]
    assert [tree.path for tree in trees] == paths and all("a" in tree.tensors for tree in trees)
    assert psutil.Process().children() == before
