"""Child processes: by fork, with no second import, and what they work on is simply there; or a module started
afresh. And a new start for the one that trains, with an allocator set up for it.
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
"""Whether `fork` can be used. macOS has one, but its own libraries may crash after it; Windows has none."""

_SIGNALS = [
    getattr(signal, f"SIG{name}")
    for name in ("PROF", "ALRM", "INT", "TERM", "SEGV", "BUS", "ABRT", "FPE", "ILL")
    if FORKS
]


def start_module(module: str, *arguments: str, env: Mapping[str, str] | None = None, **pipes: Any) -> Any:
    """A new Python that runs a module of this package: the `subprocess.Popen`, which is given `pipes` too."""
    import subprocess

    environment = {**(os.environ if env is None else env)}
    package = str(Path(__file__).parents[2])
    environment["PYTHONPATH"] = os.pathsep.join([package, *filter(None, [environment.get("PYTHONPATH")])])
    # -P keeps the working folder off the path: a file there may be called as a library is.
    return subprocess.Popen([sys.executable, "-P", "-m", module, *arguments], env=environment, **pipes)


def fork(work: Callable[[], object]) -> int:
    """Start a child process that runs `work` and nothing else of the parent's: no handlers, no clean-up, no
    messages. Returns its id; its exit status is 0 unless `work` raised something.

    `work` must not touch what other threads may hold a lock of (it is forked beside them).
    """
    # What a signal's handler raises during the fork would be lost in some library's after-fork hook.
    before = signal.pthread_sigmask(signal.SIG_BLOCK, _SIGNALS)
    with warnings.catch_warnings():
        # Python 3.12 and JAX warn of forks beside threads; here only NumPy, h5py and system calls run.
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
        gc.disable()  # the child is gone before there is much to collect
        work()
        os._exit(0)
    finally:
        os._exit(1)


ALLOCATOR = {
    "GLIBC_TUNABLES": f"glibc.malloc.hugetlb=1:glibc.malloc.mmap_threshold={32 << 20}"
    f":glibc.malloc.trim_threshold={2**40}"
}
"""For training on a CPU: what a step frees is kept for the next, on large pages. Without it the kernel clears
gigabytes of gradients anew in each step, in pages of 4 KB. Only the largest are given back, or the holes that
they leave add up to a gigabyte (32 MB is the most that glibc takes). It reads this when a process starts.
"""


def let_threads_sleep() -> None:
    """Threads of PyTorch that wait for each other give way at once; it must be called before its import.

    Otherwise they keep a core busy for milliseconds each time, and where other programs want the cores too,
    each waits for one that does not run: beside two busy processes on two cores a drawing took 57 s and 45 s
    of computing, and so it takes 39 s and 22 s; on idle cores as long as before. Training is not told: its
    steps are a fifth slower with it on idle cores.
    """
    os.environ.setdefault("OMP_WAIT_POLICY", "PASSIVE")


def restart_to_train() -> None:
    """Run this command line once more in this process, with `ALLOCATOR`; on Linux, and if nothing else was
    chosen.
    """
    if sys.platform == "linux" and ALLOCATOR.keys().isdisjoint(os.environ):
        os.execve(sys.executable, [sys.executable, *sys.orig_argv[1:]], {**os.environ, **ALLOCATOR})
