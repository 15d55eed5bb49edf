"""Child processes, and the restart of the training process with tuned allocator settings.

A child is a fork, which shares the parent's imports and data, or a module run in a new Python.
"""

from __future__ import annotations

import gc
import os
import signal
import sys
import warnings
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, NoReturn

FORKS = sys.platform == "linux" and hasattr(os, "fork")
"""Whether `fork` can be used. Windows has no fork; on macOS the system libraries may crash after it."""

_SIGNALS = [
    getattr(signal, f"SIG{name}")
    for name in ("PROF", "ALRM", "INT", "TERM", "SEGV", "BUS", "ABRT", "FPE", "ILL")
    if FORKS
]


def start_module(module: str, *arguments: str, env: Mapping[str, str] | None = None, **pipes: Any) -> Any:
    """Run a module of this package in a new Python; returns its `subprocess.Popen`.

    `env` replaces the environment (default: that of this process). `pipes` is passed to `Popen`.
    """
    import subprocess

    environment = {**(os.environ if env is None else env)}
    package = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [environment.get("PYTHONPATH")])])
    # -P keeps the working folder off sys.path: a file there may have the name of a library.
    return subprocess.Popen([sys.executable, "-P", "-m", module, *arguments], env=environment, **pipes)


def fork(work: Callable[[], object]) -> int:
    """Start a child process that runs `work` only: no signal handlers, clean-up or messages of the parent.

    Returns the process id. The exit status is 0 unless `work` raised an exception. `work` must not use a
    lock that another thread of the parent may hold: the fork copies the lock in its held state.
    """
    # An exception from a signal handler during the fork would be lost in a library's after-fork hook.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    with warnings.catch_warnings():
        # Python 3.12 and JAX warn about forks beside threads; the child runs only NumPy, h5py, system calls.
        warnings.simplefilter("ignore")
        child = os.fork()
    if not child:
        _only(work, before)
    try:
        signal.pthread_sigmask(signal.SIG_SETMASK, before)
    except BaseException:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
        raise
    return child


def _only(work: Callable[[], object], mask: set[int]) -> NoReturn:
    try:
        for number in _SIGNALS:
            signal.signal(number, signal.SIG_DFL)
        signal.pthread_sigmask(signal.SIG_SETMASK, mask)
        gc.disable()  # the child exits before there is much to collect
        work()
        os._exit(0)
    finally:
        os._exit(1)


ALLOCATOR = {
    "GLIBC_TUNABLES": f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={32 << 20}"
    f":glibc.malloc.trim_threshold={2**40}"
}
"""Environment for training on a CPU: glibc keeps freed memory for the next step, on huge pages.

Without it the kernel clears gigabytes of gradients again in each step, in pages of 4 KB. Only the largest
blocks are returned to the kernel, otherwise fragmentation costs up to a gigabyte; 32 MB is the largest
mmap_threshold that glibc accepts. glibc reads the variable when a process starts.
"""


def let_threads_sleep() -> None:
    """Make waiting PyTorch threads sleep instead of spinning; call it before PyTorch is imported.

    Otherwise a waiting thread spins for milliseconds, and if other programs use the cores too, the threads
    wait for one that is not scheduled. Beside two busy processes on two cores, drawing an image took 57 s
    (45 s of CPU time) without this setting and takes 39 s (22 s) with it; on idle cores the time is the same.
    Training does not call this: its steps are 20 % slower with it on idle cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def restart_to_train() -> None:
    """Run this command line again in this process (exec) with `ALLOCATOR` in the environment.

    It does so only on Linux, and only if `GLIBC_TUNABLES` is not set.
    """
    if sys.platform == "linux" and ALLOCATOR.keys().isdisjoint(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})
