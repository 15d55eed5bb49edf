"""Runs of several processes on CPUs train as one process does, and begin and end together."""

from __future__ import annotations

import csv
import itertools
import json
import os
import re
import shutil
import signal
import socket
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import h5py
import numpy as np
import pytest
import support.dreambooth
from PIL import Image
from support.checkpoints import small_base
from support.dreambooth.run import PROMPTS, arguments, command, environment, run
from support.frameworks import XLA_FLAGS
from support.waiting import LONG, until

from kcv2diffusers.dreambooth import devices
from kcv2diffusers.dreambooth.batches import Examples
from kcv2diffusers.dreambooth.config import Config, make_config
from kcv2diffusers.dreambooth.photos import find_photos
from kcv2diffusers.dreambooth.ranks import Group, joined, rank
from kcv2diffusers.errors import Error

# The command, which prints a hash of the trained weights and the optimizer's state.
NOTING = """
import hashlib
import sys

import keras
from kcv2diffusers.cli import main
from kcv2diffusers.dreambooth.model import DreamBooth

fit = DreamBooth.fit

def noting(self, *given, **options):
    fit(self, *given, **options)
    digest = hashlib.sha256()
    for variable in (*self.trainable_variables, *self.optimizer.variables):
        digest.update(keras.ops.convert_to_numpy(variable).tobytes())
    print("state", digest.hexdigest(), file=sys.stderr)

DreamBooth.fit = noting
main()
"""
FEW = [*PROMPTS, "--num-class-images", "2", "--sample-steps", "2", "--learning-rate", "1e-5"]


@pytest.fixture(scope="module")
def base() -> Path:
    return small_base()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number in range(3):
        Image.fromarray(rng.integers(0, 255, (64, 64, 3), "uint8")).save(folder / f"{number}.png")
    Image.fromarray(rng.integers(0, 255, (64, 64), "uint8")).save(folder / "0-mask.png")
    (folder / "1.txt").write_text("a red sks car")
    return folder


def start(
    count: int, given: list[str], backend: str = "torch", flags: dict[str, str] | None = None
) -> list[subprocess.Popen[str]]:
    """The processes of a run, as a cluster's launcher starts them."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    found = []
    for number in range(count):
        variables = {"RANK": number, "LOCAL_RANK": number, "WORLD_SIZE": count}
        variables |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
        if backend == "jax":
            names = {"PROCESS_ID": number, "NUM_PROCESSES": count, "JOB_ADDRESSES": f"127.0.0.1:{port}"}
            variables = {f"KERAS_DISTRIBUTION_{name}": value for name, value in names.items()}
            variables |= {"XLA_FLAGS": XLA_FLAGS, "JAX_PLATFORMS": "cpu"}
        found.append(
            subprocess.Popen(
                given,
                env=environment(backend)
                | {name: str(value) for name, value in variables.items()}
                | (flags or {}),
                stdout=subprocess.PIPE,
                stderr=subprocess.PIPE,
                text=True,
            )
        )
    return found


def end(processes: list[subprocess.Popen[str]]) -> list[tuple[int, str, str]]:
    """The exit code and the output of each process."""
    found = []
    for process in processes:
        try:
            out, err = process.communicate(timeout=LONG)
        except subprocess.TimeoutExpired:
            for each in processes:
                each.kill()
            raise
        found.append((process.returncode, out, err))
    return found


def noted(*given: str | Path) -> list[str]:
    return [sys.executable, "-c", NOTING, *arguments(*given)]


def check_alike(ended: list[tuple[int, str, str]]) -> None:
    """All processes have ended well and in one state, and only the first has printed anything."""
    assert [code for code, _, _ in ended] == [0] * len(ended), ended
    states = {line for _, _, err in ended for line in err.splitlines() if line.startswith("state ")}
    assert len(states) == 1
    assert "Training" in ended[0][2] and "Step " in ended[0][1]
    for _, out, err in ended[1:]:
        printed = [line for line in out.splitlines() if not line.startswith("[Gloo]")]  # by JAX, on CPUs
        assert not printed and "Training" not in err and "Encoding" not in err


def state(out: Path, step: int) -> dict[str, np.ndarray]:
    with h5py.File(out / "resume" / f"step-{step:06}.h5") as file:
        groups = (file["trainable"], file["optimizer"])
        return {item.name: item[()].astype("float64") for group in groups for item in group.values()}


def check_same(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> None:
    """The same weights and optimizer state, but for the order of sums."""
    assert one.keys() == other.keys()
    assert max(np.abs(one[name] - other[name]).max() for name in one) < 1e-6
    sums = [
        sum(values.sum() for name, values in each.items() if "trainable" in name) for each in (one, other)
    ]
    assert abs(sums[0] - sums[1]) < 1e-6 * abs(sums[0])


def rows(out: Path) -> list[dict[str, str]]:
    with (out / "log.csv").open() as file:
        return list(csv.DictReader(file))


@pytest.fixture(scope="module")
def whole(base: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Four steps in one process."""
    out = tmp_path_factory.mktemp("one") / "out"
    done = run(base, photos, out, *FEW, "--batch-size", "2", "--steps", "4")
    assert done.returncode == 0, done.stderr
    return out


