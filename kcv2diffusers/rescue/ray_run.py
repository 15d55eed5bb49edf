"""An engine that spreads the repositories over the computers of a Ray cluster (extra `ray`).

Each repository is a task, which Ray starts again elsewhere if its computer or its process is lost. A task may
therefore be carried out twice; that it publishes or stores only once is up to `keep`. Only this process, not
the tasks, writes the journal.
"""

from __future__ import annotations

import logging
import os
import signal
import sys
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, redirect_stdout
from dataclasses import asdict, replace
from typing import Any

from kcv2diffusers.errors import Error, MissingExtra, one_line, plain
from kcv2diffusers.rescue.child import in_child
from kcv2diffusers.rescue.one import POSTPONED, Order, Result
from kcv2diffusers.rescue.run import Engine

LOCAL = "local"
_RETRIES = 5  # after the loss of a computer or process


def _task(order: dict[str, Any], seconds: float) -> dict[str, Any]:
    """Carry out an order on a computer of the cluster."""
    return asdict(in_child(Order(**order), seconds))


@contextmanager
def on_ray(address: str, minutes: float) -> Iterator[Engine]:
    """An engine on the cluster at `address` ("auto": the one that runs here, "local": one that starts here).

    A repository takes one CPU of the cluster, and at most `minutes`. Results that are stored need a folder
    that all computers share. Raises Error if Ray is not installed or the cluster cannot be reached.
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
            yield lambda orders: _results(ray, orders, 60 * minutes)
        finally:
            ray.shutdown()


def _results(ray: Any, orders: Iterable[Order], seconds: float) -> Iterator[Result]:
    """Carry out orders on as many CPUs as the cluster has at that moment."""
    task = ray.remote(num_cpus=1, max_retries=_RETRIES)(_task)
    left, running = iter(orders), dict[Any, Order]()
    while True:
        while len(running) < max(1, int(ray.cluster_resources().get("CPU", 0))):
            if (order := next(left, None)) is None:
                break
            if order.target:  # what is in progress need not be on a disk that all share
                order = replace(order, work=None)
            running[task.remote(asdict(order), seconds)] = order
        if not running:
            return
        done, _ = ray.wait([*running], num_returns=1)
        for reference in done:
            yield _result(ray, reference, running.pop(reference))


def _result(ray: Any, reference: Any, order: Order) -> Result:
    try:
        return Result(**ray.get(reference))
    except ray.exceptions.RayError as error:
        words = one_line(error)[:200] if isinstance(error, ray.exceptions.RayTaskError) else ""
        reason = f"lost by the cluster: {type(error).__name__} {plain(words)}".strip()
        return Result(repository=order.repository, outcome=POSTPONED, reason=reason)
