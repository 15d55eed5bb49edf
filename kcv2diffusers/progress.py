"""How long work reports what is done of it."""

from __future__ import annotations

from collections.abc import Callable

Progress = Callable[[int, int], None]
"""Called with what is done and the whole: bytes, or steps."""
StageProgress = Callable[[str, int, int, str], None]
"""Called with the name of a stage, what of it is done, the whole, and a remark."""


def silent(done: int, total: int) -> None:
    """Report nothing."""


def silent_stages(stage: str, done: int, total: int, remark: str) -> None:
    """Report nothing."""
