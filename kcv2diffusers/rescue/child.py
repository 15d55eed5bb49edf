"""A repository in a process of its own, so that no file, however bad, ends the run."""

from __future__ import annotations

import json
import os
import signal
import subprocess
from contextlib import suppress
from dataclasses import asdict
from tempfile import TemporaryFile
from typing import IO, Any

from kcv2diffusers.errors import plain
from kcv2diffusers.hub.client import redact
from kcv2diffusers.rescue.one import FAILED, Order, Result
from kcv2diffusers.system.processes import start_module

_TAIL = 4096  # bytes of what a process printed last
_OWN_GROUP = hasattr(os, "killpg")


def in_child(order: Order, seconds: float, lock: int | None = None) -> Result:
    """Carry out an order in a child process, for at most `seconds`.

    The child ends with this process, and at once if this call is interrupted. `lock` is a descriptor that it
    holds open for as long as it lives.
    """
    inherited: dict[str, Any] = {"pass_fds": (lock,)} if lock is not None and os.name == "posix" else {}
    with TemporaryFile() as out, TemporaryFile() as err:
        child = start_module(
            "kcv2diffusers.rescue.one",
            stdin=subprocess.PIPE,
            stdout=out,
            stderr=err,
            start_new_session=_OWN_GROUP,
            **inherited,
        )
        reason = ""
        try:
            with suppress(BrokenPipeError):
                child.stdin.write(json.dumps(asdict(order)).encode() + b"\n")
                child.stdin.flush()
            try:
                child.wait(seconds)
            except subprocess.TimeoutExpired:
                reason = f"not done within {seconds / 60:g} minutes"
        finally:
            _end(child)
        return _result(order, child.returncode, out, err, reason)


def _end(child: Any) -> None:
    """End a child and the processes that it started."""
    if _OWN_GROUP:
        with suppress(ProcessLookupError, PermissionError):
            os.killpg(child.pid, signal.SIGKILL)
    else:
        child.kill()
    child.wait()
    with suppress(OSError):
        child.stdin.close()


def _result(order: Order, code: int, out: IO[bytes], err: IO[bytes], reason: str) -> Result:
    out.seek(0)
    with suppress(ValueError, TypeError):
        return Result(**json.loads(out.read()))
    if not reason:
        err.seek(max(0, err.seek(0, os.SEEK_END) - _TAIL))
        lines = err.read().decode("utf-8", "replace").strip().splitlines()
        how = f"ended by {signal.Signals(-code).name}" if code < 0 else f"ended with {code}"
        reason = f"its process {how}" + (f": {plain(redact(lines[-1].strip()))[:200]}" if lines else "")
    return Result(repository=order.repository, outcome=FAILED, reason=reason)
