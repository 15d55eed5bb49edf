"""The Hub of the tests, in a process of its own, and the command line against it in others."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from support.waiting import LONG

ALICE, READER, BOB = "hf_aliceWriteToken0000", "hf_aliceReadToken00000", "hf_bobWriteToken000000"
_ON_THE_HUB = ("HF_HUB_OFFLINE", "HF_TOKEN", "HF_ENDPOINT", "HF_HOME")


@dataclass
class Hub:
    """A running fake Hub; `home` is the HF_HOME of commands run against it."""

    url: str
    home: Path
    extra: dict[str, str] = field(default_factory=dict)

    def ask(self, route: str, data: Any = None) -> Any:
        body = None if data is None else json.dumps(data).encode()
        with urllib.request.urlopen(urllib.request.Request(f"{self.url}/_test/{route}", body)) as answer:
            return json.loads(answer.read())

    def seed(self, repo: str, folder: Path, **order: Any) -> None:
        """A repository with the files of a folder (added to what it has)."""
        self.ask("seed", {"repo": repo, "folder": str(folder), **order})

    def empty(self) -> None:
        """As it was at the start: no repository, no request failing, none in the log, no weights sent."""
        self.ask("empty", {})

    def fail(self, *rules: dict[str, Any]) -> None:
        """Let requests fail, until the next call."""
        self.ask("fail", list(rules))

    def log(self) -> list[dict[str, Any]]:
        """The requests since the last call."""
        return self.ask("log")

    def uploaded(self) -> int:
        """Bytes of weights sent since the last look at the log."""
        return sum(entry["bytes"] for entry in self.log() if entry["method"] == "PUT")

    def environment(self, **extra: str) -> dict[str, str]:
        kept = {name: value for name, value in os.environ.items() if name not in _ON_THE_HUB}
        return {
            **kept,
            "HF_ENDPOINT": self.url,
            "HF_HOME": str(self.home),
            "HF_HUB_DISABLE_XET": "1",
            "HF_HUB_DISABLE_TELEMETRY": "1",
            "COLUMNS": "80",
            "KERAS_BACKEND": "torch",
            "OMP_NUM_THREADS": "1",
            **self.extra,
            **extra,
        }

    def run(self, *arguments: str | Path, **extra: str) -> subprocess.CompletedProcess[str]:
        """The command line; no output may hold a token."""
        command = [sys.executable, "-m", "kcv2diffusers", *map(str, arguments)]
        done = subprocess.run(
            command, env=self.environment(**extra), capture_output=True, text=True, check=False, timeout=LONG
        )
        for token in (ALICE, READER, BOB, "hf_"):
            assert token not in done.stdout + done.stderr
        assert "Traceback" not in done.stderr, done.stderr
        return done

    def does(self, *arguments: str | Path, **extra: str) -> str:
        done = self.run(*arguments, **extra)
        assert done.returncode == 0, done.stderr
        return done.stdout

    def refuses(self, *arguments: str | Path, **extra: str) -> str:
        """What a refusal says: a line or two, nothing on stdout."""
        done = self.run(*arguments, **extra)
        assert done.returncode == 1 and not done.stdout, (done.stdout, done.stderr)
        return done.stderr


@contextmanager
def serving(home: Path) -> Iterator[Hub]:
    command = [sys.executable, str(Path(__file__).with_name("fake_hub.py"))]
    with subprocess.Popen(command, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True) as process:
        assert process.stdin is not None and process.stdout is not None
        try:
            yield Hub(f"http://127.0.0.1:{process.stdout.readline().strip()}", home)
        finally:
            process.stdin.close()
