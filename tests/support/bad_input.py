"""What the tests of bad input share: the command line in this process, and checkpoints to damage.

A module takes the fixtures by `pytest_plugins = ["support.bad_input"]`.
"""

from __future__ import annotations

import json
import shutil
import signal
import sys
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path

import h5py
import pytest

import kcv2diffusers
from kcv2diffusers.cli import main, progress
from support.checkpoints import Checkpoints

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
LAST_NORM = "/layers/layer_normalization/vars"


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


def repack(path: Path, changes: dict[str, bytes | None], level: int = zipfile.ZIP_STORED) -> None:
    with zipfile.ZipFile(path) as archive:
        members = {name: archive.read(name) for name in archive.namelist()}
    with zipfile.ZipFile(path, "w", level) as archive:
        for name, data in (members | changes).items():
            if data is not None:
                archive.writestr(name, data)


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


def bundle(path: Path) -> tuple[Path, Path]:
    """Index and data of a SavedModel or checkpoint folder."""
    [index] = path.rglob("*.index")
    return index, index.with_suffix(".data-00000-of-00001")


@pytest.fixture
def base(cli: Cli, copy: Callable[..., Path], tmp_path: Path) -> Path:
    """A folder with the text encoder of a pipeline."""
    cli.converts(copy("weights.weights.h5"), "--base", "none", "--out", tmp_path / "base")
    return tmp_path / "base"


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
