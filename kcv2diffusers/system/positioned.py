"""Read and write at an offset in a file that several threads or processes have open.

Windows has no `pread` and `pwrite`: there a lock lets one thread at a time seek and then read or write.
"""

from __future__ import annotations

import os
from threading import Lock

_moving = Lock()


def write_at(fd: int, data: memoryview, offset: int) -> int:
    """Write `data` at byte `offset`. Returns the number of bytes written, which may be less than all."""
    if hasattr(os, "pwrite"):
        return os.pwrite(fd, data, offset)
    with _moving:
        os.lseek(fd, offset, os.SEEK_SET)
        return os.write(fd, data)


def read_at(fd: int, into: memoryview, offset: int) -> int:
    """Fill `into` from byte `offset`.

    Returns the number of bytes read, which is less than all only at the end of the file.
    """
    if hasattr(os, "preadv"):
        return os.preadv(fd, [into], offset)
    with _moving:
        os.lseek(fd, offset, os.SEEK_SET)
        data = os.read(fd, len(into))
    into[: len(data)] = data
    return len(data)


def allocate(fd: int, size: int) -> None:
    """Set the file size in bytes; allocate the disk space too if supported, to detect a full disk early."""
    if hasattr(os, "posix_fallocate"):
        os.posix_fallocate(fd, 0, size)
    else:
        os.ftruncate(fd, size)