@pytest.mark.slow
def test_torchrun(base: Path, photos: Path, whole: Path, tmp_path: Path) -> None:
    """Two processes by the documented command, from the class pictures to the export."""
    out = tmp_path / "out"
    given = [
        *FEW,
        "--batch-size",
        "2",
        "--steps",
        "4",
        "--sample-prompt",
        "a car",
        "--export",
        tmp_path / "p",
    ]
    launched = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2"]
    done = subprocess.run(
        [*launched, *command(base, photos, out, *given)[1:]],
        env=environment(),
        capture_output=True,
        text=True,
        timeout=LONG,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("Step 4: ") == 1 and done.stderr.count("Training 4/4") == 1
    check_same(state(whole, 4), state(out, 4))
    for one, two in zip(rows(whole), rows(out), strict=True):
        np.testing.assert_allclose(float(two["loss"]), float(one["loss"]), rtol=1e-4)
    for path in (whole / "class").iterdir():
        both = [np.asarray(Image.open(each / "class" / path.name), "int") for each in (whole, out)]
        assert np.abs(both[0] - both[1]).max() <= 1
    assert len(list((out / "class").iterdir())) == 2
    assert (out / "samples" / "step-000004.png").exists() and (tmp_path / "p" / "model_index.json").exists()
    assert [leg["processes"] for leg in json.loads((out / "legs.json").read_text())] == [2]


@pytest.mark.slow
def test_low_rank_updates_and_averages(base: Path, photos: Path, whole: Path, tmp_path: Path) -> None:
    """They go on with what one process began; one trains on a photo, the other on a picture of the class."""
    options = [
        *FEW, "--class-images", whole / "class", "--lora-rank", "2", "--ema", "0.9",
        "--accumulate", "2", "--train-text-encoder", "--snr-gamma", "5", "--offset-noise", "0.1", "--flip",
        "--no-cache", "--prior-weight", "0.5", "--checkpoint-every", "1", "--keep-checkpoints", "3",
        "--masks", "--caption-dropout", "0.3", "--validation-images", photos, "--validation-every", "2",
    ]  # fmt: skip
    done = run(base, photos, tmp_path / "one", *options, "--steps", "3")
    assert done.returncode == 0, done.stderr
    for path in ("checkpoints/step-000001", "resume/step-000001.h5", "validation.csv"):
        source, target = tmp_path / "one" / path, tmp_path / "two" / path
        target.parent.mkdir(parents=True, exist_ok=True)
        (shutil.copytree if source.is_dir() else shutil.copy)(source, target)
    resumed = [*options, "--steps", "3", "--resume"]
    check_alike(end(start(2, noted(base, photos, tmp_path / "two", *resumed))))
    for step in (2, 3):
        check_same(state(tmp_path / "one", step), state(tmp_path / "two", step))
    one, two = (
        np.loadtxt(tmp_path / out / "validation.csv", delimiter=",", skiprows=1) for out in ("one", "two")
    )
    assert one[:, 0].tolist() == [0, 2, 3]
    np.testing.assert_allclose(two, one, rtol=1e-5)


@pytest.mark.slow
def test_tokens_by_prodigy(base: Path, photos: Path, tmp_path: Path) -> None:
    """The embeddings have gradients of all photos, and Prodigy one estimate for all processes."""
    options = ["--instance-prompt", "a sks <car>", "--no-captions", "--train-token", "sks"]
    options += ["--train-token", "<car>", "--optimizer", "prodigy", "--batch-size", "2", "--steps", "3"]
    done = run(base, photos, tmp_path / "one", *options)
    assert done.returncode == 0, done.stderr
    check_alike(end(start(2, noted(base, photos, tmp_path / "two", *options))))
    one, two = (state(tmp_path / out, 3) for out in ("one", "two"))
    assert one.keys() == two.keys()
    for name, values in one.items():
        np.testing.assert_allclose(two[name], values, rtol=1e-4, atol=1e-4 * np.abs(values).max())


@pytest.mark.full_size  # half a minute of a processor
def test_four_go_on_where_one_began(base: Path, photos: Path, whole: Path, tmp_path: Path) -> None:
    """Each of the four has a photo or a picture of the class."""
    options = [*FEW, "--class-images", whole / "class", "--batch-size", "2"]
    done = run(base, photos, tmp_path, *options, "--steps", "2")
    assert done.returncode == 0, done.stderr
    check_alike(end(start(4, noted(base, photos, tmp_path, *options, "--steps", "4", "--resume"))))
    check_same(state(whole, 4), state(tmp_path, 4))
    assert [row["step"] for row in rows(tmp_path)] == ["1", "2", "3", "4"]
    legs = json.loads((tmp_path / "legs.json").read_text())
    assert [(leg["start"], leg["processes"]) for leg in legs] == [(0, 1), (2, 4)]


@pytest.mark.slow
@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_process_that_is_stopped(
    base: Path, photos: Path, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    options = [*FEW, "--class-images", whole / "class", "--checkpoint-every", "2"]
    processes = start(2, command(base, photos, tmp_path, *options, "--steps", "100000"))
    until(lambda: list((tmp_path / "resume").glob("step-*.h5")), processes[0])
    processes[1].send_signal(number)
    if number == signal.SIGTERM:  # as a cluster does that sends it to the launcher too
        processes[1].send_signal(number)
    (code, out, err), (other, _, other_err) = end(processes)
    steps = sorted(int(path.stem[5:]) for path in (tmp_path / "resume").glob("step-*.h5"))
    if number == signal.SIGTERM:
        assert (code, other) == (143, 143), (err, other_err)
        assert f"Step {steps[-1]}" in out and "--resume goes on" in out
    else:
        assert (code, other) == (1, -signal.SIGKILL), err
        assert "Another process of this run has ended" in err and "Traceback" not in err
    done = run(base, photos, tmp_path, *options, "--steps", str(steps[-1] + 1), "--resume")
    assert done.returncode == 0, done.stderr
    assert len(rows(tmp_path)) == steps[-1] + 1


@pytest.mark.full_size  # XLA compiles for minutes of a processor in each process
def test_jax(base: Path, photos: Path, whole: Path, tmp_path: Path) -> None:
    """Two processes train as one process of PyTorch does, and draw."""
    options = [*FEW, "--class-images", whole / "class", "--batch-size", "2", "--sample-prompt", "a car"]
    check_alike(end(start(2, noted(base, photos, tmp_path, *options, "--steps", "4"), "jax")))
    check_same(state(whole, 4), state(tmp_path, 4))
    assert (tmp_path / "samples" / "step-000004.png").exists()


@pytest.mark.slow
def test_averages_and_held_out_photos_on_jax(tmp_path: Path) -> None:
    """One device, two of one process, and two processes: alike, of a network that compiles at once."""
    script = Path(support.dreambooth.__file__).with_name("jax_run.py")
    found = []
    for count, processes in ((1, 1), (2, 1), (1, 2)):
        out = tmp_path / f"{count}-{processes}"
        out.mkdir()
        flags = {"XLA_FLAGS": f"--xla_force_host_platform_device_count={count}"}
        ended = end(start(processes, [sys.executable, str(script), str(out), str(count)], "jax", flags))
        assert [code for code, _, _ in ended] == [0] * processes, ended
        (printed,) = (line for _, text, _ in ended for line in text.splitlines() if line.startswith("[["))
        found.append(json.loads(printed))
    rows, sums = found[0]
    assert [step for step, _ in rows] == [0, 2, 4, 5] and rows[-1][1] < rows[0][1]
    for other in found[1:]:
        np.testing.assert_allclose(other[0], rows, rtol=1e-6)
        np.testing.assert_allclose(other[1], sums, rtol=1e-6)


# What can be known in one process.


class Third(Group):
    """The third of three processes; the others gave what `others` says."""

    others = 0

    def sum(self, values: np.ndarray) -> np.ndarray:
        return values + self.others


def test_shares() -> None:
    batch = {"latents": np.arange(12).reshape(6, 2), "prior": np.arange(6)}
    parts = [Group(number, 3).part(batch) for number in range(3)]
    for name, values in batch.items():
        assert np.array_equal(np.concatenate([part[name] for part in parts]), values)
    shares = [item for number in range(3) for item in Group(number, 3).share(range(7))]
    assert sorted(shares) == list(range(7))


def test_what_each_encodes_is_exchanged(photos: Path) -> None:
    """Each process encodes its share, flipped too, and then has all, with the masks."""

    def make(asked: list[int]) -> Examples:
        def encoded(images: np.ndarray) -> np.ndarray:
            asked.append(1)
            return np.tile(images[:, ::8, ::8, :1], 8)

        return Examples(find_photos(photos).found, {}, encoded, 64, flip=True, masked=True)

    wanted = [(number, (64, 64)) for number in range(3)]
    views = [(flip, (0.5, 0.5)) for flip in (False, True)]
    whole = make([])
    whole.fill(wanted, lambda *_: None)
    for place in range(2):
        asked: list[int] = []
        part, given = make(asked), iter(whole._moments.values())

        class Pair(Group):
            def sum(self, values: np.ndarray) -> np.ndarray:
                expected = next(given)  # noqa: B023
                assert not values.any() or np.array_equal(values, expected)
                return expected

        group = Pair(place, 2)
        part.fill(group.share(wanted), lambda *_: None)
        part.exchange(wanted, group)
        part.encode = None
        assert len(asked) == 2 * (2 - place)
        for (number, size), view in itertools.product(wanted, views):
            for name in ("moments", "mask"):
                one, other = (getattr(each, name)(number, size, view) for each in (part, whole))
                np.testing.assert_array_equal(one, other)
    assert whole.mask(0, (64, 64), views[0]).std() > 0.01


def test_processes_that_differ_are_refused() -> None:
    Group().check_same("a", "b")
    with pytest.raises(Error, match="ranks 0 and 2 have other options, photos or versions"):
        Third(2, 3).check_same("a", "b")


def test_a_step_that_cannot_be_divided_is_refused() -> None:
    assert devices.devices_of(Config(batch_size=3, class_prompt="a car"), Third(2, 3)) == []
    with pytest.raises(Error, match="3 processes with 3 devices: the 4 pictures of a step cannot be divided"):
        devices.devices_of(Config(batch_size=2, class_prompt="a car"), Third(2, 3))
    with pytest.raises(Error, match="--devices 2 is for one process; this run has 3"):
        devices.devices_of(Config(devices=2), Third(2, 3))


def test_launchers(monkeypatch: pytest.MonkeyPatch) -> None:
    """A launcher of one process is none; one for another backend is refused."""
    for name in ("RANK", "WORLD_SIZE", "MASTER_ADDR"):
        monkeypatch.delenv(name, raising=False)
    addresses = {"PROCESS_ID": "1", "NUM_PROCESSES": "1", "JOB_ADDRESSES": "localhost:1"}
    for name, value in addresses.items():
        monkeypatch.setenv(f"KERAS_DISTRIBUTION_{name}", value)
    with joined("torch") as group:
        assert (group.rank, group.count, rank()) == (0, 1, 0)
    monkeypatch.setenv("KERAS_DISTRIBUTION_NUM_PROCESSES", "2")
    assert rank() == 1
    with pytest.raises(Error, match="for another backend than torch"), joined("torch"):
        pass
    assert os.environ["KERAS_DISTRIBUTION_PROCESS_ID"] == "1"


# The recipes of the guide, with commands that stand for those of a cluster.

GUIDE = Path(__file__).parents[2] / "docs" / "guides" / "several-gpus.md"
STANDINS = {
    "scontrol": "echo node-1; echo node-2",
    "srun": """shift
        for number in 0 1 2 3 4 5 6 7; do
            SLURM_PROCID=$number SLURM_LOCALID=$((number % 4)) SLURM_NTASKS=8 "$@"
        done""",
    "kcv2diffusers": 'echo "$RANK $LOCAL_RANK $WORLD_SIZE $MASTER_ADDR $MASTER_PORT $KERAS_BACKEND $*"',
    "torchrun": 'echo "$KERAS_BACKEND $*"',
}


@pytest.fixture
def recipe(tmp_path: Path) -> Callable[..., list[str]]:
    for name, script in STANDINS.items():
        (tmp_path / name).write_text(f"#!/bin/bash\n{script}\n")
        (tmp_path / name).chmod(0o755)

    def run(script: str, **variables: str) -> list[str]:
        given = os.environ | variables | {"PATH": f"{tmp_path}:{os.environ['PATH']}"}
        done = subprocess.run(
            ["bash", "-euc", script], env=given, capture_output=True, text=True, check=False, timeout=LONG
        )
        assert done.returncode == 0, done.stderr
        return done.stdout.splitlines()

    return run


def blocks(language: str) -> list[str]:
    return re.findall(rf"```{language}\n(.*?)```", GUIDE.read_text(encoding="utf-8"), re.S)


def check_options(line: str) -> None:
    """The command line after `dreambooth` is understood."""
    given = dict(re.findall(r"--(\S+) ((?:(?!--).)+)", line.partition(" dreambooth ")[2] + " "))
    values: dict[str, Any] = {name.replace("-", "_"): text.strip() for name, text in given.items()}
    config = make_config(values | {"base": [values["base"]], "batch_size": int(values["batch_size"])})
    assert config.prior_preservation and line.endswith(" --resume")
    assert 2 * config.batch_size % 16 == 0 and config.export


def test_the_recipe_for_slurm(recipe: Callable[..., list[str]]) -> None:
    (script,) = (block for block in blocks("sh") if "#SBATCH" in block)
    lines = recipe(script, SLURM_JOB_NODELIST="node-[1-2]")
    starts = [f"{n} {n % 4} 8 node-1 29500 torch dreambooth --base" for n in range(8)]
    assert len(lines) == 8 and all(map(str.startswith, lines, starts)), lines
    check_options(lines[0])


def test_the_recipe_for_skypilot(recipe: Callable[..., list[str]]) -> None:
    import yaml

    task = yaml.safe_load(blocks("yaml")[0])
    assert task["num_nodes"] == 2 and task["resources"] == {"accelerators": "H100:8"}
    (line,) = recipe(
        task["run"], SKYPILOT_NUM_NODES="2", SKYPILOT_NODE_RANK="1", SKYPILOT_NUM_GPUS_PER_NODE="8",
        SKYPILOT_NODE_IPS="10.0.0.1\n10.0.0.2",
    )  # fmt: skip
    assert line.startswith(
        "torch --nnodes 2 --node-rank 1 --nproc-per-node 8 --master-addr 10.0.0.1 --master-port 29500 "
        "-m kcv2diffusers dreambooth --base sd15/ "
    )
    check_options(line)
