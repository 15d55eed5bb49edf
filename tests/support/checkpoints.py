"""Genuine KerasCV checkpoints and a small base, made once per version of the code that makes them.

`checkpoint(stack, ...)` returns the folder of one part with every container that stack writes and
`expected.json`. The stacks are those of support/kerascv/stack.py; the sprint's needs an interpreter with
TensorFlow 2.12, which `make test` installs as .venv-sprint.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import sys
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import pytest

from support.servers import server

ROOT = Path(__file__).parents[2]
MAKER = Path(__file__).parent / "kerascv"
CACHE = ROOT / ".cache" / "tests"
SPRINT_PYTHON = Path(os.environ.get("KCV_SPRINT_PYTHON", ROOT / ".venv-sprint" / "bin" / "python"))

Checkpoints = Callable[..., Path]


def _hash(*files: Path) -> str:
    digest = hashlib.sha256()
    for file in files:
        digest.update(file.read_bytes())
    return digest.hexdigest()[:12]


def kept(label: str, makers: Iterable[Path], make: Callable[[Path], Any]) -> Path:
    """The folder that `make` filled, now or earlier from the same files `makers`; it appears whole.

    Test processes that need the same one wait for the first to make it.
    """
    folder = CACHE / _hash(*sorted(makers)) / label
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{folder.name}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            temporary = folder.with_name(f".{folder.name}.part")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            make(temporary)
            temporary.rename(folder)
    return folder


def run_script(stack: str, script: str, *arguments: str | Path) -> str:
    """What a script of support/kerascv prints, run in the interpreter and Keras of a stack."""
    if stack == "sprint" and not SPRINT_PYTHON.exists():
        pytest.skip(f"needs keras-cv 0.4.2 on TensorFlow 2.12 at {SPRINT_PYTHON} (make venv-sprint)")
    python = SPRINT_PYTHON if stack == "sprint" else sys.executable
    legacy = {"TF_USE_LEGACY_KERAS": "1"} if stack == "keras2" else {}
    backend = "torch" if stack == "keras3-torch" else "tensorflow"
    environment = {**os.environ, "KERAS_BACKEND": backend, **legacy}
    serving = server(stack, [python, MAKER / "serve.py"], environment)
    done, printed = serving.ask(script.removesuffix(".py"), *arguments)
    if not done:
        raise RuntimeError(f"{stack} {script} {arguments}:\n{printed[-3000:]}")
    return str(printed)


def cached(stack: str, script: str, *arguments: str) -> Path:
    """The folder that `script FOLDER *arguments` fills in the process of a stack."""
    label = "_".join([Path(script).stem, *(Path(argument).name for argument in arguments)])
    versions = ROOT / "constraints" / ("sprint.txt" if stack == "sprint" else "dev.txt")
    makers = [*(MAKER / name for name in ("stack.py", "expected.py", script)), versions]
    return kept(f"{stack}/{label}", makers, lambda folder: run_script(stack, script, folder, *arguments))


def small_base() -> Path:
    """The checkpoints of support/models/small.py."""
    from support.models.small import write_base

    makers = [
        Path(__file__).parent / "models" / "small.py",
        *(ROOT / "kcv2diffusers" / "models").glob("*.py"),
    ]
    return kept("base", makers, write_base)


def checkpoint(stack: str, part: str, version: int = 1, dtype: str = "float32", *containers: str) -> Path:
    """The folder of one small part; `containers` limits what is written (all by default)."""
    wanted = ["--containers", *containers] if containers else []
    chosen = ["--parts", part, "--versions", str(version), "--dtypes", dtype, *wanted]
    return cached(stack, "make_checkpoints.py", *chosen) / f"{part}-sd{version}-{dtype}"
