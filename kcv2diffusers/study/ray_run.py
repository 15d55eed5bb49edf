"""An engine that spreads the training runs of a study over the computers of a Ray cluster.

A run may be started twice; the second one goes on with what the first one left in the folder of the study.
"""

from __future__ import annotations

import os
from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from dataclasses import asdict
from typing import Any

from kcv2diffusers.study.one import Order, Result, carry_out
from kcv2diffusers.study.run import Engine
from kcv2diffusers.system.ray_cluster import connected, spread


@contextmanager
def on_ray(address: str, *, cpus: float = 1, gpus: float = 0) -> Iterator[Engine]:
    """An engine on the cluster at `address`, as in `connected`. A run takes `cpus` and `gpus` of the cluster.

    The folder of the study, the photos and the base must be on a disk that all computers share. Raises Error
    if Ray is not installed or the cluster cannot be reached.
    """
    backend = os.environ.get("KERAS_BACKEND", "")

    def work(order: dict[str, Any]) -> dict[str, Any]:
        if backend:  # as on this computer
            os.environ["KERAS_BACKEND"] = backend
        return asdict(carry_out(Order(**order)))

    with connected(address) as ray:

        def engine(orders: Iterable[Order]) -> Iterator[Result]:
            for order, answer, lost in spread(ray, work, map(asdict, orders), cpus=cpus, gpus=gpus):
                yield Result(**answer) if answer is not None else Result(order["run"], lost)

        yield engine
