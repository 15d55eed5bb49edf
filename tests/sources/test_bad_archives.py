"""Damaged and hostile .keras archives are refused; code in a checkpoint is never run."""

from __future__ import annotations

import base64
import json
import marshal
import pickle
import struct
import zipfile
from collections.abc import Callable
from pathlib import Path

import h5py
import pytest
from support.bad_input import WEIGHTS, Cli, alone, repack

pytest_plugins = ["support.bad_input"]


@pytest.mark.parametrize("level", [zipfile.ZIP_STORED, zipfile.ZIP_DEFLATED, zipfile.ZIP_LZMA])
def test_stored_and_deflated_archives_work(
    cli: Cli, copy: Callable[..., Path], home: Path, intact: dict[str, bytes], level: int
) -> None:
    path = copy("model.keras")
    repack(path, {}, level)
    cli.converts(*alone(path, home)[1:])
    assert (home / "out" / WEIGHTS).read_bytes() == intact["keras3"]
    assert list(cli.spool.iterdir()) == []


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
