"""Types of progress callbacks."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with the amount done and the total, in bytes or steps."""
StageProgress = Callable[[str, int, int, str], None]
"""Called with the name of a stage, the amount done, the total, and a remark."""


def silent(done: int, total: int) -> None:
    """Report nothing."""


def silent_stages(stage: str, done: int, total: int, remark: str) -> None:
    """Report nothing."""
