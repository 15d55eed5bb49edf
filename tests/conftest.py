"""Genuine KerasCV checkpoints for the tests, made once per version of the code that makes them.

`checkpoints(stack, ...)` returns the folder of one part with every container that stack writes and
`expected.json`. The three stacks are those of tests/kerascv/stack.py; the sprint's needs an interpreter
with TensorFlow 2.12, which `make test` installs as .venv-sprint.
"""

from __future__ import annotations

import fcntl
import hashlib
import os
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
MAKER = Path(__file__).parent / "kerascv"
CACHE = ROOT / ".cache" / "checkpoints"
SPRINT_PYTHON = Path(os.environ.get("KCV_SPRINT_PYTHON", ROOT / ".venv-sprint" / "bin" / "python"))

Checkpoints = Callable[..., Path]


def _made_by(script: str) -> str:
    """A name for what the script and the two modules it uses would make."""
    digest = hashlib.sha256()
    for name in ("stack.py", "expected.py", script):
        digest.update((MAKER / name).read_bytes())
    return digest.hexdigest()[:12]


def run_script(stack: str, script: str, *arguments: str | Path) -> str:
    """What a script of tests/kerascv prints, run in the interpreter and Keras of a stack."""
    if stack == "sprint" and not SPRINT_PYTHON.exists():
        pytest.skip(f"needs keras-cv 0.4.2 on TensorFlow 2.12 at {SPRINT_PYTHON} (make venv-sprint)")
    python = SPRINT_PYTHON if stack == "sprint" else sys.executable
    environment = {**os.environ, **({"TF_USE_LEGACY_KERAS": "1"} if stack == "keras2" else {})}
    done = subprocess.run(
        [python, MAKER / script, *arguments],
        env=environment,
        capture_output=True,
        text=True,
        check=False,
    )
    if done.returncode:
        raise RuntimeError(f"{stack} {script} {arguments}:\n{done.stderr[-3000:]}")
    return done.stdout


def cached(stack: str, script: str, *arguments: str) -> Path:
    """The folder that `script FOLDER *arguments` filled, now or earlier; it appears whole.

    Test processes that need the same one wait for the first to make it.
    """
    label = "_".join([Path(script).stem, *(Path(argument).name for argument in arguments)])
    folder = CACHE / _made_by(script) / stack / label
    folder.parent.mkdir(parents=True, exist_ok=True)
    with folder.with_name(f".{label}.lock").open("w") as lock:
        fcntl.flock(lock, fcntl.LOCK_EX)
        if not folder.exists():
            temporary = folder.with_name(f".{label}.part")
            shutil.rmtree(temporary, ignore_errors=True)
            temporary.mkdir()
            run_script(stack, script, temporary, *arguments)
            temporary.rename(folder)
    return folder


def checkpoint(stack: str, part: str, version: int = 1, dtype: str = "float32", *containers: str) -> Path:
    """The folder of one small part; `containers` limits what is written (all by default)."""
    wanted = ["--containers", *containers] if containers else []
    chosen = ["--parts", part, "--versions", str(version), "--dtypes", dtype, *wanted]
    return cached(stack, "make_checkpoints.py", *chosen) / f"{part}-sd{version}-{dtype}"


@pytest.fixture(scope="session")
def checkpoints() -> Checkpoints:
    return checkpoint


@pytest.fixture(scope="session")
def bpe() -> Path:
    """CLIP's genuine vocabulary, which the open_clip_torch package carries."""
    from importlib.util import find_spec

    spec = find_spec("open_clip")
    assert spec is not None and spec.origin is not None
    return Path(spec.origin).parent / "bpe_simple_vocab_16e6.txt.gz"
