"""Types of progress callbacks, and how often a log tells them."""

from __future__ import annotations

from collections.abc import Callable

EVERY = "KCV2DIFFUSERS_PROGRESS_SECONDS"
"""Environment variable: the seconds before and between lines in a log, for a program that shows them."""
Progress = Callable[[int, int], None]
"""Called with the amount done and the total, in bytes or steps."""
StageProgress = Callable[[str, int, int, str], None]
"""Called with the name of a stage, the amount done, the total, and a remark."""


def silent(done: int, total: int) -> None:
    """Report nothing."""


def silent_stages(stage: str, done: int, total: int, remark: str) -> None:
    """Report nothing."""
