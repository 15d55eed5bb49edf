"""What the models and the trainer promise, on TensorFlow as well, in a process of its own.

The other tests run on PyTorch, where nothing is compiled (conftest.py).
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

pytestmark = pytest.mark.slow

QUICK = "normalisation or token or decoder or sizes"


@pytest.mark.parametrize(
    ("file", "chosen"),
    [
        ("models/test_models.py", QUICK),
        pytest.param("models/test_models.py", "mixed_bfloat16 and stays", marks=pytest.mark.full_size),
        pytest.param("dreambooth/test_model.py", "noised or merged_kernel", marks=pytest.mark.full_size),
        ("dreambooth/test_optimizers.py", ""),
    ],
)
def test_on_tensorflow(file: str, chosen: str) -> None:
    done = subprocess.run(
        [
            sys.executable,
            "-m",
            "pytest",
            "-q",
            "-p",
            "no:cacheprovider",
            Path(__file__).parents[1] / file,
            "-k",
            chosen,
        ],
        env={**os.environ, "KERAS_BACKEND": "tensorflow"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stdout[-3000:]
