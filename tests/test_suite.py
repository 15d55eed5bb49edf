"""The suite itself: how its work is divided."""

from __future__ import annotations

import os
from pathlib import Path

from conftest import FIRST, KERASCV


def test_workers_have_their_share_of_the_cores() -> None:
    """With more threads than cores those of PyTorch wait for each other; drawing then takes twenty times as
    long.
    """
    workers = int(os.environ.get("PYTEST_XDIST_WORKER_COUNT", "1"))
    threads = int(os.environ["OMP_NUM_THREADS"])
    assert threads == 1 or threads * workers <= (os.cpu_count() or 1)


def test_the_order_names_files_that_exist() -> None:
    files = {path.name for path in Path(__file__).parent.rglob("test_*.py")}
    assert {*KERASCV, *FIRST} <= files
    assert len({*KERASCV, *FIRST}) == len(KERASCV) + len(FIRST)
