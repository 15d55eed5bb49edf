"""One command of ours as a child process: its progress, its end, its result."""

from __future__ import annotations

import json
import os
import re
import shlex
import signal
import subprocess
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from typing import Any

from kcv2diffusers.app.supervisor import PATIENCE
from kcv2diffusers.errors import Error, plain
from kcv2diffusers.hub.client import redact
from kcv2diffusers.progress import EVERY
from kcv2diffusers.system.processes import start_module

COMMAND = "kcv2diffusers"
STOPPED = "Stopped."
_SECRETS = re.compile(r"TOKEN|SECRET|PASSWORD|CREDENTIAL|API_?KEY", re.I)
_LAST_LINES = 12
_MOST_OUTPUT = 16 << 20  # bytes read of what a command printed
_LOOK = 0.5  # seconds between looks at a running command


def environment(*, local: bool, token: str | None, home: Path) -> dict[str, str]:
    """The environment of a command.

    On a `local` server, the machine's login to the Hub counts. On any other nothing of the server's own
    secrets goes to a command, and with a visitor's `token` downloads go to the folder `home`, where no other
    visitor's command finds what only this token may read.
    """
    kept = {name: value for name, value in os.environ.items() if local or not _SECRETS.search(name)}
    kept |= {EVERY: "1", "HF_HUB_DISABLE_PROGRESS_BARS": "1", "HF_HUB_DISABLE_TELEMETRY": "1"}
    if not local:
        kept |= {"HF_TOKEN_PATH": os.devnull, "HF_STORED_TOKENS_PATH": os.devnull}
    if token:
        kept["HF_TOKEN"] = token
    if token and not local:
        for name, inside in (("HF_HOME", ""), ("HF_HUB_CACHE", "hub"), ("HF_XET_CACHE", "xet")):
            kept[name] = str(home / inside)
    return kept


class Job:
    """A running command. `words` are its arguments, its working folder is `folder`.

    It ends after `seconds` at the latest. `lock` is a descriptor that it holds as long as it lives.
    """

    def __init__(
        self,
        folder: Path,
        words: Sequence[str],
        *,
        env: Mapping[str, str],
        seconds: float,
        most_bytes: int,
        lock: int | None = None,
        module: str = "kcv2diffusers",
    ) -> None:
        self.words = list(words)
        self.token = env.get("HF_TOKEN")
        self.stopped = ""
        self.code: int | None = None
        self._deadline = time.monotonic() + seconds
        self._limit = seconds
        inherited: dict[str, Any] = {"pass_fds": (lock,)} if lock is not None and os.name == "posix" else {}
        self._out, self._err = folder / ".out", folder / ".err"
        with self._out.open("wb") as out, self._err.open("wb") as err:
            self._process = start_module(
                "kcv2diffusers.app.supervisor",
                str(most_bytes),
                module,
                *self.words,
                env=env,
                cwd=folder,
                stdin=subprocess.PIPE,
                stdout=out,
                stderr=err,
                start_new_session=True,
                **inherited,
            )

    @property
    def command(self) -> str:
        """The command line, as a user would type it in the working folder."""
        return shlex.join([COMMAND, *self.words])

    def follow(self) -> Iterator[None]:
        """Yield now and then until the command has ended. The command ends if this is left before."""
        try:
            while self._process.poll() is None:
                if time.monotonic() > self._deadline and not self.stopped:
                    self.stop(f"The time limit of {self._limit / 60:g} minutes was reached.")
                yield
                with suppress(subprocess.TimeoutExpired):
                    self._process.wait(_LOOK)
        finally:
            self.end()

    def stop(self, reason: str = STOPPED) -> None:
        """Let the command save and end. Returns at once."""
        self.stopped = self.stopped or reason
        with suppress(OSError, ValueError):
            self._process.stdin.close()

    def end(self) -> None:
        """Stop the command if it runs, and wait for its end."""
        if self._process.poll() is None:
            self.stop()
            try:
                self._process.wait(PATIENCE + 10)
            except subprocess.TimeoutExpired:
                with suppress(OSError):
                    os.killpg(self._process.pid, signal.SIGKILL)
                self._process.wait()
        with suppress(OSError, ValueError):
            self._process.stdin.close()
        self.code = self._process.returncode

    def lines(self) -> list[str]:
        """What the command has said so far, line by line, without control characters and tokens."""
        text = _read(self._err).decode("utf-8", "replace")
        return [redact(plain(line), self.token) for line in text.splitlines() if line.strip()]

    def last_lines(self) -> str:
        """The command line, and the end of what it has said."""
        return "\n".join([f"$ {self.command}", *self.lines()[-_LAST_LINES:]])

    def printed(self) -> Any:
        """The JSON that the command has printed; None if there is none."""
        with suppress(ValueError):
            return json.loads(_read(self._out))
        return None

    def result(self) -> Any:
        """The JSON that the command printed. Raises Error if it was stopped or has failed."""
        if self.code:
            raise Error(self.stopped or self.reason())
        return self.printed()

    def reason(self) -> str:
        """Why the command failed, as it says itself."""
        said = self.lines()
        prefix = f"{COMMAND}: "
        first = next((at for at, line in reversed([*enumerate(said)]) if line.startswith(prefix)), None)
        if first is not None:
            return "\n".join(said[first:]).removeprefix(prefix)
        return said[-1] if said else f"The command ended with code {self.code}."


def _read(path: Path) -> bytes:
    """The end of a file of a command; empty if the file is gone."""
    try:
        with path.open("rb") as file:
            file.seek(max(0, path.stat().st_size - _MOST_OUTPUT))
            return file.read()
    except OSError:
        return b""
