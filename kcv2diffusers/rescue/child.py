"""A repository in a process of its own, so that no file, however bad, ends the run."""

from __future__ import annotations

import json
from contextlib import suppress
from dataclasses import asdict

from kcv2diffusers.hub.client import redact
from kcv2diffusers.rescue.one import FAILED, Order, Result
from kcv2diffusers.system import children


def in_child(order: Order, seconds: float, lock: int | None = None) -> Result:
    """Carry out an order in a child process, for at most `seconds`.

    The child ends with this process, and at once if this call is interrupted. `lock` is a descriptor that it
    holds open for as long as it lives.
    """
    line = json.dumps(asdict(order)).encode() + b"\n"
    ended = children.in_child("kcv2diffusers.rescue.one", order=line, seconds=seconds, lock=lock)
    with suppress(ValueError, TypeError):
        return Result(**json.loads(ended.out))
    return Result(repository=order.repository, outcome=FAILED, reason=ended.why(redact))
