"""Waiting for what another process or thread does."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Callable
from typing import Any, TypeVar

T = TypeVar("T")

# Seconds after which a test gives up. On a machine that is busy with other work a process takes many times
# the seconds that it needs; what is right is never waited for in vain.
LONG = 600


def until(found: Callable[[], T], process: subprocess.Popen[Any] | None = None) -> T:
    """What `found` returns once it is true; fails if it takes too long or if the process ends before."""
    deadline = time.monotonic() + LONG
    while not (result := found()):
        assert process is None or process.poll() is None, process.communicate()
        assert time.monotonic() < deadline
        time.sleep(0.01)
    return result
