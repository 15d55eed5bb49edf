"""Damaged, foreign and hostile HDF5 files are refused; unusual ones that mean the same are read."""

from __future__ import annotations

import os
import struct
import zlib
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.bad_input import WEIGHTS, Cli, alone, editing, first_matrix

pytest_plugins = ["support.bad_input"]


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
    assert "its 3 tensors are not those of a Keras Stable Diffusion model" in message


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


@pytest.mark.slow
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
