"""Which backend Keras gets where the user sets one, and where not."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest

from kcv2diffusers import backend
from kcv2diffusers.errors import Error


@pytest.fixture
def choose(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Any:
    """Choose with some packages installed and the environment's variable set; the backend, what was said."""

    def run(installed: str, variable: str | None = None, asked: str = "auto") -> tuple[str | None, list[str]]:
        packages = {"keras", *installed.split()}
        monkeypatch.delitem(sys.modules, "keras", raising=False)
        monkeypatch.setattr(backend, "_installed", packages.__contains__)
        monkeypatch.setenv("KERAS_HOME", str(tmp_path))
        monkeypatch.setenv(backend.VARIABLE, variable or "")
        said: list[str] = []
        backend.choose_backend(said.append, asked)
        return os.environ.get(backend.VARIABLE), said

    return run


@pytest.mark.parametrize(
    ("installed", "chosen"),
    [("torch jax tensorflow", "torch"), ("jax tensorflow", "jax"), ("tensorflow", "tensorflow")],
)
def test_the_best_that_is_installed(installed: str, chosen: str, choose: Any) -> None:
    name, said = choose(installed)
    assert name == chosen
    assert len(said) == 1 and chosen in said[0] and "\n" not in said[0]


def test_what_is_set_is_taken_and_nothing_said(choose: Any) -> None:
    assert choose("torch jax tensorflow", "torch") == ("torch", [])


@pytest.mark.parametrize("variable", [None, "torch", "jax"])
def test_an_option_goes_before_what_is_set(choose: Any, variable: str | None) -> None:
    name, said = choose("torch jax", variable, "jax")
    assert name == "jax"
    assert len(said) == (variable == "torch") and all("jax" in line and "torch" in line for line in said)
    with pytest.raises(Error, match="--backend tensorflow: tensorflow is not installed"):
        choose("torch jax", variable, "tensorflow")


def test_keras_own_config(choose: Any, tmp_path: Path) -> None:
    (tmp_path / "keras.json").write_text(json.dumps({"backend": "jax"}))
    assert choose("torch jax")[0] == "jax"
    assert choose("torch")[0] == "torch"  # it is not installed
    (tmp_path / "keras.json").write_text(json.dumps({"backend": "tensorflow"}))  # as Keras writes it
    assert choose("tensorflow torch")[0] == "torch"
    for text in ("{", "[]", '{"backend": 3}'):
        (tmp_path / "keras.json").write_text(text)
        assert choose("tensorflow torch")[0] == "torch"


@pytest.mark.parametrize(
    ("installed", "variable", "message"),
    [
        ("torch", "jax", r"jax is not installed\.\n.*set KERAS_BACKEND to torch"),
        ("torch", "pytorch", r"not a Keras backend\.\n.*Did you mean torch\?"),
        ("torch", "tensorfow", r"Did you mean tensorflow\?"),
        ("", None, "No backend of Keras is installed"),
    ],
)
def test_refused(installed: str, variable: str | None, message: str, choose: Any) -> None:
    with pytest.raises(Error, match=message) as refused:
        choose(installed, variable)
    assert len(str(refused.value).split("\n")) == 2


@pytest.mark.parametrize(
    "command", ["generate --prompt cat", "dreambooth --instance-images missing --instance-prompt cat"]
)
def test_a_typo_on_the_command_line(command: str, tmp_path: Path) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "kcv2diffusers",
            *command.split(),
            "--base",
            "tiny",
            "--out",
            tmp_path / "o",
        ],
        env={**os.environ, "KERAS_BACKEND": "tensorfow"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert (done.returncode, done.stdout) == (1, "")
    assert "KERAS_BACKEND=tensorfow" in done.stderr and len(done.stderr.splitlines()) == 2
