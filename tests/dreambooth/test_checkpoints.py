"""Checkpoints are written beside the steps, from copies; what is there is whole, whatever happens."""

from __future__ import annotations

import csv
import errno
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path
from threading import Event
from typing import Any

import h5py
import keras
import numpy as np
import pytest
from PIL import Image
from support.checkpoints import small_base
from support.waiting import LONG, until

from kcv2diffusers.dreambooth import checkpoints, snapshots, train
from kcv2diffusers.dreambooth.checkpoints import Checkpoints, checkpoint_path, saved_steps
from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.errors import Error
from kcv2diffusers.models import UNetConfig, build_unet
from kcv2diffusers.models.base import open_base

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def made() -> Any:
    """A small base, and the trainer of all its UNet with moving averages."""
    config = Config(precision="float32", ema=0.5)
    files = open_base(small_base())
    base = files.load(moments=True)
    trained = train._freeze(config, base)
    return files, base, trained, train._trainer(config, base)


@pytest.fixture
def make(made: Any, tmp_path: Path) -> Callable[..., Checkpoints]:
    files, base, trained, trainer = made

    def make(**options: Any) -> Checkpoints:
        matches = {part: files.parts[part][0] for part in trained}
        return Checkpoints(tmp_path, trainer, trained, matches, base.stated, base.names, **options)

    return make


def change(made: Any, by: float) -> list[np.ndarray]:
    """Other values for all that is saved; the moving averages, in the order of the weights."""
    trainer = made[-1]
    for number, variable in enumerate([*trainer.trainable_variables, *trainer.optimizer.variables]):
        variable.assign(keras.ops.ones_like(variable) * (by + number % 7))
    averages = trainer.optimizer._model_variables_moving_average
    return [np.array(keras.ops.convert_to_numpy(variable)) for variable in averages]


@cache
def reader(config: UNetConfig) -> keras.Model:
    return build_unet(config)


def written(folder: Path, made: Any) -> list[np.ndarray]:
    """The weights of a checkpoint, as Keras loads them."""
    unet = reader(made[1].config.unet)
    unet.load_weights(folder / "unet.weights.h5")
    return [keras.ops.convert_to_numpy(variable) for variable in unet.weights]


def equal(one: list[np.ndarray], other: list[np.ndarray]) -> bool:
    return all(np.array_equal(a, b) for a, b in zip(one, other, strict=True))


