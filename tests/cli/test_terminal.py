"""Names that others have chosen, in files and on servers, never control the terminal, nor make lines."""

from __future__ import annotations

import json
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.checkpoints import small_base
from support.hub.hub import Hub

from kcv2diffusers.cli import main
from kcv2diffusers.cli.progress import say, stages
from kcv2diffusers.errors import SourceError, plain

pytest_plugins = ["support.hub.fixtures"]

EVIL = "\x1b[2J\nkcv2diffusers: all is well\u202e\x07\x9b"
SHOWN = "\\x1b[2J\\nkcv2diffusers: all is well\\u202e\\x07\\x9b"

Run = Callable[..., str]


def harmless(text: str) -> bool:
    return text.replace("\n", "").isprintable() and "\nkcv2diffusers: all" not in text


@pytest.fixture
def run(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> Run:
    """All that a command prints; that is harmless."""

    def call(*arguments: str | Path) -> str:
        monkeypatch.setattr(sys, "argv", ["kcv2diffusers", *map(str, arguments)])
        with pytest.raises(SystemExit):
            main()
        out, err = capsys.readouterr()
        assert harmless(out + err) and "Traceback" not in err, (out, err)
        return out + err

    return call


@pytest.fixture
def weights(tmp_path: Path) -> Path:
    """A text encoder that may be changed, in a file and a folder of its own."""
    folder = tmp_path / "weights"
    folder.mkdir()
    for name in ("text_encoder.weights.h5", "kcv2diffusers.json"):
        shutil.copy(small_base() / name, folder)
    return folder / "text_encoder.weights.h5"


@pytest.mark.parametrize("place", [EVIL, f"optimizer/{EVIL}"])
def test_a_group_of_a_checkpoint(run: Run, weights: Path, tmp_path: Path, place: str) -> None:
    """A tensor of no part, in a report, and optimizer state, which is only counted."""
    with h5py.File(weights, "r+") as file:
        file[f"{place}/vars/0"] = np.ones((3, 5), "float32")
    said = run("inspect", weights)
    assert "text encoder" in said and (SHOWN in said) == (place == EVIL)
    said = run("convert", weights, "--out", tmp_path / "out", "--base", "none", "--tokenizer", small_base())
    assert (SHOWN in said) == (place == EVIL)
    printed = run("inspect", weights, "--json")
    assert printed.isascii() and json.loads(printed)[0]["part"] == "text_encoder"


def test_what_is_refused_in_a_checkpoint(run: Run, weights: Path, tmp_path: Path) -> None:
    with h5py.File(weights, "r+") as file:
        file[EVIL] = h5py.SoftLink("/elsewhere")
    for arguments in (
        ["inspect", weights],
        ["convert", weights, "--out", tmp_path / "out", "--base", "none"],
    ):
        said = run(*arguments)
        assert SHOWN in said and len(said.splitlines()) == 2


def test_the_name_of_a_file(run: Run, weights: Path, tmp_path: Path) -> None:
    evil = weights.with_name(f"{EVIL}.weights.h5")
    weights.rename(evil)
    assert SHOWN in run("inspect", evil.parent)
    said = run(
        "convert", evil.parent, "--out", tmp_path / "out", "--base", "none", "--tokenizer", small_base()
    )
    assert f"{SHOWN}.weights.h5 (" in said and "written to" in said
    evil.write_bytes(b"")
    assert SHOWN in run("inspect", evil.parent)


def test_photos(run: Run, tmp_path: Path) -> None:
    photos = tmp_path / "photos"
    photos.mkdir()
    (photos / f"{EVIL}.jpg").write_bytes(b"")
    (photos / f"1_{EVIL}").mkdir()
    options = ["--instance-prompt", "a sks dog", "--base", "tiny", "--out", tmp_path / "out"]
    said = run("dreambooth", "--instance-images", photos, *options)
    assert f"{SHOWN}.jpg (not a picture)" in said and len(said.splitlines()) == 2


def test_options_of_a_file(run: Run, tmp_path: Path) -> None:
    (tmp_path / "run.toml").write_text(f"{json.dumps(EVIL)} = 3", encoding="utf-8")
    assert f"unknown options {SHOWN}" in run("dreambooth", "--config", tmp_path / "run.toml")


def test_what_the_hub_says(hub: Hub, tmp_path: Path) -> None:
    hub.fail({"path": "/api/models/alice/evil", "status": 400, "message": EVIL})
    for command in (
        ["inspect", "hf://alice/evil"],
        ["convert", "hf://alice/evil", "--out", tmp_path / "out"],
    ):
        said = hub.refuses(*command)
        assert harmless(said) and "\\x1b[2J kcv2diffusers: all is well\\u202e" in said


def test_names_in_a_repository(hub: Hub, weights: Path) -> None:
    shutil.copy(weights, weights.with_name(f"{EVIL} text encoder.weights.h5"))
    hub.seed("alice/names", weights.parent)
    said = hub.refuses("inspect", "hf://alice/names")
    assert harmless(said) and "text_encoder.weights.h5" in said


def test_what_is_printed(capsys: pytest.CaptureFixture[str]) -> None:
    say(f"a note\nof {EVIL}")
    with stages() as progress:
        progress("Training", 1, 1, EVIL)
    out, err = capsys.readouterr()
    assert out.startswith("a note\nof \\x1b") and "\x1b" not in out + err and "\u202e" not in out + err


def test_an_error_is_two_lines() -> None:
    error = SourceError(Path(EVIL), f"holds {EVIL}.", f"Remove {EVIL}.")
    assert str(error).split("\n") == [f"{SHOWN}: holds {SHOWN}.", f"Remove {SHOWN}."]
    assert plain("Fähre 東京 \U0001f436") == "Fähre 東京 \U0001f436"
    assert plain("\udc80") == "\\udc80"  # a name that is not UTF-8; printing it would fail


def test_the_command_line_prints_in_one_way() -> None:
    """By `say`, and by `print_json`, which escapes."""
    folder = Path(sys.modules["kcv2diffusers.cli"].__file__ or "").parent
    lines = [line.strip() for path in folder.glob("*.py") for line in path.read_text().splitlines()]
    assert sorted(line for line in lines if "print(" in line) == [
        "print(json.dumps(data, indent=2, default=str))",
        'print(plain(text, keep="\\n"), file=file, flush=file is not None)',
    ]
