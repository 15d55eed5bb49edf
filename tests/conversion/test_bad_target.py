"""An output that cannot be written is refused and leaves nothing."""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.bad_input import CONFIG, WEIGHTS, Cli, alone, first_weight, last_norm, repack, tree

pytest_plugins = ["support.bad_input"]


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
