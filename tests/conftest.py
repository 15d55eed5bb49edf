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
import sys
from collections.abc import Callable, Iterable, Iterator
from pathlib import Path
from typing import Any

import pytest
from servers import server, stop_all

ROOT = Path(__file__).parent.parent
MAKER = Path(__file__).parent / "kerascv"
CACHE = ROOT / ".cache" / "tests"
SPRINT_PYTHON = Path(os.environ.get("KCV_SPRINT_PYTHON", ROOT / ".venv-sprint" / "bin" / "python"))

# In the processes of the tests themselves Keras runs on PyTorch, where nothing is compiled: TensorFlow takes
# five times as long. What is said of other backends is tested in processes of their own.
os.environ.setdefault("KERAS_BACKEND", "torch")

# Each process of the tests, and its children, has its share of the cores: where there are more threads than
# cores, those of PyTorch wait for each other, and do so busily.
_SHARE = (os.cpu_count() or 1) // int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
os.environ.setdefault("OMP_NUM_THREADS", str(max(1, _SHARE)))

Checkpoints = Callable[..., Path]


# One worker runs all tests of a file, and one worker all files that use KerasCV's processes most, so that
# each of those is started once and builds a UNet once. The files that take longest come first; otherwise one
# worker would wait for the other at the end.
KERASCV = (
    "test_exactness.py",
    "test_fuzz.py",
    "test_several_models.py",
    "test_to_keras.py",
    "test_bad_input.py",
    "test_hub_download.py",
    "test_pipeline.py",
    "test_portable.py",
    "test_not_weights.py",
    "test_imports.py",
)
FIRST = (
    "test_run.py",
    "test_training_backends.py",
    "test_parity.py",
    "test_verification.py",
    "test_kerascv_weights.py",
    "test_notebooks.py",
    "test_verify_command.py",
    "test_hub_push.py",
    "test_tiny.py",
    "test_sampler.py",
    "test_on_tensorflow.py",
    "test_models.py",
    "test_backends.py",
    "test_base.py",
)


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate([*KERASCV, *FIRST])}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile` with the files of KERASCV as one."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "kerascv" if Path(file).name in KERASCV else file

    return Files(config, log)


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
    """What a script of tests/kerascv prints, run in the interpreter and Keras of a stack."""
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


@pytest.fixture(scope="session", autouse=True)
def _servers_end() -> Iterator[None]:
    yield
    stop_all()


def cached(stack: str, script: str, *arguments: str) -> Path:
    """The folder that `script FOLDER *arguments` fills in the process of a stack."""
    label = "_".join([Path(script).stem, *(Path(argument).name for argument in arguments)])
    versions = ROOT / "constraints" / ("sprint.txt" if stack == "sprint" else "dev.txt")
    makers = [*(MAKER / name for name in ("stack.py", "expected.py", script)), versions]
    return kept(f"{stack}/{label}", makers, lambda folder: run_script(stack, script, folder, *arguments))


def small_base() -> Path:
    """The checkpoints of tests/models/small.py."""
    from small import write_base

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
