"""The server of the page in a process of its own, with the fake Hub."""

from __future__ import annotations

import json
import shutil
import signal
import socket
import subprocess
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any
from urllib.error import URLError
from urllib.request import urlopen

import pytest

from support.checkpoints import ROOT
from support.hub.hub import Hub
from support.waiting import LONG, until

PYTHON = ROOT / ".venv-space" / "bin" / "python"
NEEDS = [
    pytest.mark.slow,
    pytest.mark.skipif(
        not PYTHON.exists(), reason="needs Gradio and Playwright in .venv-space (make venv-space)"
    ),
    pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium (apt-get install chromium)"),
]


@dataclass
class App:
    """A running page: its address, its folder for temporary files, its log."""

    url: str
    work: Path
    log: Path
    process: subprocess.Popen[bytes]

    def drive(self, driver: str, *arguments: object) -> dict[str, Any]:
        """Run a driver of this folder in a browser; what it tells."""
        script = Path(__file__).with_name(f"{driver}.py")
        done = subprocess.run(
            [PYTHON, script, self.url, *map(str, arguments)],
            capture_output=True, text=True, check=False, timeout=LONG,
        )  # fmt: skip
        assert done.returncode == 0, done.stderr[-3000:] + self.log.read_text()[-3000:]
        told: dict[str, Any] = json.loads(done.stdout)
        return told


@contextmanager
def serving(
    hub: Hub, folder: Path, *options: str, command: Sequence[str | Path] = (), **environment: str
) -> Iterator[App]:
    """The page, once it answers; at the end its process gets SIGTERM. `command` starts it otherwise."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    work, log = folder / "work", folder / "app.log"
    usual = ["-m", "kcv2diffusers", "app", "--port", str(port), "--work", str(work), *options]
    variables = hub.environment(
        **{
            "PYTHONPATH": str(ROOT),
            "GRADIO_SERVER_NAME": "127.0.0.1",
            "GRADIO_SERVER_PORT": str(port),
            "TMPDIR": str(folder),
            **environment,
        }
    )
    with log.open("wb") as file:
        process = subprocess.Popen(
            [PYTHON, *(command or usual)], env=variables, stdout=file, stderr=file, cwd=folder
        )
    app = App(f"http://127.0.0.1:{port}/", work, log, process)
    try:
        until(lambda: _answers(app.url), process)
        yield app
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(LONG)


def _answers(url: str) -> bool:
    try:
        urlopen(url).close()
    except (URLError, ConnectionError):
        return False
    return True
