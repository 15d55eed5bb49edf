"""A conversion as a process: signals, start-up and a reader that goes away."""

from __future__ import annotations

import signal
import subprocess
import sys
from pathlib import Path

import h5py
import pytest
from support.bad_input import Cli, alone, tree
from support.checkpoints import ROOT
from support.waiting import LONG, until

pytest_plugins = ["support.bad_input"]


# The process itself.

SLOW = """
import sys, time
from kcv2diffusers.targets import transfer
from kcv2diffusers.__main__ import start
do = transfer.Worker.do
def slowly(self, job):
    time.sleep(0.3)
    return do(self, job)
transfer.Worker.do = slowly
start()
"""


def start(code: tuple[str, ...], *arguments: str | Path) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, *code, *map(str, arguments)],
        cwd=ROOT,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )


@pytest.mark.parametrize("existing", [False, True])
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT, signal.SIGKILL])
def test_a_run_that_is_stopped(
    cli: Cli, legacy: Path, home: Path, number: signal.Signals, existing: bool
) -> None:
    """Nothing is at the target, or what was there before."""
    if existing:
        cli.converts(*alone(legacy, home)[1:])
    before = tree(home)
    process = start(("-c", SLOW), *alone(legacy, home), "--overwrite")
    until(lambda: list(home.glob(".out.tmp-*/text_encoder/*.safetensors")), process)
    process.send_signal(number)
    out, err = process.communicate(timeout=LONG)  # also the end of all children: they hold the pipes
    left = {name: entry for name, entry in tree(home).items() if not name.startswith(".out.tmp-")}
    assert left == before
    assert out == "" and "Traceback" not in err
    if number == signal.SIGKILL:
        assert process.returncode == -signal.SIGKILL
        assert list(home.glob(".out.tmp-*"))  # nobody could remove it; the next run does
        cli.converts(*alone(legacy, home)[1:], "--overwrite")
    else:
        assert process.returncode == 128 + number
        assert err == "kcv2diffusers: interrupted; nothing was written.\n"
    assert not list(home.glob(".out.tmp-*"))


@pytest.mark.parametrize("damage", ["cut", "loop"])
def test_as_a_user_sees_it(legacy: Path, home: Path, damage: str) -> None:
    """The installed program's own process: messages on stderr, exit code, nothing else."""
    if damage == "cut":
        legacy.write_bytes(legacy.read_bytes()[:100_000])
    else:
        with h5py.File(legacy, "r+") as file:
            file["again"] = file["/"]
    before = tree(home.parent)
    process = start(("-m", "kcv2diffusers"), *alone(legacy, home))
    out, err = process.communicate(timeout=LONG)
    assert (process.returncode, out) == (1, "")
    assert err.startswith(f"kcv2diffusers: {legacy}: ") or err.startswith(f"kcv2diffusers: {legacy}")
    assert len(err.splitlines()) == 2
    assert tree(home.parent) == before


def test_a_reader_that_goes_away(legacy: Path, home: Path) -> None:
    """As in `kcv2diffusers inspect FILE | head -0`."""
    process = start(("-m", "kcv2diffusers"), "inspect", legacy)
    assert process.stdout is not None and process.stderr is not None
    process.stdout.close()
    err = process.stderr.read()
    process.wait(timeout=LONG)
    process.stderr.close()
    assert "Traceback" not in err
