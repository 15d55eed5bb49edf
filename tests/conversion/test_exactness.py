"""Converted tensors equal, bit for bit, what the live KerasCV model's variables must become.

For each stack, part and container; the expectation (tests/support/kerascv/expected.py) walks the Python
objects of the model and knows nothing of files, names or the weight maps.
"""

from __future__ import annotations

import hashlib
import json
from pathlib import Path

import numpy as np
import pytest

from kcv2diffusers.conversion.inspection import inspect
from kcv2diffusers.errors import PlanError
from kcv2diffusers.sources.diffusers_pipeline import read_safetensors
from kcv2diffusers.sources.open import open_sources
from kcv2diffusers.sources.recognise import recognise
from kcv2diffusers.targets.safetensors import common_dtype, diffusers_entries, write_safetensors
from kcv2diffusers.targets.stream import run

KERAS3 = ("weights.weights.h5", "sharded.weights.json", "model.keras", "model.h5", "export", "checkpoint")
KERAS2 = ("legacy.h5", "weights.weights.h5", "model.keras", "model.h5", "saved_model", "checkpoint")
HDF5 = ("weights.weights.h5", "model.keras", "model.h5")
SHARDED = "sharded.weights.json"
PARTS = (
    ("unet", 1),
    ("text_encoder", 1),
    ("text_encoder", 2),
    ("vae_decoder", 1),
    ("vae_encoder", 1),
)
HALF = ("float16", "bfloat16")
# A UNet takes longest to build. SD1's is in every container of every stack. SD2's has the same layers but for
# two in each attention; it is in every container of Keras 2 and in the HDF5 files of Keras 3. Keras 3 writes
# HDF5 files on PyTorch too, where it builds a UNet in a third of the time that TensorFlow takes.
CASES = [
    *((stack, part, version, "float32", name)
      for stack, names in (("keras3", KERAS3), ("keras2", KERAS2), ("sprint", KERAS2))
      for part, version in (*PARTS, *([("unet", 2)] if stack == "keras2" else []))
      for name in names),
    *(("keras3-torch", "unet", 2, "float32", name) for name in (*HDF5, SHARDED)),
    *(("keras3-torch", part, 1, dtype, name)
      for part, dtypes in (("unet", ("bfloat16",)), ("vae_decoder", HALF), ("vae_encoder", HALF))
      for dtype in dtypes
      for name in (*HDF5, SHARDED)),
    *(("keras3", "text_encoder", 1, dtype, name)
      for dtype in HALF for name in (*HDF5, SHARDED, "export", "checkpoint")),
    # KerasCV's VAE attention cannot be built so on Keras 2.
    *(("keras2", "text_encoder", 1, dtype, name)
      for dtype in HALF for name in ("legacy.h5", *HDF5, "checkpoint")),
]  # fmt: skip


def written(stack: str, dtype: str) -> tuple[str, ...]:
    """The containers to write, all if none is named."""
    if stack == "keras3-torch":
        return (*HDF5, SHARDED)
    return ("legacy.h5", *HDF5, "checkpoint") if (stack, dtype != "float32") == ("keras2", True) else ()


CONTAINER = {
    "legacy.h5": "legacy .h5 weights",
    "weights.weights.h5": ".weights.h5",
    "sharded.weights.json": "sharded .weights.h5",
    "export": "SavedModel",
    "saved_model": "SavedModel",
    "checkpoint": "TensorFlow checkpoint",
}


def digests(path: Path) -> dict[str, list[object]]:
    data = path.read_bytes()
    return {
        t.name: [list(t.shape), hashlib.sha256(data[t.offset : t.offset + t.nbytes]).hexdigest()]
        for t in read_safetensors(path)
    }


QUICK = ("text_encoder", 1, "float32")


@pytest.mark.parametrize(
    ("stack", "part", "version", "dtype", "name"),
    [case if case[1:4] == QUICK else pytest.param(*case, marks=pytest.mark.slow) for case in CASES]
    + [
        # A text encoder's SavedModels have theirs in all stacks.
        pytest.param(
            *("keras2", "unet", 1, "float32", "saved_model with its functions"), marks=pytest.mark.full_size
        )
    ],
)
def test_bit_for_bit(
    checkpoints, tmp_path: Path, stack: str, part: str, version: int, dtype: str, name: str
) -> None:
    name, _, traces = name.partition(" ")
    limit = [name, "--traces"] if traces else written(stack, dtype)
    folder = checkpoints(stack, part, version, dtype, *limit)
    (source,) = open_sources(folder / name)
    match = recognise(source)
    if (stack, part, name) == ("keras3", "unet", "checkpoint"):
        # TensorFlow does not see what a Keras 3 layer keeps in a list: half of the UNet is not in the file.
        with pytest.raises(PlanError, match="res_block layers"):
            match.require_complete()
        return
    entries = diffusers_entries(match.require_complete())
    kind = common_dtype(entry.tensor for entry in entries)
    assert kind.name == dtype
    out = tmp_path / "out.safetensors"
    assert run(write_safetensors(out, entries, kind)) == []
    assert digests(out) == json.loads((folder / "expected.json").read_text())
    (seen,) = inspect(folder / name)
    assert (seen.part, seen.dtypes, seen.problems) == (part, [dtype], None)
    if part == "unet":
        assert seen.version == f"sd{version}"
    # Keras 2.12 writes HDF5 under every name; its own .keras format came later.
    assert seen.container in (CONTAINER.get(name), ".keras archive", "whole-model .h5")
    assert seen.keras_version is None or seen.keras_version.startswith("3" if "keras3" in stack else "2")


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_narrower_dtypes_round_to_nearest(checkpoints, tmp_path: Path, dtype: str) -> None:
    """--dtype gives what NumPy's (and ml_dtypes') own rounding of the float32 tensors gives."""
    from kcv2diffusers.dtypes import DTYPES

    folder = checkpoints("keras3", "unet", 1)
    (source,) = open_sources(folder / "weights.weights.h5")
    entries = diffusers_entries(recognise(source).require_complete())
    outs = {name: tmp_path / name for name in ("float32", dtype)}
    for name, out in outs.items():
        run(write_safetensors(out, entries, DTYPES[name]))
    wide, narrow = ({t.name: t for t in read_safetensors(out)} for out in outs.values())
    assert wide.keys() == narrow.keys() and len(wide) == 684
    for name, tensor in wide.items():
        values = np.fromfile(outs["float32"], np.float32, count=tensor.nbytes // 4, offset=tensor.offset or 0)
        rounded = np.fromfile(
            outs[dtype], np.uint16, count=tensor.nbytes // 4, offset=narrow[name].offset or 0
        )
        np.testing.assert_array_equal(values.astype(DTYPES[dtype]).view(np.uint16), rounded, name)
