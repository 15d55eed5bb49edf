"""Temporary folders of attempts. A folder whose process was killed is removed by the next attempt.

Each folder has a file that its process keeps locked. Another process, on another computer of a shared disk
too, sees by the lock whether the folder is in use.
"""

from __future__ import annotations

import shutil
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import IO

try:
    import fcntl
except ModuleNotFoundError:  # Windows
    fcntl = None  # type: ignore[assignment]

_LOCK = ".in-use"
_SECONDS_OF_A_DAY = 86_400


@contextmanager
def staging(parent: Path, name: str) -> Iterator[Path]:
    """A new folder in `parent` that is removed when the block ends. Two attempts never share one."""
    with locked_staging(parent, name) as (folder, _):
        yield folder


@contextmanager
def locked_staging(parent: Path, name: str) -> Iterator[tuple[Path, int]]:
    """`staging`, and the descriptor of the lock.

    The folder counts as used until every process that inherited the descriptor has ended.
    """
    parent.mkdir(parents=True, exist_ok=True)
    sweep(parent)
    folder = Path(tempfile.mkdtemp(prefix=f"{name}.", dir=parent))
    try:
        with (folder / _LOCK).open("w") as file:
            _lock(file)
            yield folder, file.fileno()
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def sweep(parent: Path) -> None:
    """Remove the folders in the folder `parent` that no process uses."""
    if not parent.is_dir():
        return
    for folder in parent.iterdir():
        with suppress(OSError):
            if not _used(folder):
                shutil.rmtree(folder, ignore_errors=True)


def _used(folder: Path) -> bool:
    """Whether the process of a folder runs. Without locks (Windows) that is so for a day."""
    try:
        with (folder / _LOCK).open("r+") as file:
            if _lock(file):
                return False
            if fcntl is not None:
                return True
    except FileNotFoundError:  # it is being made, or removed
        pass
    return time.time() - folder.stat().st_mtime < _SECONDS_OF_A_DAY


def _lock(file: IO[str]) -> bool:
    """Lock a file unless another process has; whether that was possible."""
    if fcntl is None:
        return False
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except OSError:
        return False
    return True
