"""Order of the test files, the share of a worker in the machine, and fixtures that all tests have."""

from __future__ import annotations

import gc
import os
import random
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

pytest.register_assert_rewrite("support")

from support.checkpoints import Checkpoints, checkpoint  # noqa: E402
from support.servers import stop_all  # noqa: E402

from kcv2diffusers.system.garbage import collect_seldom  # noqa: E402

# In the processes of the tests themselves Keras runs on PyTorch, where nothing is compiled: TensorFlow takes
# five times as long. What is said of other backends is tested in processes of their own.
os.environ.setdefault("KERAS_BACKEND", "torch")
# The Hub of the tests is on this machine. Where the real one is asked, a test is wrong, or waits for nothing.
os.environ["HF_HUB_OFFLINE"] = "1"

# One worker runs all tests of a file, and one worker all files that use KerasCV's processes most, so that
# each of those is started once and builds a UNet once. The files that take longest come first; otherwise one
# worker would wait for the other at the end.
KERASCV = (
    "test_exactness.py",
    "test_fuzz.py",
    "test_several_models.py",
    "test_ancestor.py",
    "test_to_keras.py",
    "test_bad_hdf5.py",
    "test_bad_tensors.py",
    "test_bad_parts.py",
    "test_bad_archives.py",
    "test_bad_bundles.py",
    "test_bad_target.py",
    "test_hub_download.py",
    "test_rescue_run.py",
    "test_pipeline.py",
    "test_portable.py",
    "test_not_weights.py",
    "test_imports.py",
)
FIRST = (
    "test_parity.py",
    "test_training_backends.py",
    "test_docs.py",
    "test_study_run.py",
    "test_verify_kerashub.py",
    "test_run.py",
    "test_rescue_command.py",
    "test_notebooks.py",
    "test_hub_push.py",
    "test_distributed.py",
    "test_verification.py",
    "test_verify_command.py",
    "test_page_trains.py",
    "test_round_trip.py",
    "test_memory.py",
    "test_lora.py",
    "test_page_converts.py",
    "test_checkpoints.py",
    "test_backends.py",
    "test_single_file.py",
    "test_kerascv_weights.py",
    "test_on_tensorflow.py",
    "test_checks.py",
    "test_kerashub.py",
    "test_interruption.py",
    "test_on_a_gpu.py",
    "test_rescue_ray.py",
    "test_sampler.py",
    "test_hostile_single_file.py",
    "test_lora_pictures.py",
    "test_base.py",
    "test_base_schedule.py",
    "test_tiny.py",
    "test_lora_in_keras.py",
    "test_models.py",
)


def pytest_configure(config: pytest.Config) -> None:
    """Each process of the tests, and its children, has its share of the cores: where there are more threads
    than cores, those of PyTorch wait for each other, and do so busily. The workers inherit the share.

    Garbage is collected as seldom as in the commands, and not at the end: with Python's thresholds it takes
    a third of the time.
    """
    collect_seldom()
    share = (os.cpu_count() or 1) // (config.getoption("numprocesses", None) or 1)
    os.environ.setdefault("OMP_NUM_THREADS", str(max(1, share)))
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def pytest_unconfigure() -> None:
    gc.freeze()


def pytest_addoption(parser: pytest.Parser) -> None:
    parser.addoption(
        "--shuffle", type=int, metavar="SEED", help="run the files, and the tests of each, in a random order"
    )


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    order = {name: number for number, name in enumerate([*KERASCV, *FIRST])}
    items.sort(key=lambda item: order.get(item.path.name, len(order)))
    seed = config.getoption("shuffle")
    if seed is not None:
        random.Random(seed).shuffle(items)
        first = {item.path: number for number, item in reversed([*enumerate(items)])}
        items.sort(key=lambda item: first[item.path])  # a file's tests stay together, as do its fixtures


@pytest.hookimpl(optionalhook=True)
def pytest_xdist_make_scheduler(config: pytest.Config, log: Any) -> Any:
    """`--dist loadfile` with the files of KERASCV as one."""
    from xdist.scheduler import LoadScopeScheduling

    class Files(LoadScopeScheduling):
        def _split_scope(self, nodeid: str) -> str:
            file = nodeid.partition("::")[0]
            return "kerascv" if Path(file).name in KERASCV else file

    return Files(config, log)


@pytest.fixture(scope="session", autouse=True)
def _servers_end() -> Iterator[None]:
    yield
    stop_all()


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
