"""A Ray cluster of several computers, which are processes on this machine."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import pytest

COMPUTER = {"num_cpus": 1, "object_store_memory": 80 << 20, "include_dashboard": False}
# A computer whose process is gone is given up after 1.5 s, not after 15. One that is busy keeps its 10 s.
_WATCHFUL = {
    "health_check_initial_delay_ms": 0,
    "health_check_period_ms": 500,
    "health_check_failure_threshold": 3,
}


@contextmanager
def ray_cluster() -> Iterator[Any]:
    """A `ray.cluster_utils.Cluster` with its head; `add_node(**COMPUTER)` adds a computer."""
    pytest.importorskip("ray", reason="needs Ray (pip install 'kcv2diffusers[ray]')")
    from ray.cluster_utils import Cluster

    cluster = Cluster(initialize_head=True, head_node_args={**COMPUTER, "_system_config": _WATCHFUL})
    try:
        yield cluster
    finally:
        cluster.shutdown()
