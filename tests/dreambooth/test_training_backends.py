"""TensorFlow, JAX and PyTorch train alike, and neither TensorFlow nor keras-cv is imported unasked."""

from __future__ import annotations

import csv
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from small import write_base
from test_run import PROMPTS, environment, photos  # noqa: F401  (a fixture)

RUN = """
import sys
from kcv2diffusers.cli import main
try:
    main()
finally:
    unasked = {"tensorflow", "keras_cv"} - {sys.argv[-1]}
    assert not unasked & set(sys.modules), unasked & set(sys.modules)
"""


def losses(backend: str, photos: Path, out: Path) -> list[float]:  # noqa: F811
    options = [
        "--instance-images", photos, "--class-images", photos, "--num-class-images", "3", "--base",
        out.parent / "base", "--out", out, "--steps", "3", "--learning-rate", "1e-3", *PROMPTS,
        "--train-text-encoder", "--sample-prompt", backend,
    ]  # fmt: skip
    command = [sys.executable, "-c", RUN, "dreambooth", *map(str, options)]
    done = subprocess.run(command, env=environment(backend), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr[-3000:]
    with (out / "log.csv").open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


@pytest.mark.parametrize("backend", ["tensorflow", "jax"])
def test_backends_train_alike(
    backend: str,
    photos: Path,  # noqa: F811
    tmp_path_factory: pytest.TempPathFactory,
) -> None:
    folder = tmp_path_factory.mktemp("backends")
    (folder / "base").mkdir()
    write_base(folder / "base")
    expected = losses("torch", photos, folder / "torch")
    got = losses(backend, photos, folder / backend)
    np.testing.assert_allclose(got, expected, rtol=2e-4)
    assert len(set(expected)) == 3
