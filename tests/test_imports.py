"""The conversion path stays light: no framework is imported, and the command line answers at once."""

from __future__ import annotations

import json
import statistics
import subprocess
import sys
import time
from pathlib import Path

import pytest
from conftest import Checkpoints

HEAVY = ("tensorflow", "keras", "torch", "diffusers", "transformers", "keras_cv", "jax", "huggingface_hub")


@pytest.mark.slow
def test_convert_and_back_import_no_framework(checkpoints: Checkpoints, tmp_path: Path) -> None:
    files = [
        str(checkpoints("keras3", part) / name)
        for part, name in (("vae_decoder", "weights.weights.h5"), ("vae_encoder", "export"))
    ]
    code = f"""
import sys
from kcv2diffusers import convert, inspect, to_keras
convert(*{files!r}, out={str(tmp_path / "out")!r}, base="none")
to_keras({str(tmp_path / "out")!r}, out={str(tmp_path / "back")!r})
inspect({str(tmp_path / "back")!r})
import json
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(json.loads(done.stdout))
    assert {"h5py", "numpy"} <= modules
    assert not modules & set(HEAVY)


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"]])
def test_help_needs_no_numpy(arguments: list[str]) -> None:
    """The 0.2 s of the benchmark are for a quiet machine; what takes the time is tested here."""
    code = f"""
import sys
sys.argv = ["kcv2diffusers", *{arguments!r}]
from kcv2diffusers.cli import main
try:
    main()
finally:
    print(sorted(sys.modules.keys() & {{"numpy", "h5py", "rich", "safetensors"}}))
"""
    times = []
    for _ in range(3):
        started = time.perf_counter()
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        times.append(time.perf_counter() - started)
        assert "Usage" in done.stdout
        assert done.stdout.splitlines()[-1] == "[]"
    assert statistics.median(times) < 2