def test_a_checkpoint_is_of_its_step_and_the_steps_go_on(
    make: Callable[..., Checkpoints], made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """On a disk that stands still until the weights have changed."""
    disk, write_at = Event(), checkpoints.write_at

    def slow(*given: Any) -> int:
        assert disk.wait(LONG)
        return write_at(*given)

    monkeypatch.setattr(checkpoints, "write_at", slow)
    kept = make(keep=2)
    for step in (1, 2, 3):
        disk.clear()
        averages = change(made, step)
        kept.save(step)
        assert kept.writing and step not in saved_steps(tmp_path)
        change(made, 100)
        disk.set()
        kept.wait()
        assert not kept.writing
        assert equal(written(checkpoint_path(tmp_path, step), made), averages)
    assert saved_steps(tmp_path) == [2, 3]
    kept.restore(3)
    trainer = made[-1]
    for number, variable in enumerate([*trainer.trainable_variables, *trainer.optimizer.variables]):
        assert (keras.ops.convert_to_numpy(variable) == 3 + number % 7).all()
    assert not list(tmp_path.rglob(".*"))


def test_pictures_are_drawn_with_the_averages(make: Callable[..., Checkpoints], made: Any) -> None:
    """And the steps go on with the weights."""
    averages, variables = change(made, 5), made[-1].trainable_variables

    def held() -> list[np.ndarray]:
        return [np.array(keras.ops.convert_to_numpy(variable)) for variable in variables]

    weights = held()
    assert not equal(weights, averages)
    with make().averaged():
        assert equal(held(), averages)
    assert equal(held(), weights)


def test_one_copy_at_a_time(
    make: Callable[..., Checkpoints], made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A checkpoint waits for the one before it, whose copy it takes the place of."""
    kept, lay_out, seen = make(), checkpoints.lay_out, Event()

    def slow(*given: Any) -> list[int]:
        if saved_steps(tmp_path):
            assert seen.wait(LONG)
        else:
            time.sleep(0.5)
        return lay_out(*given)

    monkeypatch.setattr(checkpoints, "lay_out", slow)
    first = change(made, 1)
    kept.save(1)
    kept.save(2)
    assert saved_steps(tmp_path) == [1]
    seen.set()
    second = change(made, 50)
    kept.save(3, last=True)
    assert saved_steps(tmp_path) == [2, 3] and not kept.writing
    assert equal(written(checkpoint_path(tmp_path, 2), made), first)
    assert equal(written(checkpoint_path(tmp_path, 3), made), second)


def test_without_room_for_a_copy_training_waits(
    make: Callable[..., Checkpoints], made: Any, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    notes: list[str] = []
    kept = make(note=notes.append)
    monkeypatch.setattr(snapshots, "free_memory", lambda: 2 * kept.snapshots.bytes - 1)
    averages = change(made, 1)
    for step in (1, 2):
        kept.save(step)
        assert not kept.writing and step in saved_steps(tmp_path)
    assert equal(written(checkpoint_path(tmp_path, 2), made), averages)
    assert len(notes) == 1 and f"{kept.snapshots.bytes / 1e9:.1f} GB" in notes[0]
    assert kept.snapshots._memory is None


def test_what_a_copy_takes(make: Callable[..., Checkpoints], made: Any) -> None:
    """Weights, two moments and the average: 16 bytes a weight, and the number of the step and the rate."""
    count = made[1].unet.count_params()
    assert 0 <= make().snapshots.bytes - 16 * count < 100


@pytest.mark.parametrize("last", [False, True], ids=["thread", "last"])
def test_a_full_disk(
    make: Callable[..., Checkpoints], tmp_path: Path, monkeypatch: pytest.MonkeyPatch, last: bool
) -> None:
    kept = make()
    kept.save(1, last=True)

    def full(*_: Any) -> int:
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(checkpoints, "write_at", full)
    with pytest.raises(Error) as raised:
        kept.save(2, last=last)
        kept.wait()
    assert str(raised.value).splitlines() == [
        f"{tmp_path}: no space left to write a checkpoint; what was written before it is kept.",
        "Free some space, then go on with --resume.",
    ]
    assert saved_steps(tmp_path) == [1] and not list(tmp_path.rglob(".*"))
    kept.restore(1)


def test_an_error_in_a_step_waits_for_the_checkpoint(
    make: Callable[..., Checkpoints], tmp_path: Path
) -> None:
    kept = make()
    with pytest.raises(ValueError, match="in a step"), kept.finished():
        kept.save(1)
        raise ValueError("in a step")
    assert saved_steps(tmp_path) == [1]


@pytest.mark.skipif(sys.platform != "linux", reason="what other systems have free is not asked")
@pytest.mark.parametrize(
    ("line", "files", "left"),
    [
        ("0::/a/b", {"a/memory.max": "3000", "a/memory.current": "1200", "a/b/memory.max": "max"}, 2000),
        (
            "4:cpu,memory:/a",
            {"memory/memory.limit_in_bytes": "900", "memory/memory.usage_in_bytes": "0"},
            1100,
        ),
        ("0::/gone", {}, None),
    ],
    ids=["version 2", "version 1", "no limit"],
)
def test_free_memory_is_that_of_the_control_group(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, line: str, files: dict[str, str], left: int | None
) -> None:
    """200 bytes of what is used are file cache."""
    free = snapshots.free_memory()
    assert 1e6 < free < os.sysconf("SC_PHYS_PAGES") * os.sysconf("SC_PAGE_SIZE")
    for name, content in files.items():
        path = tmp_path / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(content)
        (path.parent / "memory.stat").write_text("inactive_file 200\ntotal_inactive_file 200\n")
    read_text = Path.read_text
    monkeypatch.setattr(
        Path, "read_text", lambda self: line if self == Path("/proc/self/cgroup") else read_text(self)
    )
    monkeypatch.setattr(snapshots, "_CGROUPS", tmp_path)
    found = snapshots.free_memory()
    assert found == left if left else found > 1e6


# A disk that stands still in the second checkpoint, after some of it has been written.
STALLED = """
import sys, time
from pathlib import Path
from kcv2diffusers.cli import main
from kcv2diffusers.dreambooth import checkpoints

write_at, marker, written = checkpoints.write_at, Path(sys.argv.pop(1)), 0

def stalled(fd, data, offset):
    global written
    if checkpoints.saved_steps(marker.parent / "out"):
        written += 1
        if written > 900:
            marker.write_text("")
            time.sleep(600)
    return write_at(fd, data, offset)

checkpoints.write_at = stalled
main()
"""


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    Image.new("RGB", (64, 64), "red").save(folder / "one.png")
    return folder


def command(photos: Path, out: Path, *options: str | Path) -> list[str]:
    given = [
        "dreambooth", "--instance-images", photos, "--instance-prompt", "a red car", "--base", small_base(),
        "--out", out, *options,
    ]  # fmt: skip
    return list(map(str, given))


def environment() -> dict[str, str]:
    return {**os.environ, "KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1"}


def finish(given: list[str], **options: Any) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kcv2diffusers", *given],
        env=environment(),
        capture_output=True,
        text=True,
        check=False,
        **options,
    )


def logged(out: Path) -> list[int]:
    """The steps in the log of a run."""
    with (out / "log.csv").open() as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


def test_a_run_that_is_killed_while_it_writes(photos: Path, tmp_path: Path) -> None:
    """The checkpoint before is whole, and the run goes on from it; what was half written goes away, and
    the log has each step once.
    """
    out, marker = tmp_path / "out", tmp_path / "marker"
    given = command(photos, out, "--steps", "100000", "--checkpoint-every", "4")
    process = subprocess.Popen([sys.executable, "-c", STALLED, str(marker), *given], env=environment())
    until(marker.exists, process)
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert saved_steps(out) == [4]
    half = [path.name for path in (out / "resume").iterdir() if path.name != "step-000004.h5"]
    assert half, "nothing was half written"
    assert max(logged(out)) > 6
    done = finish([*given, "--steps", "6", "--resume"])
    assert done.returncode == 0, done.stderr
    assert saved_steps(out) == [4, 6] and not list(out.rglob(".*"))
    assert logged(out) == [1, 2, 3, 4, 5, 6]
    assert sorted(path.name for path in (out / "resume").iterdir()) == ["step-000004.h5", "step-000006.h5"]
    with h5py.File(checkpoint_path(out, 6) / "unet.weights.h5") as file:
        assert "layers" in file or "_layer_checkpoint_dependencies" in file


def test_a_checkpoint_that_the_system_refuses(photos: Path, tmp_path: Path) -> None:
    """By its limit for the size of files: the message has two lines, and the run ends with 1."""
    import resource

    def limited() -> None:
        resource.setrlimit(resource.RLIMIT_FSIZE, (1 << 20, 1 << 20))

    out = tmp_path / "out"
    given = command(photos, out, "--steps", "100000", "--checkpoint-every", "2")
    done = finish(given, preexec_fn=limited, timeout=LONG)
    assert done.returncode == 1, done.stderr
    first, second = done.stderr.splitlines()[-2:]
    assert "a checkpoint cannot be written: File too large" in first and "--resume" in second
    assert "Traceback" not in done.stderr and saved_steps(out) == []


def test_checkpoints_by_time(photos: Path, tmp_path: Path) -> None:
    out = tmp_path / "out"
    options = ["--checkpoint-minutes", "0.001", "--keep-checkpoints", "100", "--steps", "40"]
    done = finish(command(photos, out, *options))
    assert done.returncode == 0, done.stderr
    found = saved_steps(out)
    assert found[-1] == 40 and len(found) > 3, found
