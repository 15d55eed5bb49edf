"""Read and write at a place in a file that several threads or processes have open.

Windows has no calls for that: there the position of the descriptor is moved, by one thread at a time.
"""

from __future__ import annotations

import os
from threading import Lock

_moving = Lock()


def write_at(fd: int, data: memoryview, offset: int) -> int:
    """Write bytes of `data`; returns how many, which may be less than all."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _moving:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def read_at(fd: int, into: memoryview, offset: int) -> int:
    """Fill `into`; returns how many bytes, which are less than all only at the end of the file."""
    if hasattr(os, "preadv"):
        return os.preadv(fd, [into], offset)
    with _moving:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(into))
    into[: len(data)] = data
    return len(data)


def allocate(fd: int, size: int) -> None:
    """Give the file its size, on disk where the system can (so that a full disk is found now)."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
    else:
        os.ftruncate(fd, size)
