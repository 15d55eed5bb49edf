"""What a user may get wrong, and what a stranger's file may try: exit code 1, plain lines, nothing left.

Every case goes through the command line's own `main`; where the process itself matters (signals, start-up)
through a process of its own. `cli.refuses` checks what all refusals have in common.
"""

from __future__ import annotations

import base64
import json
import marshal
import os
import pickle
import shutil
import signal
import struct
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import google_crc32c
import h5py
import numpy as np
import pytest
from conftest import ROOT, Checkpoints, cached
from safetensors.numpy import load_file, save_file

import kcv2diffusers
from kcv2diffusers.cli import main, progress
from kcv2diffusers.maps.tables import spec
from kcv2diffusers.sources import tensor_bundle
from kcv2diffusers.sources.open import open_sources

WEIGHTS = Path("text_encoder") / "model.safetensors"
CONFIG = {"text_encoder": {"num_attention_heads": 2}, "unet": {"attention_head_dim": 2}}
CONTAINERS = {
    "legacy.h5": "keras2",
    "model.h5": "keras3",
    "weights.weights.h5": "keras3",
    "sharded.weights.json": "keras3",
    "model.keras": "keras3",
    "export": "keras3",
    "checkpoint": "keras2",
}


def tree(folder: Path) -> dict[str, tuple[int, int]]:
    """Everything below a folder, so that a comparison shows what came, went or changed."""
    return {
        str(path.relative_to(folder)): (path.lstat().st_size, path.lstat().st_mtime_ns)
        for path in folder.rglob("*")
    }


class Cli:
    """The command line, run in this process."""

    def __init__(self, capsys: pytest.CaptureFixture[str], patch: pytest.MonkeyPatch, spool: Path) -> None:
        self.capsys, self.patch, self.spool = capsys, patch, spool

    def run(self, *arguments: str | Path) -> tuple[int, str, str]:
        self.capsys.readouterr()
        self.patch.setattr(sys, "argv", ["kcv2diffusers", *map(str, arguments)])
        handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
        try:
            with pytest.raises(SystemExit) as stop:
                main()
        finally:
            for number, handler in handlers.items():
                signal.signal(number, handler)
        code = stop.value.code
        assert isinstance(code, int)
        return code, *self.capsys.readouterr()

    def refuses(
        self, *arguments: str | Path, watch: Path, names: Path | str = "", report: bool = False
    ) -> str:
        """The message of a refusal, which leaves the folder `watch` and the temporary folder as they were."""
        before = tree(watch)
        code, out, err = self.run(*arguments)
        assert (code, out) == (1, ""), (code, out, err)
        assert tree(watch) == before
        assert list(self.spool.iterdir()) == []
        lines = err.rstrip("\n").split("\n")
        assert lines[0].startswith("kcv2diffusers: ") and str(names) in err, err
        assert report or len(lines) <= 2, err
        assert "Traceback" not in err and "Errno" not in err and "object at 0x" not in err, err
        return err

    def converts(self, *arguments: str | Path) -> str:
        code, out, err = self.run("convert", *arguments)
        assert (code, err) == (0, ""), err
        return out


@pytest.fixture
def cli(
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
    tmp_path_factory: pytest.TempPathFactory,
) -> Cli:
    spool = tmp_path_factory.mktemp("spool")
    monkeypatch.setattr(tempfile, "tempdir", str(spool))
    monkeypatch.setattr(progress, "FIRST", 600.0)  # no line of progress on a machine that is busy
    return Cli(capsys, monkeypatch, spool)


@pytest.fixture
def home(tmp_path: Path) -> Path:
    """A folder for outputs that stays empty where nothing is left behind."""
    folder = tmp_path / "home"
    folder.mkdir()
    return folder


@pytest.fixture
def copy(checkpoints: Checkpoints, tmp_path: Path) -> Callable[..., Path]:
    """A checkpoint of the small text encoder (or another part) that may be changed."""

    def make(container: str, part: str = "text_encoder", version: int = 1) -> Path:
        source = checkpoints(CONTAINERS[container], part, version)
        folder = tmp_path / f"{part}{version}-{container}"
        folder.mkdir()
        (folder / "kcv2diffusers.json").write_text(json.dumps(CONFIG))
        for path in source.glob(container.split(".")[0] + "*"):
            if path.is_dir():
                shutil.copytree(path, folder / path.name)
                shutil.copy(folder / "kcv2diffusers.json", folder / path.name)
            else:
                shutil.copy(path, folder)
        return folder / container

    return make


@pytest.fixture
def legacy(copy: Callable[..., Path]) -> Path:
    return copy("legacy.h5")


@pytest.fixture(scope="module")
def intact(checkpoints: Checkpoints, tmp_path_factory: pytest.TempPathFactory) -> dict[str, bytes]:
    """The right weights of the small text encoder of each stack."""
    found = {}
    for stack, container in (("keras2", "legacy.h5"), ("keras3", "weights.weights.h5")):
        folder = tmp_path_factory.mktemp(stack)
        shutil.copy(checkpoints(stack, "text_encoder") / container, folder)
        (folder / "kcv2diffusers.json").write_text(json.dumps(CONFIG))
        kcv2diffusers.convert(folder / container, out=folder / "out", base="none")
        found[stack] = (folder / "out" / WEIGHTS).read_bytes()
    return found


def alone(source: Path, home: Path) -> tuple[str | Path, ...]:
    """Arguments of a conversion of one part."""
    return ("convert", source, "--base", "none", "--out", home / "out")


def datasets(file: h5py.File) -> list[str]:
    names: list[str] = []
    file.visititems(lambda name, item: names.append(name) if isinstance(item, h5py.Dataset) else None)
    return names


def first_matrix(file: h5py.File) -> str:
    return next(name for name in datasets(file) if file[name].ndim == 2)


# Files that are damaged, of another kind, or hostile.


