"""Tensors that are missing, too many, of another shape or not finite are refused."""

from __future__ import annotations

import struct
from collections.abc import Callable
from pathlib import Path

import google_crc32c
import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.bad_input import (
    CONTAINERS,
    WEIGHTS,
    Cli,
    alone,
    bundle,
    datasets,
    editing,
    first_weight,
    last_norm,
    text,
)

from kcv2diffusers.sources import tensor_bundle
from kcv2diffusers.sources.open import open_sources

pytest_plugins = ["support.bad_input"]


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
        assert "its 51 tensors are not those of a Keras" in message
    else:
        assert "not a complete Keras text encoder" in message and "missing (" in message


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
    assert "its 52 tensors are not those of a Keras Stable Diffusion model" in message


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
