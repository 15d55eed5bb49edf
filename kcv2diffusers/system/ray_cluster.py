"""Tasks on the computers of a Ray cluster (extra `ray`).

Ray starts a task again elsewhere if its computer or its process is lost. A task may therefore be carried out
twice.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from typing import Any, TypeVar

from kcv2diffusers.errors import Error, MissingExtra, one_line, plain

LOCAL = "local"
_RETRIES = 5  # after the loss of a computer or process

Order = TypeVar("Order")
Answer = TypeVar("Answer")


@contextmanager
def connected(address: str) -> Iterator[Any]:
    """Ray, connected to the cluster at `address` ("auto": the one that runs here, "local": one started here).

    Raises Error if Ray is not installed or the cluster cannot be reached.
    """
    os.environ.setdefault("RAY_USAGE_STATS_ENABLED", "0")  # Ray would tell its makers about the cluster
    try:
        import ray
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "ray") from error
    handlers = {number: signal.getsignal(number) for number in (signal.SIGINT, signal.SIGTERM)}
    try:
        ray.init(
            address=None if address == LOCAL else address,
            include_dashboard=False if address == LOCAL else None,
            log_to_driver=False,
            logging_level=logging.ERROR,
        )
    except (ConnectionError, RuntimeError, ValueError, OSError) as error:
        raise Error(
            f"--ray {plain(address)}: no Ray cluster can be reached ({type(error).__name__}).\n"
            "Start one with `ray start --head`, or give --ray local."
        ) from None
    finally:
        for number, handler in handlers.items():  # Ray sets its own
            signal.signal(number, handler)
    # Ray prints what happens in the cluster, until it is shut down; it is no result
    with redirect_stdout(sys.stderr):
        try:
            yield ray
        finally:
            ray.shutdown()


def spread(
    ray: Any,
    work: Callable[[Order], Answer],
    orders: Iterable[Order],
    *,
    cpus: float = 1,
    gpus: float = 0,
) -> Iterator[tuple[Order, Answer | None, str]]:
    """Carry out orders, as many at a time as the cluster has room for, `cpus` and `gpus` for each.

    Yields each order with its answer; if the cluster lost it, with None and the reason in one line.
    """
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=_RETRIES)(work)
    left, running = iter(orders), dict[Any, Order]()
    while True:
        while len(running) < _room(ray.cluster_resources(), cpus, gpus):
            if (order := next(left, None)) is None:
                break
            running[task.remote(order)] = order
        if not running:
            return
        done, _ = ray.wait([*running], num_returns=1)
        for reference in done:
            order = running.pop(reference)
            try:
                yield order, ray.get(reference), ""
            except ray.exceptions.RayError as error:
                words = one_line(error)[:200] if isinstance(error, ray.exceptions.RayTaskError) else ""
                yield order, None, f"lost by the cluster: {type(error).__name__} {plain(words)}".strip()


def _room(resources: dict[str, float], cpus: float, gpus: float) -> int:
    """The number of tasks that a cluster can run at a time, at least one."""
    rooms = [resources.get("CPU", 0) / cpus]
    if gpus:
        rooms.append(resources.get("GPU", 0) / gpus)
    return max(1, int(min(rooms)))
