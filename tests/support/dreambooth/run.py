"""The command `dreambooth` as tests run it: in a process of its own, or in a fork of one that is prepared."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

from support.servers import server

PROMPTS = ["--instance-prompt", "a sks car", "--class-prompt", "a car"]


def arguments(base: Path, photos: Path, out: Path, *options: str | Path) -> list[str]:
    given = ["--instance-images", photos, "--base", base, "--out", out, *options]
    return ["dreambooth", *map(str, given)]


def command(*given: str | Path) -> list[str]:
    return [sys.executable, "-m", "kcv2diffusers", *arguments(*given)]


def environment(backend: str = "torch") -> dict[str, str]:
    return {**os.environ, "KERAS_BACKEND": backend, "OMP_NUM_THREADS": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}


def run(base: Path, photos: Path, out: Path, *options: str | Path) -> subprocess.CompletedProcess[str]:
    return in_fork(base, *arguments(base, photos, out, *options))


def in_fork(base: Path, *given: str | Path) -> subprocess.CompletedProcess[str]:
    """The command line in a fork of a process that has the base's models already (forks.py)."""
    forks = server("forks", [sys.executable, Path(__file__).with_name("forks.py")], environment())
    return subprocess.CompletedProcess(given, *forks.ask(base, *given))