def test_hdf5_cut_anywhere(cli: Cli, legacy: Path, home: Path) -> None:
    data = legacy.read_bytes()
    sizes = [1, 7, 8, 9, 95, 96, 97, 512, 800, 2048, len(data) // 3, len(data) // 2, len(data) - 1]
    messages = set()
    for size in sizes:
        legacy.write_bytes(data[:size])
        messages.add(cli.refuses(*alone(legacy, home), watch=home, names=legacy))
        cli.refuses("inspect", legacy, watch=home, names=legacy)
    assert any(f"cut short, {len(data) - 1} of {len(data)} bytes are here." in text for text in messages)
    assert all("Copy or download it again." in text for text in messages if "not a Keras" not in text)


@pytest.mark.parametrize(
    ("data", "problem"),
    [
        (b"", "the file is empty."),
        (np.random.default_rng(1).bytes(5000), "not a Keras checkpoint"),
        (b"\x89HDF\r\n\x1a\n" + np.random.default_rng(2).bytes(5000), "a damaged HDF5 file."),
        (b"PK\x03\x04" + np.random.default_rng(3).bytes(5000), "damaged .keras archive"),
        (b"<!DOCTYPE html><title>404</title>", "a web page, not weights"),
    ],
    ids=["empty", "random", "random after HDF5's signature", "random after zip's", "a web page"],
)
@pytest.mark.parametrize("suffix", [".h5", ".keras", ""])
def test_other_files(cli: Cli, tmp_path: Path, home: Path, data: bytes, problem: str, suffix: str) -> None:
    path = tmp_path / f"weights{suffix}"
    path.write_bytes(data)
    assert problem in cli.refuses(*alone(path, home), watch=home, names=path)


def test_an_hdf5_file_of_something_else(cli: Cli, tmp_path: Path, home: Path) -> None:
    path = tmp_path / "other.h5"
    with h5py.File(path, "w") as file:
        file["measurements/vars/0"] = np.zeros((4, 4))
    assert "not one that Keras saved" in cli.refuses(*alone(path, home), watch=home, names=path)


def test_a_keras_model_of_something_else(cli: Cli, tmp_path: Path, home: Path) -> None:
    path = tmp_path / "other.weights.h5"
    with h5py.File(path, "w") as file:
        for number in range(3):
            file[f"layers/dense_{number}/vars/0"] = np.zeros((7, 7), "f4")
    message = cli.refuses(*alone(path, home), watch=home, names=path)
    assert "its 3 tensors are not those of a KerasCV Stable Diffusion model" in message


@pytest.mark.parametrize("make", ["missing", "pipe", "folder", "pipeline", "saved_model"])
def test_paths_without_a_checkpoint(cli: Cli, tmp_path: Path, home: Path, make: str) -> None:
    path = tmp_path / make
    problem = "no checkpoint in this folder."
    if make == "missing":
        problem = "no such file or folder."
    elif make == "pipe":
        os.mkfifo(path)
        problem = "neither a file nor a folder."
    else:
        path.mkdir()
        (path / "notes.txt").write_text("nothing")
    if make == "pipeline":
        (path / "model_index.json").write_text("{}")
        problem = "a diffusers pipeline, not a Keras checkpoint."
    if make == "saved_model":
        (path / "saved_model.pb").write_bytes(b"\0")
        problem = "a SavedModel without its variables/ folder."
    assert problem in cli.refuses(*alone(path, home), watch=home, names=path)


# HDF5 that leads out of the file, or round in circles.


def relink(kind: str) -> Callable[[h5py.File, Path], None]:
    def change(file: h5py.File, path: Path) -> None:
        name = first_matrix(file)
        values = file[name][()]
        secret = path.with_name("secret.h5")
        with h5py.File(secret, "w") as other:
            other["stolen"] = values
        del file[name]
        if kind == "external link":
            file[name] = h5py.ExternalLink(str(secret), "/stolen")
        elif kind == "soft link":
            file[name] = h5py.SoftLink("/elsewhere")
            file["elsewhere"] = values
        elif kind == "soft link cycle":
            file[name] = h5py.SoftLink("/" + name)
        elif kind == "group cycle":
            file[name] = values
            file[name.rpartition("/")[0] + "/again"] = file[name.split("/")[0]]
        elif kind == "root cycle":
            file[name] = values
            file["again"] = file["/"]
        elif kind == "external storage":
            raw = path.with_name("secret.bin")
            raw.write_bytes(values.tobytes())
            file.create_dataset(name, values.shape, values.dtype, external=[(str(raw), 0, values.nbytes)])
        elif kind == "virtual dataset":
            layout = h5py.VirtualLayout(values.shape, values.dtype)
            layout[...] = h5py.VirtualSource(str(secret), "stolen", values.shape)
            file.create_virtual_dataset(name, layout)
        elif kind == "never written":
            file.create_dataset(name, values.shape, values.dtype)
        elif kind == "partly written":
            made = file.create_dataset(name, values.shape, values.dtype, chunks=(16, 16))
            made[:16, :16] = values[:16, :16]
        elif kind == "unknown filter":
            settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            settings.set_chunk(values.shape)
            settings.set_filter(32015, h5py.h5z.FLAG_OPTIONAL)
            kept = h5py.h5t.py_create(values.dtype), h5py.h5s.create_simple(values.shape)
            h5py.h5d.create(file.id, name.encode(), *kept, settings).write(h5py.h5s.ALL, h5py.h5s.ALL, values)
        elif kind == "bomb":
            chunk, count = 16 << 20, 20
            settings = {"chunks": (chunk,), "compression": "gzip"}
            made = file.create_dataset(name, (chunk * count,), "f4", **settings)
            packed = zlib.compress(bytes(4 * chunk), 9)
            for number in range(count):
                made.id.write_direct_chunk((number * chunk,), packed)
        else:
            raise AssertionError(kind)

    return change


@pytest.mark.parametrize(
    ("kind", "problem"),
    [
        ("external link", "a soft or external link, which is not followed"),
        ("soft link", "a soft or external link, which is not followed"),
        ("soft link cycle", "a soft or external link, which is not followed"),
        ("group cycle", "a group that contains itself."),
        ("root cycle", "a group that contains itself."),
        ("external storage", "its data is in another file"),
        ("virtual dataset", "its data is in another file"),
        ("never written", "declared but never written"),
        ("partly written", "declared but only partly written"),
        ("unknown filter", "compressed by HDF5 filter 32015"),
        ("bomb", "unpacks to 1.34 GB from"),
    ],
)
@pytest.mark.parametrize("container", ["legacy.h5", "weights.weights.h5", "model.keras"])
def test_hdf5_tricks(
    cli: Cli, copy: Callable[..., Path], home: Path, kind: str, problem: str, container: str
) -> None:
    path = copy(container)
    with editing(path) as file:
        relink(kind)(file, path)
    message = cli.refuses(*alone(path, home), watch=home, names=path)
    assert problem in message
    assert "group cycle" in kind or "root cycle" in kind or "/" in message  # the tensor is named


@contextmanager
def editing(path: Path) -> Iterator[h5py.File]:
    """The HDF5 file of a container, open for changes."""
    if path.suffix == ".json":
        shards = json.loads(path.read_text())["weight_map"][LAST_NORM]
        path = path.with_name(shards if isinstance(shards, str) else shards[0])
    if path.suffix != ".keras":
        with h5py.File(path, "r+") as file:
            yield file
        return
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    inner = path.with_name("inner.h5")
    inner.write_bytes(members.pop("model.weights.h5"))
    with h5py.File(inner, "r+") as file:
        yield file
    with zipfile.ZipFile(path, "w") as archive:
        archive.write(inner, "model.weights.h5")
        for name, data in members.items():
            archive.writestr(name, data)
    inner.unlink()


LAST_NORM = "/layers/layer_normalization/vars"


@pytest.mark.parametrize(
    ("place", "problem"),
    [
        ("behind the end", "damaged"),
        ("half outside", "damaged"),
        ("far away", "damaged"),
        ("size", "damaged"),
    ],
)
def test_data_outside_the_file(cli: Cli, legacy: Path, home: Path, place: str, problem: str) -> None:
    with h5py.File(legacy) as file:
        dataset = file[first_matrix(file)]
        offset, size = dataset.id.get_offset(), dataset.nbytes
    data = legacy.read_bytes()
    stored = struct.pack("<QQ", offset, size)
    assert data.count(stored) == 1
    changed = {
        "behind the end": (len(data), size),
        "half outside": (len(data) - size // 2, size),
        "far away": (1 << 62, size),
        "size": (offset, size // 2),
    }[place]
    legacy.write_bytes(data.replace(stored, struct.pack("<QQ", *changed)))
    assert problem in cli.refuses(*alone(legacy, home), watch=home, names=legacy)


# HDF5 that Keras does not write but that means the same.


@pytest.mark.parametrize("form", ["chunked", "gzip", "lzf", "big endian", "user block", "compact", "latest"])
def test_other_forms_of_hdf5_work(
    cli: Cli, legacy: Path, home: Path, intact: dict[str, bytes], form: str
) -> None:
    old = legacy.rename(legacy.with_name("old"))
    kept = {"userblock_size": 1024} if form == "user block" else {}
    if form == "latest":
        kept = {"libver": "latest"}
    with h5py.File(old) as source, h5py.File(legacy, "w", **kept) as target:
        target.attrs.update(source.attrs)

        def write(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Group):
                target.require_group(name).attrs.update(item.attrs)
                return
            values, settings = item[()], {}
            if form in ("chunked", "gzip", "lzf"):
                settings = {"chunks": tuple(max(1, n // 2) for n in values.shape)}
            if form in ("gzip", "lzf"):
                settings |= {"compression": form, "shuffle": True}
            if form == "big endian":
                values = values.astype(">f4")
            if form != "compact" or values.nbytes > 60_000:
                target.create_dataset(name, data=values, **settings)
                return
            plist = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
            plist.set_layout(h5py.h5d.COMPACT)
            space, links = h5py.h5s.create_simple(values.shape), h5py.h5p.create(h5py.h5p.LINK_CREATE)
            links.set_create_intermediate_group(True)
            made = h5py.h5d.create(target.id, name.encode(), h5py.h5t.IEEE_F32LE, space, plist, links)
            made.write(h5py.h5s.ALL, h5py.h5s.ALL, values)

        source.visititems(write)
    cli.converts(*alone(legacy, home)[1:])
    assert (home / "out" / WEIGHTS).read_bytes() == intact["keras2"]


@pytest.mark.parametrize("level", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_stored_and_deflated_archives_work(
    cli: Cli, copy: Callable[..., Path], home: Path, intact: dict[str, bytes], level: int
) -> None:
    path = copy("model.keras")
    repack(path, {}, level)
    cli.converts(*alone(path, home)[1:])
    assert (home / "out" / WEIGHTS).read_bytes() == intact["keras3"]
    assert list(cli.spool.iterdir()) == []


def repack(path: Path, changes: dict[str, bytes | None], level: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", level) as archive:
        for name, data in (members | changes).items():
            if data is not None:
                archive.writestr(name, data)


# .keras archives.


@pytest.mark.parametrize("name", ["../evil.txt", "/etc/evil", "a/../../evil", "..\\evil", "\\evil"])
def test_an_archive_with_path_traversal(cli: Cli, copy: Callable[..., Path], home: Path, name: str) -> None:
    path = copy("model.keras")
    repack(path, {name: b"evil"})
    message = cli.refuses(*alone(path, home), watch=path.parent.parent, names=path)
    assert "has a member outside the archive" in message


def test_an_archive_without_weights(cli: Cli, copy: Callable[..., Path], home: Path) -> None:
    path = copy("model.keras")
    repack(path, {"model.weights.h5": None})
    assert "no model.weights.h5 in the archive" in cli.refuses(*alone(path, home), watch=home, names=path)


def test_a_zip_bomb(cli: Cli, copy: Callable[..., Path], home: Path) -> None:
    path = copy("model.keras")
    repack(path, {"model.weights.h5": bytes(200 << 20)}, zipfile.ZIP_DEFLATED)
    assert path.stat().st_size < 1 << 20
    assert "refused as a zip bomb" in cli.refuses(*alone(path, home), watch=home, names=path)


@pytest.mark.parametrize("declared", [1000, 100 << 20])
def test_an_archive_that_lies_about_sizes(
    cli: Cli, copy: Callable[..., Path], home: Path, declared: int
) -> None:
    path = copy("model.keras")
    repack(path, {"model.weights.h5": bytes(50 << 20)}, zipfile.ZIP_DEFLATED)
    data = path.read_bytes()
    patched = data.replace(struct.pack("<I", 50 << 20), struct.pack("<I", declared))
    assert patched != data
    path.write_bytes(patched)
    message = cli.refuses(*alone(path, home), watch=home, names=path)
    assert "damaged" in message or "zip bomb" in message


def test_an_encrypted_archive(cli: Cli, copy: Callable[..., Path], home: Path) -> None:
    path = copy("model.keras")
    data = bytearray(path.read_bytes())
    for mark, flags in ((b"PK\x01\x02", 8), (b"PK\x03\x04", 6)):
        at = data.find(mark)
        while at >= 0:
            data[at + flags] |= 1
            at = data.find(mark, at + 1)
    path.write_bytes(data)
    assert "damaged .keras archive" in cli.refuses(*alone(path, home), watch=home, names=path)


# Code hidden in a checkpoint.


class Payload:
    """Leaves a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[object, tuple[str]]:
        return exec, (f"open({str(self.marker)!r}, 'w').close()",)


def test_the_payload_works(tmp_path: Path) -> None:
    """Else the tests below would prove nothing."""
    marker = tmp_path / "executed"
    pickle.loads(pickle.dumps(Payload(marker)))
    assert marker.exists()


@pytest.fixture
def pickled(tmp_path: Path) -> tuple[Path, Path]:
    """A pipeline folder whose weights are pickled, and the file that appears if they are opened."""
    base, marker = tmp_path / "base", tmp_path / "executed"
    for folder, name in (("unet", "diffusion_pytorch_model"), ("text_encoder", "pytorch_model")):
        (base / folder).mkdir(parents=True)
        (base / folder / "config.json").write_text("{}")
        (base / folder / f"{name}.bin").write_bytes(pickle.dumps(Payload(marker)))
    (base / "model_index.json").write_text("{}")
    return base, marker


def test_pickled_weights_are_never_opened(
    cli: Cli, legacy: Path, home: Path, pickled: tuple[Path, Path]
) -> None:
    base, marker = pickled
    for arguments in (("convert", legacy, "--base", base), ("to-keras", base)):
        message = cli.refuses(*arguments, "--out", home / "out", watch=home, names=base)
        assert "only pickled weights (.bin)" in message and "safe_serialization=True" in message
    assert not marker.exists()


@pytest.mark.parametrize("container", ["model.h5", "model.keras"])
def test_a_lambda_is_never_deserialised(
    cli: Cli, copy: Callable[..., Path], home: Path, intact: dict[str, bytes], container: str
) -> None:
    path, marker = copy(container), home / "executed"
    code = compile(f"open({str(marker)!r}, 'w').close()", "payload", "exec")
    function = [base64.b64encode(marshal.dumps(code)).decode(), None, None]
    layer = {"class_name": "Lambda", "config": {"name": "evil", "function": function}}
    config = json.dumps({"class_name": "Functional", "config": {"layers": [layer]}})
    if container == "model.keras":
        repack(path, {"config.json": config.encode()})
    else:
        with h5py.File(path, "r+") as file:
            file.attrs["model_config"] = config
    cli.converts(*alone(path, home)[1:])
    assert (home / "out" / WEIGHTS).read_bytes() == intact["keras3"]
    assert not marker.exists()


def test_names_cannot_control_the_terminal(cli: Cli, legacy: Path, home: Path) -> None:
    with h5py.File(legacy, "r+") as file:
        file["\x1b[2J\x07evil"] = h5py.SoftLink("/elsewhere")
    message = cli.refuses(*alone(legacy, home), watch=home, names=legacy)
    assert "\\x1b[2J\\x07evil" in message and "\x1b" not in message


# Shards, bundles and SavedModels.


def test_a_missing_shard(cli: Cli, copy: Callable[..., Path], home: Path) -> None:
    path = copy("sharded.weights.json")
    path.with_name("sharded_00001.weights.h5").unlink()
    message = cli.refuses(*alone(path, home), watch=home, names=path)
    assert "its shard sharded_00001.weights.h5 is missing." in message


def test_a_damaged_shard_is_named(cli: Cli, copy: Callable[..., Path], home: Path) -> None:
    path = copy("sharded.weights.json")
    shard = path.with_name("sharded_00001.weights.h5")
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "cut short" in cli.refuses(*alone(path, home), watch=home, names=shard)


@pytest.mark.parametrize("name", ["../evil.weights.h5", "/etc/passwd", "..", "", ".", None, 3, ["a", "../b"]])
def test_a_shard_elsewhere(cli: Cli, copy: Callable[..., Path], home: Path, name: object) -> None:
    path = copy("sharded.weights.json")
    shutil.copy(path.with_name("sharded_00001.weights.h5"), path.parent.parent / "evil.weights.h5")
    index = json.loads(path.read_text())
    index["weight_map"][LAST_NORM] = name
    path.write_text(json.dumps(index))
    message = cli.refuses(*alone(path, home), watch=home, names=path)
    assert "is not a file beside it" in message or "its shard a is missing" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', "[" * 100_000, '{"a": NaN}'])
def test_a_bad_index_of_shards(cli: Cli, copy: Callable[..., Path], home: Path, text: str) -> None:
    path = copy("sharded.weights.json")
    path.write_text(text)
    cli.refuses(*alone(path, home), watch=home, names=path)


def bundle(path: Path) -> tuple[Path, Path]:
    """Index and data of a SavedModel or checkpoint folder."""
    [index] = path.rglob("*.index")
    return index, index.with_suffix(".data-00000-of-00001")


@pytest.mark.parametrize("container", ["export", "checkpoint"])
def test_a_tensor_with_a_wrong_checksum(
    cli: Cli, copy: Callable[..., Path], home: Path, container: str
) -> None:
    path = copy(container)
    _, data = bundle(path)
    tensor = next(t for source in open_sources(path) for t in source.tensors if t.nbytes > 5000)
    stored = bytearray(data.read_bytes())
    stored[tensor.offset + 1234] ^= 4
    data.write_bytes(stored)
    message = cli.refuses(*alone(path, home), watch=home, names=data)
    assert "the checksum does not match, the file is damaged." in message.replace(";", ",")


@pytest.mark.parametrize("container", ["export", "checkpoint"])
@pytest.mark.parametrize("damage", ["no data", "no index", "data cut", "index cut", "index byte", "empty"])
def test_damaged_bundles(
    cli: Cli, copy: Callable[..., Path], home: Path, container: str, damage: str
) -> None:
    path = copy(container)
    index, data = bundle(path)
    culprit = index if "index" in damage or damage == "empty" else data
    if damage.startswith("no "):
        culprit.unlink()
    elif damage == "empty":
        culprit.write_bytes(b"")
    elif damage == "index byte":
        stored = bytearray(culprit.read_bytes())
        stored[100] ^= 1
        culprit.write_bytes(stored)
    else:
        culprit.write_bytes(culprit.read_bytes()[:-1000])
    named = path if damage == "no index" else culprit
    cli.refuses(*alone(path, home), watch=home, names=named)


# Tensors that do not fit.


def rewrite_index(index: Path, change: Callable[[dict[bytes, bytes]], None]) -> None:
    """The index of a bundle with other entries, as one LevelDB block with the right checksums."""

    def varint(number: int) -> bytes:
        head = b""
        while number > 127:
            head, number = head + bytes([number & 127 | 128]), number >> 7
        return head + bytes([number])

    def block(entries: dict[bytes, bytes]) -> bytes:
        body = b"".join(
            b"\0" + varint(len(key)) + varint(len(value)) + key + value
            for key, value in sorted(entries.items())
        )
        body += struct.pack("<II", 0, 1) + b"\0"
        crc = google_crc32c.value(body)
        return body + struct.pack("<I", ((crc >> 15 | crc << 17) + 0xA282EAD8) & 0xFFFFFFFF)

    rows = tensor_bundle._table(index.read_bytes())
    change(rows)
    data, meta = block(rows), block({})
    handle = varint(0) + varint(len(data) - 5)
    top = block({max(rows): handle})
    footer = varint(len(data)) + varint(len(meta) - 5)
    footer += varint(len(data) + len(meta)) + varint(len(top) - 5)
    magic = struct.pack("<Q", 0xDB4775248B80FB57)
    index.write_bytes(data + meta + top + footer.ljust(40, b"\0") + magic)


def test_the_rewritten_index_is_read(
    cli: Cli, copy: Callable[..., Path], home: Path, intact: dict[str, bytes]
) -> None:
    """Else the refusals below would only show that it is damaged."""
    path = copy("checkpoint")
    rewrite_index(bundle(path)[0], lambda rows: None)
    cli.converts(*alone(path, home)[1:])
    assert (home / "out" / WEIGHTS).read_bytes() == intact["keras2"]


def last_norm(file: h5py.File) -> tuple[h5py.Group, str]:
    """The group and name of the final layer norm's weights in any of Keras' HDF5 files."""
    group = file.get("model_weights", file)
    if "layer_names" in group.attrs:
        name = next(n for n in map(text, group.attrs["layer_names"]) if n.startswith("layer_normalization"))
        return group, name
    return file["layers"], "layer_normalization"


def text(name: bytes | str) -> str:
    return name.decode() if isinstance(name, bytes) else name


def first_weight(group: h5py.Group) -> str:
    if "weight_names" in group.attrs:
        return text(group.attrs["weight_names"][0])
    return "vars/0"


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_wrong_shape(cli: Cli, copy: Callable[..., Path], home: Path, container: str) -> None:
    """The report says file, tensor, its shape and the one expected, on either side's name."""
    path = copy(container)
    if container in ("export", "checkpoint"):
        used = {tensor.name.encode() for source in open_sources(path) for tensor in source.tensors}

        def turn(rows: dict[bytes, bytes]) -> None:
            wide = b"\x12\x03\x08\xc0\x01\x12\x02\x08\x30"  # dimensions 192, 48
            name = next(key for key in rows if key in used and wide in rows[key])
            rows[name] = rows[name].replace(wide, b"\x12\x02\x08\x30\x12\x03\x08\xc0\x01")

        rewrite_index(bundle(path)[0], turn)
        wanted = ["[48, 192]", "expected [192, 48]", "mlp.fc2.weight"]
    else:
        with editing(path) as file:
            group, name = last_norm(file)
            weight = first_weight(group[name])
            del group[name][weight]
            group[name][weight] = np.zeros(47, "f4")
        wanted = ["[47]", "expected [48]", "final_layer_norm.weight", "layer_normalization"]
    message = cli.refuses(*alone(path, home), watch=home, names=path, report=True)
    assert "mismatched (1)" in message and "missing" not in message
    for word in wanted:
        assert word in message, word


@pytest.mark.parametrize("container", CONTAINERS)
def test_a_missing_layer(cli: Cli, copy: Callable[..., Path], home: Path, container: str) -> None:
    path = copy(container)
    if container in ("export", "checkpoint"):
        used = {tensor.name.encode() for source in open_sources(path) for tensor in source.tensors}

        def drop(rows: dict[bytes, bytes]) -> None:
            norm = b"\x12\x04\x12\x02\x08\x30"  # a shape of one dimension, 48
            del rows[next(key for key in rows if key in used and norm in rows[key])]

        rewrite_index(bundle(path)[0], drop)
    else:
        with editing(path) as file:
            group, name = last_norm(file)
            del group[name]
            if "layer_names" in group.attrs:
                names = [n for n in group.attrs["layer_names"] if text(n) != name]
                group.attrs["layer_names"] = names
    message = cli.refuses(*alone(path, home), watch=home, names=path, report=True)
    if container == "export":  # a bare list of variables: where one is missing, none after it has a place
        assert "its 51 tensors are not those of a KerasCV" in message
    else:
        assert "not a complete KerasCV text encoder" in message and "missing (" in message


@pytest.mark.parametrize("container", ["legacy.h5", "model.h5", "weights.weights.h5", "model.keras"])
def test_an_extra_layer(cli: Cli, copy: Callable[..., Path], home: Path, container: str) -> None:
    path = copy(container)
    with editing(path) as file:
        group, _ = last_norm(file)
        if "layer_names" in group.attrs:
            group.attrs["layer_names"] = [*map(text, group.attrs["layer_names"]), "adapter"]
            group.create_group("adapter").attrs["weight_names"] = ["adapter/kernel:0"]
            group["adapter/adapter/kernel:0"] = np.zeros((5, 6), "f4")
        else:
            group["adapter/vars/0"] = np.zeros((5, 6), "f4")
    message = cli.refuses(*alone(path, home), watch=home, names=path, report=True)
    assert "unexpected (1)" in message and "adapter" in message and "[5, 6]" in message
    assert "missing" not in message and "mismatched" not in message


def test_sizes_of_zero(cli: Cli, legacy: Path, home: Path) -> None:
    """They fit each other, as those of a model of an unusual width do."""
    with h5py.File(legacy, "r+") as file:
        for name in datasets(file):
            shape = file[name].shape
            del file[name]
            file.create_dataset(name, data=np.zeros([0] * len(shape), "f4"))
    message = cli.refuses(*alone(legacy, home), watch=home, names=legacy)
    assert "its 52 tensors are not those of a KerasCV Stable Diffusion model" in message


def test_a_layer_numbered_in_the_billions(cli: Cli, copy: Callable[..., Path], home: Path) -> None:
    """Not taken at its word: that many layers would take all memory."""
    path = copy("weights.weights.h5")
    with h5py.File(path, "r+") as file:
        file["layers/clip_encoder_layer_999999999"] = file["layers/clip_encoder_layer"]
    message = cli.refuses(*alone(path, home), watch=home, names=path, report=True)
    assert "unexpected (16)" in message and "clip_encoder_layer_999999999" in message


def test_a_listed_weight_that_is_not_there(cli: Cli, legacy: Path, home: Path) -> None:
    with h5py.File(legacy, "r+") as file:
        group, name = last_norm(file)
        del group[name][first_weight(group[name])]
    message = cli.refuses(*alone(legacy, home), watch=home, names=legacy)
    assert "is listed but not in the file." in message


# Values.


@pytest.mark.parametrize(
    ("value", "dtype", "problem"),
    [
        (np.nan, "float32", "has NaN or infinite values"),
        (np.inf, "float32", "has NaN or infinite values"),
        (-np.inf, "bfloat16", "has NaN or infinite values"),
        (70_000.0, "float16", "reaches 7e+04, too large for float16"),
        (np.float32(3.4e38), "bfloat16", "reaches 3.4e+38, too large for bfloat16"),
    ],
)
def test_values_that_are_not_finite(
    cli: Cli, legacy: Path, home: Path, value: float, dtype: str, problem: str
) -> None:
    with h5py.File(legacy, "r+") as file:
        group, name = last_norm(file)
        group[name][first_weight(group[name])][7] = value
    arguments = (*alone(legacy, home), "--dtype", dtype)
    message = cli.refuses(*arguments, watch=home, report=True)
    assert f"legacy.h5: text_model.final_layer_norm.weight {problem}" in message
    assert "--allow-nonfinite" in message
    cli.converts(*arguments[1:], "--allow-nonfinite")
    if dtype != "bfloat16":
        written = load_file(home / "out" / WEIGHTS)["text_model.final_layer_norm.weight"]
        assert written.dtype == dtype and not np.isfinite(written[7])
        assert np.isfinite(np.delete(written, 7)).all()


# Parts that do not belong together, and options.


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of each part, which nobody changes."""
    found = {}
    wanted = [("unet", 1), ("text_encoder", 1), ("text_encoder", 2), ("vae_decoder", 1), ("vae_encoder", 1)]
    for part, version in wanted:
        folder = tmp_path_factory.mktemp(f"{part}{version}")
        (folder / "kcv2diffusers.json").write_text(json.dumps(CONFIG))
        source = cached("keras3-torch", "forward.py", part, str(version)) / f"{part}.weights.h5"
        found[f"{part}{version}"] = Path(shutil.copy(source, folder / f"{part}{version}.weights.h5"))
    return found


@pytest.mark.slow
def test_a_unet_given_as_text_encoder(cli: Cli, parts: dict[str, Path], home: Path) -> None:
    unet = parts["unet1"]
    message = cli.refuses(
        "convert", "--text-encoder", unet, "--base", "none", "--out", home / "out", watch=home, names=unet
    )
    assert "holds a UNet, not a text encoder." in message and "Leave the option away" in message


def full_size(path: Path, part: str, version: str) -> Path:
    """A file of the genuine shapes whose weights nobody wrote: it has a size but takes no room."""
    with h5py.File(path, "w") as file:
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        links.set_create_intermediate_group(True)
        found = spec(part, version)
        dims = {**found.table.versions[version].dims, "vocabulary": 49408}
        for slot in found.slots(dims.get("repeat", 0)):
            if slot.exists(dims):
                space = h5py.h5s.create_simple(tuple(size.value(dims) for size in slot.shape))
                name = slot.keras_name.encode()
                h5py.h5d.create(file.id, name, h5py.h5t.IEEE_F32LE, space, settings, links)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), [("sd1", "sd2"), ("sd2", "sd1")])
def test_parts_of_sd1_and_sd2(cli: Cli, tmp_path: Path, home: Path, one: str, other: str) -> None:
    unet = full_size(tmp_path / "unet.weights.h5", "unet", one)
    text_encoder = full_size(tmp_path / "text.weights.h5", "text_encoder", other)
    for path, version in ((unet, one), (text_encoder, other)):
        code, out, _ = cli.run("inspect", path)
        assert code == 0 and version.upper() in out and "unusual" not in out
    message = cli.refuses(
        "convert", unet, text_encoder, "--base", "none", "--out", home / "out", watch=home, names=unet
    )
    widths = {"sd1": 768, "sd2": 1024}
    for path, version in ((unet, one), (text_encoder, other)):
        assert f"{path} ({version.upper()}, text embeddings {widths[version]} wide)" in message
    assert "do not belong together" in message and "of the same model" in message


@pytest.mark.slow
@pytest.mark.parametrize("part", ["unet1", "text_encoder1", "vae_decoder1", "vae_encoder1"])
def test_a_part_given_twice(cli: Cli, parts: dict[str, Path], home: Path, part: str) -> None:
    again = Path(shutil.copy(parts[part], home.parent / "again.weights.h5"))
    message = cli.refuses("convert", parts[part], again, "--out", home / "out", watch=home, names=again)
    assert message.startswith("kcv2diffusers: Two ") and "Give only one of them." in message


def test_nothing_given(cli: Cli, home: Path) -> None:
    assert "Nothing to convert" in cli.refuses("convert", "--out", home / "out", watch=home)
    assert "Nothing to convert" in cli.refuses("convert", "--out", home / "out", "--base", "none", watch=home)


@pytest.mark.slow
def test_what_a_pipeline_still_needs(cli: Cli, parts: dict[str, Path], home: Path) -> None:
    out = home / "out"
    message = cli.refuses("convert", parts["text_encoder1"], "--out", out, watch=home)
    assert "A pipeline still needs: UNet, VAE decoder, VAE encoder." in message
    assert "--unet SRC --vae-decoder SRC --vae-encoder SRC" in message and "--base PIPELINE" in message
    told = cli.converts(parts["text_encoder1"], "--out", out, "--base", "none")
    assert "A full pipeline still needs: UNet, VAE decoder, VAE encoder." in told
    assert not (out / "model_index.json").exists()


@pytest.mark.slow
def test_half_a_vae(cli: Cli, parts: dict[str, Path], home: Path) -> None:
    for given, other in (("decoder", "encoder"), ("encoder", "decoder")):
        source = parts[f"vae_{given}1"]
        message = cli.refuses(*alone(source, home), watch=home)
        assert f"the VAE {other} is missing" in message and f"--vae-{other} SRC" in message


@pytest.mark.parametrize("size", ["0", "-64", "63", "500"])
def test_a_bad_image_size(cli: Cli, legacy: Path, home: Path, size: str) -> None:
    message = cli.refuses(*alone(legacy, home), f"--image-size={size}", watch=home)
    assert "give a multiple of 64" in message


@pytest.mark.parametrize("option", ["--dtype=int8", "--image-size=large", "--gelu=relu", "--nonsense"])
def test_bad_options_are_usage_errors(cli: Cli, legacy: Path, home: Path, option: str) -> None:
    code, out, err = cli.run(*alone(legacy, home), option)
    assert (code, out) == (2, "") and option.split("=")[0] in err and "Traceback" not in err
    assert tree(home) == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"text_encoder": 3}',
        '{"text_encoder": ["num_attention_heads"]}',
        '{"text_encoder": {"num_heads": 2}}',
        '{"text_encoder": {"num_attention_heads": "2"}}',
        '{"text_encoder": {"num_attention_heads": 0}}',
        '{"text_encoder": {"num_attention_heads": 7}}',
        "[" * 100_000,
        "\x00\xff",
    ],
)
def test_a_bad_config_file(cli: Cli, legacy: Path, home: Path, text: str) -> None:
    config = legacy.with_name("kcv2diffusers.json")
    config.write_text(text, encoding="latin-1")
    cli.refuses(*alone(legacy, home), watch=home, names=config)


def test_unknown_heads(cli: Cli, legacy: Path, home: Path) -> None:
    legacy.with_name("kcv2diffusers.json").unlink()
    message = cli.refuses(*alone(legacy, home), watch=home, names=legacy)
    assert '{"text_encoder": {"num_attention_heads": N}}' in message


# Base pipelines.


@pytest.fixture
def base(cli: Cli, copy: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with the text encoder of a pipeline."""
    cli.converts(copy("weights.weights.h5"), "--base", "none", "--out", tmp_path / "base")
    return tmp_path / "base"


@pytest.mark.parametrize("size", [0, 7, 8, 100, 20_000, -1])
def test_a_base_cut_short(cli: Cli, base: Path, home: Path, size: int) -> None:
    weights = base / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:size])
    message = cli.refuses("to-keras", base, "--out", home / "out", watch=home, names=weights)
    assert "damaged .safetensors file" in message


@pytest.mark.parametrize(
    "damage", ["other names", "shape", "missing", "no config", "bad config", "no weights"]
)
def test_a_base_that_does_not_fit(cli: Cli, base: Path, home: Path, damage: str) -> None:
    weights = base / WEIGHTS
    tensors = load_file(weights)
    named = weights
    if damage == "other names":
        tensors = {f"other.{name}": values for name, values in tensors.items()}
    elif damage == "shape":
        tensors["text_model.final_layer_norm.bias"] = np.zeros(5, "f4")
    elif damage == "missing":
        del tensors["text_model.final_layer_norm.bias"]
    save_file(tensors, weights)
    if "config" in damage:
        named = weights.with_name("config.json")
        named.unlink() if damage == "no config" else named.write_text("[1, 2")
    elif damage == "no weights":
        weights.unlink()
        named = weights.parent
    cli.refuses("to-keras", base, "--out", home / "out", watch=home, names=named, report=True)


@pytest.mark.parametrize("command", ["to-keras", "convert"])
def test_a_base_that_is_no_pipeline(cli: Cli, legacy: Path, home: Path, command: str) -> None:
    folder = home.parent / "empty"
    folder.mkdir()
    given = ("to-keras", folder) if command == "to-keras" else ("convert", legacy, "--base", folder)
    cli.refuses(*given, "--out", home / "out", watch=home, names=folder)
    cli.refuses(*given[:-1], folder / "nowhere", "--out", home / "out", watch=home, names=folder / "nowhere")


# Where the output goes.


@pytest.mark.parametrize("overwrite", [(), ("--overwrite",)])
@pytest.mark.parametrize(
    "make",
    ["file", "folder", "other pipeline", "link", "dangling link", "link to empty", "keras checkpoints"],
)
def test_a_target_that_exists(
    cli: Cli, legacy: Path, home: Path, overwrite: tuple[str, ...], make: str
) -> None:
    out = home / "out"
    elsewhere = home / "elsewhere"
    if make == "file":
        out.write_text("precious")
    elif "link" in make:
        if make != "dangling link":
            elsewhere.mkdir()
        if make == "link":
            (elsewhere / "unet").mkdir()
        out.symlink_to(elsewhere)
    else:
        out.mkdir()
        (out / "notes.txt").write_text("precious")
    if make == "other pipeline":
        (out / "model_index.json").write_text("{}")
    if make == "keras checkpoints":
        (out / "notes.txt").rename(out / "unet.h5")
    message = cli.refuses(*alone(legacy, home), *overwrite, watch=home, names=out)
    assert ("exists already." if not overwrite else "is not an earlier output") in message
    assert "another --out" in message


def test_an_earlier_output(cli: Cli, legacy: Path, home: Path) -> None:
    cli.converts(*alone(legacy, home)[1:])
    (home / "out" / "text_encoder" / "config.json").write_text("old")
    assert "exists already" in cli.refuses(*alone(legacy, home), watch=home, names=home / "out")
    data = legacy.read_bytes()
    legacy.write_bytes(data[:-1])
    cli.refuses(*alone(legacy, home), "--overwrite", watch=home, names=legacy)
    legacy.write_bytes(data)
    cli.converts(*alone(legacy, home)[1:], "--overwrite")
    assert (home / "out" / "text_encoder" / "config.json").read_text() != "old"
    assert [path.name for path in home.iterdir()] == ["out"]


def test_keras_files_that_are_not_ours_are_kept(cli: Cli, base: Path, home: Path) -> None:
    out = home / "out"
    out.mkdir()
    (out / "my-dog.h5").write_text("precious")
    message = cli.refuses("to-keras", base, "--out", out, "--overwrite", watch=home, names=out)
    assert "is not an earlier output" in message


def test_a_source_inside_the_target(cli: Cli, legacy: Path, home: Path) -> None:
    inside = home / "out" / "unet" / "weights.h5"
    inside.parent.mkdir(parents=True)
    legacy.rename(inside)
    (inside.parent / "kcv2diffusers.json").write_text(json.dumps(CONFIG))
    message = cli.refuses(*alone(inside, home), "--overwrite", watch=home, names=inside)
    assert "which would be replaced" in message


def test_parents_are_made_and_taken_away(cli: Cli, legacy: Path, home: Path) -> None:
    deep = home / "a" / "b" / "out"
    with h5py.File(legacy, "r+") as file:
        group, name = last_norm(file)
        group[name][first_weight(group[name])][0] = np.nan
    arguments = ("convert", legacy, "--base", "none", "--out", deep)
    cli.refuses(*arguments, watch=home, report=True)  # found while writing
    cli.converts(*arguments[1:], "--allow-nonfinite")
    assert (deep / WEIGHTS).exists()


@pytest.mark.parametrize("where", ["a file", "a name too long"])
def test_parents_that_cannot_be_made(cli: Cli, legacy: Path, home: Path, where: str) -> None:
    (home / "file").write_text("precious")
    parent = home / ("file" if where == "a file" else "x" * 300)
    message = cli.refuses("convert", legacy, "--base", "none", "--out", parent / "out", watch=home)
    assert str(parent) in message and "cannot be written" in message


# Permissions and space.


@contextmanager
def unprivileged() -> Iterator[None]:
    """Root may read and write everything; nobody may not."""
    if os.geteuid():
        yield
        return
    os.seteuid(65534)
    try:
        yield
    finally:
        os.seteuid(0)


@pytest.fixture
def public() -> Iterator[Path]:
    """A folder that nobody can reach, which pytest's are not."""
    folder = Path(tempfile.mkdtemp(dir="/tmp"))
    folder.chmod(0o755)
    yield folder
    shutil.rmtree(folder)


@pytest.mark.parametrize("closed", ["source", "source's folder", "parent", "shard", "data"])
def test_no_permission(cli: Cli, copy: Callable[..., Path], home: Path, public: Path, closed: str) -> None:
    container = {"shard": "sharded.weights.json", "data": "checkpoint"}.get(closed, "legacy.h5")
    cli.converts(*alone(copy(container), home)[1:])  # and everything is imported
    original = home.parent / f"text_encoder1-{container}"
    folder = Path(shutil.copytree(original, public / "source"))
    writable = public / "writable"
    writable.mkdir()
    writable.chmod(0o777)
    denied = {
        "source": folder / container,
        "source's folder": folder,
        "parent": public,
        "shard": folder / "sharded_00001.weights.h5",
        "data": folder / "checkpoint" / "ckpt.data-00000-of-00001",
    }[closed]
    if closed != "parent":
        denied.chmod(0)
    else:
        denied.chmod(0o555)
    out = public / "out" if closed == "parent" else writable / "out"
    with unprivileged():
        code, told, message = cli.run("convert", folder / container, "--base", "none", "--out", out)
    public.chmod(0o755)
    folder.chmod(0o755)
    assert (code, told) == (1, "") and len(message.splitlines()) == 2
    assert str(denied) in message and "ermission" in message and "Traceback" not in message
    assert tree(writable) == {} and not out.exists()


@contextmanager
def mounted(folder: Path, options: str) -> Iterator[Path]:
    """A small file system of its own; the test is skipped where it may not be mounted."""
    folder.mkdir(exist_ok=True)
    command = ["mount", "-t", "tmpfs", "-o", options, "kcv2diffusers", str(folder)]
    if shutil.which("mount") is None or subprocess.run(command, capture_output=True, check=False).returncode:
        pytest.skip("may not mount a file system here")
    try:
        yield folder
    finally:
        subprocess.run(["umount", str(folder)], check=True)


def test_a_disk_that_is_too_small(cli: Cli, legacy: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=5m") as disk:
        message = cli.refuses(*alone(legacy, disk), watch=disk, names=disk)
        assert "GB are needed and" in message and "choose another --out" in message


@pytest.mark.parametrize("command", ["convert", "to-keras h5", "to-keras weights.h5"])
@pytest.mark.parametrize("size", ["64k", "256k"])
def test_a_disk_that_fills_up(
    cli: Cli,
    legacy: Path,
    base: Path,
    tmp_path: Path,
    monkeypatch: pytest.MonkeyPatch,
    command: str,
    size: str,
) -> None:
    """Others may take the space that was free at the start."""
    usage = shutil._ntuple_diskusage(1 << 40, 0, 1 << 40)  # type: ignore[attr-defined]
    monkeypatch.setattr(shutil, "disk_usage", lambda path: usage)
    with mounted(tmp_path / "small", f"size={size}") as disk:
        arguments = alone(legacy, disk)
        if command != "convert":
            arguments = ("to-keras", base, "--format", command.split()[1], "--out", disk / "out")
        message = cli.refuses(*arguments, watch=disk, names=disk)
        assert "no space left while writing; nothing was kept." in message


def test_no_file_can_be_made(cli: Cli, legacy: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=100m,nr_inodes=3") as disk:
        assert "no space left" in cli.refuses(*alone(legacy, disk), watch=disk, names=disk)


def test_a_read_only_disk(cli: Cli, legacy: Path, tmp_path: Path) -> None:
    with mounted(tmp_path / "small", "size=100m,ro") as disk:
        message = cli.refuses(*alone(legacy, disk), watch=disk, names=disk)
        assert "Read-only file system" in message


def test_no_space_to_unpack(
    cli: Cli, copy: Callable[..., Path], home: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    path = copy("model.keras")
    repack(path, {}, zipfile.ZIP_DEFLATED)
    with mounted(home.parent / "small", "size=64k") as disk:
        monkeypatch.setattr(tempfile, "tempdir", str(disk))
        message = cli.refuses(*alone(path, home), watch=home, names=path)
        assert f"cannot be unpacked in {disk}" in message and "TMPDIR" in message
        assert tree(disk) == {}


# The process itself.

SLOW = """
import sys, time
from kcv2diffusers.targets import transfer
from kcv2diffusers.__main__ import start
do = transfer.Worker.do
def slowly(self, job):
    time.sleep(0.3)
    return do(self, job)
transfer.Worker.do = slowly
start()
"""


def start(code: tuple[str, ...], *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped(
    cli: Cli, legacy: Path, home: Path, number: signal.Signals, existing: bool
) -> None:
    """Nothing is at the target, or what was there before."""
    if existing:
        cli.converts(*alone(legacy, home)[1:])
    before = tree(home)
    process = start(("-c", SLOW), *alone(legacy, home), "--overwrite")
    deadline = time.monotonic() + 60
    while not list(home.glob(".out.tmp-*/text_encoder/*.safetensors")):
        assert process.poll() is None and time.monotonic() < deadline, process.communicate()
        time.sleep(0.01)
    process.send_signal(number)
    out, err = process.communicate(timeout=60)  # also the end of all children: they hold the pipes
    left = {name: entry for name, entry in tree(home).items() if not name.startswith(".out.tmp-")}
    assert left == before
    assert out == "" and "Traceback" not in err
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert list(home.glob(".out.tmp-*"))  # nobody could remove it; the next run does
        cli.converts(*alone(legacy, home)[1:], "--overwrite")
    else:
        assert process.returncode == 128 + number
        assert err == "kcv2diffusers: interrupted; nothing was written.\n"
    assert not list(home.glob(".out.tmp-*"))


@pytest.mark.parametrize("damage", ["cut", "loop"])
def test_as_a_user_sees_it(legacy: Path, home: Path, damage: str) -> None:
    """The installed program's own process: messages on stderr, exit code, nothing else."""
    if damage == "cut":
        legacy.write_bytes(legacy.read_bytes()[:100_000])
    else:
        with h5py.File(legacy, "r+") as file:
            file["again"] = file["/"]
    before = tree(home.parent)
    process = start(("-m", "kcv2diffusers"), *alone(legacy, home))
    out, err = process.communicate(timeout=60)
    assert (process.returncode, out) == (1, "")
    assert err.startswith(f"kcv2diffusers: {legacy}: ") or err.startswith(f"kcv2diffusers: {legacy}")
    assert len(err.splitlines()) == 2
    assert tree(home.parent) == before


def test_a_reader_that_goes_away(legacy: Path, home: Path) -> None:
    """As in `kcv2diffusers inspect FILE | head -0`."""
    process = start(("-m", "kcv2diffusers"), "inspect", legacy)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=60)
    process.stderr.close()
    assert "Traceback" not in err
