"""A process between the server and a command: it ends the command when the server stops or dies.

    python -m kcv2diffusers.app.supervisor BYTES MODULE ARGUMENT ...

Its standard input is a pipe from the server. When that closes, however the server ended, the command gets
SIGTERM, on which it saves and cleans up. No file that the command writes may have more than BYTES bytes.
"""

from __future__ import annotations

import os
import signal
import subprocess
import sys
from contextlib import suppress
from threading import Thread
from typing import Any

from kcv2diffusers.system.processes import start_module

PATIENCE = 120  # seconds to save and clean up: a full-size checkpoint on a slow disk


def main() -> None:
    """Run the command, and exit with its exit code."""
    limit, module, *arguments = sys.argv[1:]
    _limit_files(int(limit))
    child = start_module(module, *arguments, stdin=subprocess.DEVNULL)
    Thread(target=_end_with_the_server, args=(child,), daemon=True).start()
    code = child.wait()
    os._exit(code if code >= 0 else 128 - code)  # the thread may still read


def _limit_files(count: int) -> None:
    """Let no write make a file of this process or its children larger than `count` bytes."""
    with suppress(ImportError, ValueError, OSError):  # Windows; a lower limit is set already
        import resource

        resource.setrlimit(resource.RLIMIT_FSIZE, (count, count))


def _end_with_the_server(child: Any) -> None:
    while os.read(0, 1024):
        pass
    child.terminate()
    try:
        child.wait(PATIENCE)
    except subprocess.TimeoutExpired:
        if hasattr(os, "killpg"):
            os.killpg(0, signal.SIGKILL)  # with the processes that the command started, and this one
        child.kill()


if __name__ == "__main__":
    main()
