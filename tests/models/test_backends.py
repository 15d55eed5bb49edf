"""TensorFlow, JAX and PyTorch compute the same, each in a process that imports nothing of the others."""

from __future__ import annotations

import importlib.util
import os
import subprocess
import sys
from typing import Any

import numpy as np
import pytest
from support.checkpoints import ROOT
from support.frameworks import XLA_FLAGS

pytestmark = pytest.mark.slow

BACKENDS = ("tensorflow", "jax", "torch")
SCRIPT = ROOT / "tests" / "support" / "models" / "backend_run.py"


@pytest.fixture(scope="module")
def outputs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, dict[str, Any]]:
    results = {}
    for backend in BACKENDS:
        if importlib.util.find_spec(backend) is None:
            continue
        path = tmp_path_factory.mktemp("backends") / f"{backend}.npz"
        command = [sys.executable, SCRIPT, path]
        environment = {**os.environ, "KERAS_BACKEND": backend, "XLA_FLAGS": XLA_FLAGS}
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


def gradients_of(results: dict[str, Any], way: str) -> dict[str, Any]:
    start = f"gradient-{way}|"  # `backend_run` writes | for /
    return {name.removeprefix(start): value for name, value in results.items() if name.startswith(start)}


def assert_alike(found: dict[str, Any], expected: dict[str, Any], label: str) -> None:
    assert found.keys() == expected.keys()
    assert len(expected) > 100
    largest = max(float(np.abs(value).max()) for value in expected.values())
    for name, value in expected.items():
        assert np.abs(found[name] - value).max() <= 1e-5 * largest, f"{label}: {name}"


def test_gradients_agree(outputs: dict[str, dict[str, Any]]) -> None:
    """Attention has other gradients on each: PyTorch's own, of scores that are computed again elsewhere."""
    first, *others = outputs
    expected = gradients_of(outputs[first], "kept")
    for backend in others:
        assert_alike(gradients_of(outputs[backend], "kept"), expected, f"{backend} against {first}")


def test_attention_keeps_no_scores(outputs: dict[str, dict[str, Any]]) -> None:
    """On JAX; eight layers are differentiated, with room for 18 matrices of scores if they were kept."""
    if "jax" not in outputs:
        pytest.skip("JAX is not installed")
    assert outputs["jax"]["scores"] < 8


def test_rematerialisation_keeps_the_gradients(outputs: dict[str, dict[str, Any]]) -> None:
    for backend, results in outputs.items():
        assert_alike(gradients_of(results, "recomputed"), gradients_of(results, "kept"), backend)
