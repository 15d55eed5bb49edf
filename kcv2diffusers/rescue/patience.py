"""Waiting for a Hub that refuses for the moment: rate limits, server errors, a lost connection."""

from __future__ import annotations

import random
import time
from collections.abc import Callable
from typing import TypeVar

from kcv2diffusers.hub.client import Unreachable

TRIES = 6
_FIRST, _LONGEST = 2.0, 60.0  # seconds to wait where the Hub does not say how long
_OBEYED = 900.0  # the longest wait that the Hub may ask for; after it the repository is postponed

T = TypeVar("T")


def patiently(work: Callable[[], T], tries: int = TRIES) -> T:
    """Do `work`, again after a wait while it raises Unreachable, at most `tries` times.

    The wait is the one that the Hub asks for (Retry-After), else one that doubles each time. A random part
    keeps several computers from coming back at the same moment. The work must be repeatable.
    """
    for number in range(tries):
        try:
            return work()
        except Unreachable as error:
            if number == tries - 1 or (error.wait or 0) > _OBEYED:
                raise
            wait = error.wait if error.wait is not None else min(_LONGEST, _FIRST * 2**number)
            time.sleep(wait * (1 + random.random() / 4))
    raise AssertionError  # the last try returns or raises
