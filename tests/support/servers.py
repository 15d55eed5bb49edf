"""Processes that serve many cases: what takes long, importing and building, is done once in each."""

from __future__ import annotations

import json
import subprocess
from collections.abc import Mapping, Sequence
from pathlib import Path
from tempfile import TemporaryFile
from typing import Any

_running: dict[str, Server] = {}


class Server:
    """A process that answers each line of JSON with one."""

    def __init__(self, command: Sequence[str | Path], environment: Mapping[str, str]) -> None:
        self.errors = TemporaryFile("w+")  # noqa: SIM115 (closed by `stop`)
        self.process = subprocess.Popen(
            command,
            env=environment,
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=self.errors,
            text=True,
        )

    def ask(self, *request: str | Path) -> Any:
        assert self.process.stdin is not None and self.process.stdout is not None
        try:
            print(json.dumps([*map(str, request)]), file=self.process.stdin, flush=True)
            answer = self.process.stdout.readline()
        except BrokenPipeError:
            answer = ""
        if not answer:
            self.errors.seek(0)
            code, said = self.process.wait(), self.errors.read()
            raise RuntimeError(f"{request}: the process ended with {code}:\n{said[-3000:]}")
        return json.loads(answer)

    def stop(self) -> None:
        self.process.kill()  # to leave by itself takes a process of TensorFlow's up to a minute
        with self.process:  # which waits
            self.errors.close()


def server(name: str, command: Sequence[str | Path], environment: Mapping[str, str]) -> Server:
    """The server of that name; it starts at the first call."""
    if name not in _running:
        _running[name] = Server(command, environment)
    return _running[name]


def stop_all() -> None:
    """Give back their memory; a later call starts one again."""
    while _running:
        _running.popitem()[1].stop()
