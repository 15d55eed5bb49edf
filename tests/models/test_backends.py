"""TensorFlow, JAX and PyTorch compute the same, each in a process that imports nothing of the others."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest

BACKENDS = ("tensorflow", "jax", "torch")
SCRIPT = Path(__file__).parent / "backend_run.py"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    results = {}
    for backend in BACKENDS:
        if importlib.util.find_spec(backend) is None:
            continue
        path = tmp_path_factory.mktemp("backends") / f"{backend}.npz"
        command = [sys.executable, SCRIPT, path]
        environment = {**os.environ, "KERAS_BACKEND": backend}
        done = subprocess.run(command, env=environment, capture_output=True, text=True, check=False)
        assert done.returncode == 0, f"{backend}:\n{done.stderr[-3000:]}"
        results[backend] = dict(np.load(path))
    if len(results) < 2:
        pytest.skip("only one backend is installed")
    return results


@pytest.mark.parametrize("part", ["text", "decoder", "encoder", "unet"])
def test_backends_agree(outputs: dict[str, dict[str, Any]], part: str) -> None:
    first, *others = outputs
    expected = outputs[first][part]
    assert np.abs(expected).max() > 0.1
    for backend in others:
        error = np.abs(outputs[backend][part] - expected).max() / np.abs(expected).max()
        assert error < 1e-5, f"{backend} against {first}: {error:.1e}"


def test_gradients_agree(outputs: dict[str, dict[str, Any]]) -> None:
    """Attention has other gradients on each: PyTorch's own, of scores that are computed again elsewhere."""
    first, *others = outputs
    names = [name for name in outputs[first] if name.startswith("gradient-kept")]
    largest = max(float(np.abs(outputs[first][name]).max()) for name in names)
    for backend in others:
        for name in names:
            error = np.abs(outputs[backend][name] - outputs[first][name]).max()
            assert error <= 1e-5 * largest, f"{backend} against {first}: {name}"


def test_attention_keeps_no_scores(outputs: dict[str, dict[str, Any]]) -> None:
    """On JAX; eight layers are differentiated, with room for 18 matrices of scores if they were kept."""
    if "jax" not in outputs:
        pytest.skip("JAX is not installed")
    assert outputs["jax"]["scores"] < 8


def test_rematerialisation_keeps_the_gradients(outputs: dict[str, dict[str, Any]]) -> None:
    for backend, results in outputs.items():
        kept = {name: value for name, value in results.items() if name.startswith("gradient-kept")}
        assert len(kept) > 100
        largest = max(float(np.abs(value).max()) for value in kept.values())
        for name, value in kept.items():
            recomputed = results[name.replace("-kept", "-recomputed")]
            assert np.abs(recomputed - value).max() <= 1e-5 * largest, f"{backend}: {name}"
