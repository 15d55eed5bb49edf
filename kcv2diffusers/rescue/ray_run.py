"""An engine that spreads the repositories over the computers of a Ray cluster.

Each repository is a task, which may be carried out twice; that it publishes or stores only once is up to
`keep`. Only this process, not the tasks, writes the journal.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, replace
from typing import Any

from kcv2diffusers.rescue.child import in_child
from kcv2diffusers.rescue.one import POSTPONED, Order, Result
from kcv2diffusers.rescue.run import Engine
from kcv2diffusers.system.ray_cluster import connected, spread


@contextmanager
def on_ray(address: str, minutes: float) -> Iterator[Engine]:
    """An engine on the cluster at `address`, as in `connected`.

    A repository takes one CPU of the cluster, and at most `minutes`. Results that are stored need a folder
    that all computers share. Raises Error if Ray is not installed or the cluster cannot be reached.
    """

    def work(order: dict[str, Any]) -> dict[str, Any]:
        return asdict(in_child(Order(**order), 60 * minutes))

    with connected(address) as ray:

        def engine(orders: Iterable[Order]) -> Iterator[Result]:
            # with a target, what is in progress need not be on a disk that all share
            told = (asdict(replace(order, work=None) if order.target else order) for order in orders)
            for order, answer, lost in spread(ray, work, told):
                yield (
                    Result(**answer)
                    if answer is not None
                    else Result(repository=order["repository"], outcome=POSTPONED, reason=lost)
                )

        yield engine
