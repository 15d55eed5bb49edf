"""TensorFlow, JAX and PyTorch train alike, on one device or two, and neither TensorFlow nor keras-cv is
imported unasked.
"""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
from PIL import Image
from support.checkpoints import small_base
from support.dreambooth.run import PROMPTS, environment, in_fork
from support.frameworks import XLA_FLAGS

pytestmark = pytest.mark.slow

RUN = """
import os
import sys

from kcv2diffusers.cli import main

try:
    main()
finally:
    unasked = {"tensorflow", "keras_cv"} - {os.environ["KERAS_BACKEND"]}
    assert not unasked & set(sys.modules), unasked & set(sys.modules)
"""

# Keeps the weights of each checkpoint beside it, read in the moment when it is asked for.
NOTING = """
import numpy as np
from kcv2diffusers.dreambooth import checkpoints

save = checkpoints.Checkpoints.save

def noting(self, step, **options):
    self.trainer.jax_state_sync()
    values = [np.array(checkpoints.current(variable)) for variable in self.trainer.trainable_variables]
    np.savez(self.folder / f"{step}.npz", *values)
    save(self, step, **options)

checkpoints.Checkpoints.save = noting
"""


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A base and photos of two proportions: at resolution 128, steps of two sizes."""
    folder = tmp_path_factory.mktemp("backends")
    for name in ("photos", "class"):
        (folder / name).mkdir()
    rng = np.random.default_rng(0)
    for number, size in enumerate([(64, 64), (64, 180), (64, 64)]):
        for kind in ("photos", "class"):
            Image.fromarray(rng.integers(0, 255, (*size, 3), "uint8")).save(folder / kind / f"{number}.png")
    return folder


def losses(
    backend: str,
    folder: Path,
    out: str,
    *options: str,
    flags: str = "",
    forked: bool = False,
    script: str = RUN,
) -> list[float]:
    """Those of a run in a process of its own, or in a fork as those of test_run."""
    given = [
        "--instance-images", folder / "photos", "--class-images", folder / "class", "--num-class-images", "3",
        "--base", small_base(), "--out", folder / out, "--steps", "4", "--learning-rate", "1e-4", *PROMPTS,
        "--train-text-encoder", *options,
    ]  # fmt: skip
    command = [sys.executable, "-c", script, "dreambooth", *map(str, given)]
    variables = environment(backend) | {"XLA_FLAGS": f"{XLA_FLAGS} {flags}"}
    done = (
        in_fork(small_base(), "dreambooth", *given)
        if forked
        else subprocess.run(command, env=variables, capture_output=True, text=True, check=False)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    with (folder / out / "log.csv").open() as file:
        found = [float(row["loss"]) for row in csv.DictReader(file)]
    assert len(set(found)) == 4
    return found


@pytest.fixture(scope="module")
def expected(folder: Path) -> list[float]:
    return losses("torch", folder, "torch")


@pytest.fixture(scope="module")
def on_jax(folder: Path) -> list[float]:
    return losses(
        "jax", folder, "jax", "--checkpoint-every", "2", "--keep-checkpoints", "3", script=NOTING + RUN
    )


def test_jax_trains_alike(on_jax: list[float], expected: list[float]) -> None:
    np.testing.assert_allclose(on_jax, expected, rtol=2e-4)


def test_a_checkpoint_of_jax_is_of_its_step(on_jax: list[float], folder: Path) -> None:
    """JAX gives the memory of a step's weights to the next step, while the checkpoint is being written."""
    found = []
    for step in (2, 4):
        with h5py.File(folder / "jax" / "resume" / f"step-{step:06}.h5") as file:
            found.append([file["trainable"][str(n)][()] for n in range(len(file["trainable"]))])
        with np.load(folder / "jax" / f"{step}.npz") as noted:
            assert all(np.array_equal(noted[name], one) for name, one in zip(noted, found[-1], strict=True))
    assert not np.array_equal(found[0][0], found[1][0])


@pytest.mark.full_size  # XLA compiles for one and a half minutes of a processor, as much as all other runs
def test_two_devices_train_as_one(folder: Path, expected: list[float]) -> None:
    """Two of JAX's devices on this machine's CPU; a drawing of one picture at the end."""
    flags = "--xla_force_host_platform_device_count=2"
    drawn = ["--sample-prompt", "a red car", "--sample-steps", "2"]
    found = losses("jax", folder, "two", "--devices", "2", *drawn, flags=flags)
    np.testing.assert_allclose(found, expected, rtol=2e-4)
    assert list((folder / "two" / "samples").iterdir())


def test_tensorflow_trains_alike_at_several_sizes(folder: Path) -> None:
    sizes = ["--resolution", "128"]
    expected = losses("torch", folder, "torch-sizes", *sizes, forked=True)
    np.testing.assert_allclose(losses("tensorflow", folder, "tensorflow", *sizes), expected, rtol=2e-4)


def test_bfloat16_trains_alike(folder: Path, expected: list[float]) -> None:
    found = losses("torch", folder, "bfloat16", "--precision", "mixed_bfloat16", forked=True)
    np.testing.assert_allclose(found, expected, rtol=0.02)
    assert not np.allclose(found, expected, rtol=1e-6), "computed in float32"


def test_float16_trains(folder: Path) -> None:
    """The first step is skipped: scaled by 2**15, some of this base's gradients are no float16 numbers."""
    found = losses("torch", folder, "float16", "--precision", "mixed_float16", forked=True)
    untrained = losses("torch", folder, "untrained", "--learning-rate", "0", forked=True)
    np.testing.assert_allclose(found[:2], untrained[:2], rtol=0.001)
    assert not np.allclose(found[:2], untrained[:2], rtol=1e-6), "computed in float32"
    assert (np.subtract(untrained[2:], found[2:]) > 0.1).all(), "untrained after the second step"


def test_devices_that_are_not_there(folder: Path) -> None:
    with pytest.raises(AssertionError, match=r"--devices 3: this machine has 1 \(cpu:0\)"):
        losses("jax", folder, "three", "--devices", "3")
    with pytest.raises(AssertionError, match="--devices 2 needs JAX; this is torch"):
        losses("torch", folder, "torch-two", "--devices", "2", forked=True)
