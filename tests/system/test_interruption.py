"""SIGINT and SIGTERM at many moments of real processes: exit code, message, and what is left."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from support.waiting import LONG

from kcv2diffusers.conversion.to_diffusers import convert
from kcv2diffusers.sources.locate import TINY

pytestmark = pytest.mark.slow

ENVIRONMENT = {**os.environ, "KERAS_BACKEND": "torch", "TF_CPP_MIN_LOG_LEVEL": "3"}
# The command sends itself a signal at an event of Python: an import, a file opened, a call compiled. At 0 it
# sends none and tells the number of events.
AT = """
import os, signal, sys

at, number, process, count = int(sys.argv[1]), int(sys.argv[2]), os.getpid(), 0

def hook(*_):
    global count
    if os.getpid() == process:
        count += 1
        if count == at:
            os.kill(process, number)

from kcv2diffusers.__main__ import start

sys.argv[1:] = sys.argv[3:]
sys.addaudithook(hook)
try:
    start()
finally:
    if not at:
        print("events", count)
"""


def run(code: str, *arguments: str | Path | int) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", code, *map(str, arguments)]
    return subprocess.run(command, env=ENVIRONMENT, capture_output=True, text=True, check=False, timeout=LONG)


def tree(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*")}


@pytest.mark.parametrize(
    ("arguments", "moments"),
    [
        (["inspect", "tiny://"], 4),
        (["convert", "tiny://", "--out", "out/pipeline"], 14),
        (["to-keras", "pipeline", "--out", "out/keras"], 6),
        (["generate", "--base", "tiny", "--prompt", "a panda", "--steps", "2", "--out", "out"], 4),
    ],
)
def test_at_many_moments(
    arguments: list[str],
    moments: int,
    tmp_path: Path,
    tmp_path_factory: pytest.TempPathFactory,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.chdir(tmp_path)
    if "pipeline" in arguments:
        arguments[1] = str(convert(TINY, out=tmp_path_factory.mktemp("given") / "pipeline").out)
    whole = run(AT, 0, 0, *arguments)
    assert whole.returncode == 0, whole.stderr
    events, complete = int(whole.stdout.rpartition("events")[2]), tree(tmp_path)
    assert events > 500
    kept = 0
    for moment in range(moments):
        for path in sorted(tmp_path.rglob("*"), reverse=True):
            path.rmdir() if path.is_dir() else path.unlink()
        number = (signal.SIGINT, signal.SIGTERM)[moment % 2]
        done = run(AT, 1 + moment * (events - 1) // moments, int(number), *arguments)
        assert done.returncode == 128 + number, done.stderr
        message = done.stderr.splitlines()[-1]
        assert "Traceback" not in done.stderr and "ignored" not in done.stderr
        assert message.startswith("kcv2diffusers: interrupted; ")
        if "nothing was written" in message:
            assert not [path for path in tmp_path.rglob("*") if path.is_file()]
        else:
            kept += 1
            assert tree(tmp_path) == complete, message
    assert kept <= moments // 2


def test_a_library_swallows_it() -> None:
    """As Keras' trace on PyTorch does. Cleaning up afterwards is not disturbed."""
    code = f"""
import os, signal, time
from kcv2diffusers.system.interruption import interruptible
with interruptible():
    try:
        os.kill(os.getpid(), signal.SIGINT)
        time.sleep({LONG})
    except:
        pass
    try:
        time.sleep({LONG})
    finally:
        time.sleep(1)
        print("cleaned up")
"""
    started = time.monotonic()
    done = run(code)
    assert (done.returncode, done.stdout) == (130, "cleaned up\n")
    assert done.stderr == "kcv2diffusers: interrupted; nothing was written.\n"
    assert time.monotonic() - started < LONG


def test_a_library_swallows_it_and_the_work_ends() -> None:
    code = """
import os, signal
from kcv2diffusers.system.interruption import interruptible, keeps
with interruptible():
    keeps("out is complete")
    try:
        os.kill(os.getpid(), signal.SIGTERM)
    except:
        pass
"""
    done = run(code)
    assert (done.returncode, done.stderr) == (143, "kcv2diffusers: interrupted; out is complete.\n")


IN_COMPILED_CODE = """
import hashlib
from kcv2diffusers.system import interruption
interruption._ONE_PRESS = 2  # on a busy machine the two signals of one press may be seen apart
with interruption.interruptible():
    print("ready", flush=True)
    hashlib.pbkdf2_hmac("sha256", b"", b"", 10**9)
"""


def test_the_second_ends_at_once() -> None:
    """In compiled code, which takes no notice of Python's handlers."""
    process = subprocess.Popen(
        [sys.executable, "-c", IN_COMPILED_CODE], stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True
    )
    assert process.stdout is not None and process.stdout.readline() == "ready\n"
    computing, ready = psutil.Process(process.pid), psutil.Process(process.pid).cpu_times().user
    while computing.cpu_times().user < ready + 0.5:  # or else the signal comes before the compiled code does
        time.sleep(0.05)
    process.send_signal(signal.SIGINT)
    process.send_signal(signal.SIGINT)  # by a wrapper too: the same press
    time.sleep(3)
    assert process.poll() is None
    process.send_signal(signal.SIGTERM)
    _, errors = process.communicate(timeout=LONG)
    assert process.returncode == 143
    assert errors.startswith("kcv2diffusers: ended at once; ")
