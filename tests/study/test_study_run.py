"""A study of the tiny base: killed in mid-run and gone on with, runs that fail, and its page in Chromium."""

from __future__ import annotations

import csv
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import psutil
import pytest
from support.checkpoints import ROOT
from support.ray_clusters import COMPUTER, ray_cluster
from support.waiting import LONG, until

from kcv2diffusers import locate

pytestmark = pytest.mark.slow

PYTHON = ROOT / ".venv-space" / "bin" / "python"
HOSTILE = '</script><script>injected=1</script><b onclick="x">&amp;'
STUDY = f"""
name = {json.dumps(HOSTILE)}
[train]
base = "tiny"
instance-images = ["photos", "missing"]
instance-prompt = "a sks cat"
class-prompt = "a cat"
num-class-images = 2
sample-steps = 2
steps = 6
learning-rate = [1e-4, 1e-3]
checkpoint-every = 2
[sample]
prompts = ["a sks cat in the snow"]
class-prompts = ["a cat <i>in</i> the snow"]
scheduler = ["kerascv", "ddim"]
steps = 2
batch-size = 4
"""


def start(folder: Path, *options: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "kcv2diffusers", "study", "grid.toml", "--json", *options]
    return subprocess.Popen(command, cwd=folder, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def trained_steps(folder: Path) -> list[int]:
    """The steps in a run's log."""
    with (folder / "train" / "log.csv").open(newline="") as file:
        return [int(row["step"]) for row in csv.DictReader(file)]


@pytest.fixture(scope="module")
def done(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, dict[str, Any]]:
    """The folder of a study whose command was killed after the first training, and its result."""
    folder = tmp_path_factory.mktemp("study")
    shutil.copytree(locate("tiny") / "subject", folder / "photos")
    (folder / "grid.toml").write_text(STUDY)
    first = start(folder)
    until(lambda: [*folder.glob("grid/runs/*/pictures/*.png")], first)
    marks = {path: path.stat().st_mtime_ns for path in folder.glob("grid/runs/*/trained.json")}
    first.send_signal(signal.SIGKILL)
    first.communicate()
    drawn = {path: path.stat().st_mtime_ns for path in folder.glob("grid/runs/*/pictures/*.png")}
    second = start(folder)
    out, err = second.communicate(timeout=LONG)
    assert second.returncode == 1 and "2 runs failed" in err, err  # those without photos
    for path, changed in {**marks, **drawn}.items():  # nothing is done again
        assert path.stat().st_mtime_ns == changed
    assert len(marks) == 1
    return folder / "grid", json.loads(out)


def test_each_run_is_trained_once(done: tuple[Path, dict[str, Any]]) -> None:
    out, told = done
    assert len(told["cells"]) == 8 and len(told["failed"]) == 2
    assert all("missing: no such folder" in reason for reason in told["failed"].values())
    good = [cell for cell in told["cells"] if not cell["reason"]]
    assert len(good) == 4 and all(cell["measures"].keys() == {"subject", "class"} for cell in good)
    assert told["cells"][:4] == good and [c["score"] for c in good] == sorted(
        (c["score"] for c in good), reverse=True
    )
    for run in {cell["run"] for cell in good}:
        assert trained_steps(out / "runs" / run) == [1, 2, 3, 4, 5, 6]
        legs = json.loads((out / "runs" / run / "train" / "legs.json").read_text())
        assert len(legs) == 1
        assert len([*(out / "runs" / run / "pictures").glob("*.png")]) == 8
        assert not (out / "runs" / run / "train" / "checkpoints").exists()
    assert len([*out.glob("class/*/class-*.png")]) == 2  # of both runs
    again = time.monotonic()
    second = subprocess.run(
        [sys.executable, "-m", "kcv2diffusers", "study", "grid.toml", "--quiet"], cwd=out.parent,
        capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert second.returncode == 1 and second.stdout.splitlines()[-1] == "4 of 8 cells of 4 runs"
    assert time.monotonic() - again < LONG


def test_a_training_that_is_killed_goes_on(tmp_path: Path) -> None:
    """Its process saves and ends when the command is killed; the next one goes on with its steps."""
    shutil.copytree(locate("tiny") / "subject", tmp_path / "photos")
    text = STUDY.replace('["photos", "missing"]', '"photos"').replace("[1e-4, 1e-3]", "1e-4")
    text = text.replace("\nsteps = 6\n", "\nsteps = 40\n").replace('class-prompt = "a cat"\n', "")
    (tmp_path / "grid.toml").write_text(text.replace('["kerascv", "ddim"]', '"kerascv"'))
    first = start(tmp_path)
    until(lambda: [*tmp_path.glob("grid/runs/*/train/resume/step-*.h5")], first)
    first.kill()
    first.communicate()
    second = start(tmp_path)
    out, err = second.communicate(timeout=LONG)
    assert second.returncode == 0, err
    (run,) = (tmp_path / "grid" / "runs").iterdir()
    assert trained_steps(run) == [*range(1, 41)]
    legs = json.loads((run / "train" / "legs.json").read_text())
    assert legs[0]["start"] == 0 and 0 < legs[1]["start"] <= 40 and len(legs) == 2
    assert json.loads(out)["failed"] == {}


def test_on_a_cluster_that_loses_a_computer(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A run has a GPU (one that Ray is told of); when its computer is lost, it goes on with another's."""
    monkeypatch.setenv("RAY_USAGE_STATS_ENABLED", "0")
    shutil.copytree(locate("tiny") / "subject", tmp_path / "photos")
    text = STUDY.replace('["photos", "missing"]', '"photos"').replace("\nsteps = 6\n", "\nsteps = 30\n")
    text = text.replace('class-prompt = "a cat"\n', "").replace("[1e-4, 1e-3]", "1e-4")
    (tmp_path / "grid.toml").write_text(text.replace('["kerascv", "ddim"]', '"kerascv"'))
    with ray_cluster() as cluster:
        # the only computer with a GPU has the run for certain
        victim = cluster.add_node(num_gpus=1, **COMPUTER)
        cluster.wait_for_nodes(LONG)
        process = start(tmp_path, "--ray", cluster.address, "--gpus", "1")
        until(lambda: [*tmp_path.glob("grid/runs/*/train/resume/step-000004.h5")], process)  # 2 is complete
        (raylet,) = victim.all_processes["raylet"]
        for lost in psutil.Process(raylet.process.pid).children(recursive=True):
            lost.kill()  # Ray would leave the training to end itself
        cluster.remove_node(victim, allow_graceful=False)
        cluster.add_node(num_gpus=1, **COMPUTER)
        out, err = process.communicate(timeout=LONG)
    assert process.returncode == 0, err
    assert json.loads(out)["failed"] == {}
    (run,) = (tmp_path / "grid" / "runs").iterdir()
    assert trained_steps(run) == [*range(1, 31)]
    assert len(json.loads((run / "train" / "legs.json").read_text())) == 2


@pytest.mark.skipif(not PYTHON.exists(), reason="needs Playwright in .venv-space (make venv-space)")
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium (apt-get install chromium)")
def test_the_page(done: tuple[Path, dict[str, Any]], tmp_path: Path) -> None:
    out, told = done
    page = (out / "study.html").read_text()
    assert str(out.parent) not in page and page.count("<script") == 2
    seen = subprocess.run(
        [PYTHON, ROOT / "tests" / "support" / "drive_study.py", out / "study.html", tmp_path],
        capture_output=True, text=True, check=False, timeout=LONG,
    )  # fmt: skip
    assert seen.returncode == 0, seen.stderr[-3000:]
    found = json.loads(seen.stdout)
    good = [cell for cell in told["cells"] if not cell["reason"]]
    assert found["errors"] == [] and len(found["requests"]) == 1 and found["injected"] is False
    assert found["title"] == found["heading"] == HOSTILE and found["wide"] is False
    assert found["first"] == [cell["cell"] for cell in good] and found["focused"] == good[1]["cell"]
    assert found["by_class"] == [
        cell["cell"] for cell in sorted(good, key=lambda cell: -cell["measures"]["class"])
    ]
    assert (found["charts"], found["dots"], found["left"], found["count"]) == (2, 4, 2, "2 of 4 cells")
    assert found["drawn"] == 2 * 64 + 2  # a column for each prompt
    assert [line[:6] for line in found["large"]] == ["1 of 4", "2 of 4"] and "--steps 6" in found["train"]
    assert "'a sks cat in the snow'" in found["draw"]
