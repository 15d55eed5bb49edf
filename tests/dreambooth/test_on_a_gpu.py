"""What can be known without a GPU of a step on one: on a device that is not there
(`support/dreambooth/fake_cuda/step.py`), by programs for one that are only compiled, and by devices that are
described.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import ROOT
from support.servers import server

from kcv2diffusers.dreambooth import devices

pytestmark = pytest.mark.slow

FAKE = ROOT / "tests" / "support" / "dreambooth" / "fake_cuda"


@pytest.fixture(scope="module")
def library(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The device guard, compiled."""
    compiler = shutil.which("g++")
    if compiler is None:
        pytest.skip("the fake device is C++, and there is no g++")
    from torch.utils.cpp_extension import include_paths, library_paths

    path = tmp_path_factory.mktemp("guard") / "libguard.so"
    folders = [f"-I{folder}" for folder in include_paths()]
    for folder in library_paths():
        folders += [f"-L{folder}", f"-Wl,-rpath,{folder}"]
    command = [compiler, "-shared", "-fPIC", "-O0", "-w", FAKE / "guard.cpp", "-o", path, *folders]
    subprocess.run([*command, "-lc10", "-ltorch_cpu"], check=True)
    return path


def step(library: Path, **options: Any) -> dict[str, Any]:
    command = [sys.executable, FAKE / "step.py"]
    found = server("fake_cuda", command, {**os.environ, "LD_PRELOAD": str(library)}).ask(json.dumps(options))
    assert isinstance(found, dict), found
    return found


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"accumulate": 1, "ema": 0.99, "lr_schedule": "cosine", "warmup_steps": 3, "lora": 4},
        {"accumulate": 2, "precision": "float32", "clip_norm": 0.0},
        {"optimizer": "lion"},
    ],
    ids=["plain", "lora", "accumulate", "lion"],
)
def test_nothing_in_a_step_waits_for_the_device_or_copies_to_it(
    library: Path, options: dict[str, Any]
) -> None:
    found = step(library, **options)
    assert found["waits"] == [] and found["copies"] == []
    assert found["operations"]["gradients"] > 500
    # One operation over all weights, not one for each (the UNet has more than 200).
    assert 0 < found["operations"]["update"] < 50


@pytest.mark.parametrize(
    ("options", "most"), [({}, 207), ({"lora": 4}, 82)], ids=["all weights", "low-rank updates"]
)
def test_pictures_and_kernels_are_moved_once(library: Path, options: dict[str, Any], most: int) -> None:
    """Convolutions get pictures and kernels in their own order: but for slices of the gradient of the three
    concatenations, nothing has to be turned round. With a copy of each padded input, two of each kernel and
    norms that left their order behind it was 74 (low-rank: 67), beside 256 (118) copies.
    """
    moves = step(library, **options)["moves"]
    assert moves["turned"] == 3
    assert moves["copies"] <= most


def test_adam_mini_has_one_operation_for_each_weight_that_shares_a_moment(library: Path) -> None:
    """Keras' own update had 6,956 operations and 1,248 copies to the device."""
    found = step(library, optimizer="adam_mini")
    assert found["waits"] == [] and found["copies"] == []
    assert 0 < found["operations"]["update"] < found["kernels"] + 40


def test_float16_waits_once_a_step(library: Path) -> None:
    """To know whether all gradients are numbers. Keras' own had 1,268 operations, 3 waits and 3 copies."""
    found = step(library, precision="mixed_float16")
    assert len(found["waits"]) == 1 and "isfinite" in found["waits"][0]
    assert found["copies"] == []
    assert 0 < found["operations"]["update"] < 50


def test_the_fake_device_sees_waits_and_copies(library: Path) -> None:
    found = step(library, plant=True)
    assert len(found["waits"]) == len(found["copies"]) == 1, found
    assert all("step.py" in line for line in (*found["waits"], *found["copies"]))


LOWERED = """
import jax
from jax import numpy as jnp
from jax._src.cudnn import fused_attention_stablehlo as fused
from types import SimpleNamespace
from kcv2diffusers.dreambooth.devices import attention_noted
from kcv2diffusers.models import jax_layers

client = SimpleNamespace(platform_version="cuda 13000")
card = SimpleNamespace(client=client, compute_capability="9.0", platform="gpu")
jax_layers.jax = SimpleNamespace(devices=lambda: [card], nn=jax.nn, checkpoint=jax.checkpoint)
fused.check_cudnn_version = lambda: 91900
fused.check_compute_capability = lambda least: True
fused.is_cuda_compute_capability_equal = lambda other: False
notes = []
noting = attention_noted(notes)
noting.__enter__()
for length, width in ((4096, 40), (77, 40), (1024, 80), (256, 160)):
    query = jnp.zeros((1, length if length != 77 else 4096, 8, width), "bfloat16")
    key = jnp.zeros((1, length, 8, width), "bfloat16")
    loss = lambda q, k: jax_layers.attention(q, k, k, False).astype("float32").sum()
    program = jax.jit(jax.grad(loss, argnums=(0, 1))).trace(query, key).lower(lowering_platforms=("cuda",))
    text = program.as_text()
    print(length, width, "fmhaSoftmax" in text, "fmhaSoftmaxBackward" in text)
noting.__exit__(None, None, None)
print(*notes)
"""


def test_jax_takes_cudnns_attention_where_it_has_one() -> None:
    """In programs lowered for CUDA: self-attention at widths 40 and 80, forward and backward; not for the 77
    tokens of the text, which JAX refuses in the backward pass, nor for a width of 160.
    """
    done = subprocess.run(
        [sys.executable, "-c", LOWERED],
        env={**os.environ, "KERAS_BACKEND": "jax", "JAX_PLATFORMS": "cpu"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    assert done.stdout.splitlines() == [
        "4096 40 True True",
        "77 40 False False",
        "1024 80 True True",
        "256 160 False False",
        "Attention: cuDNN's fused kernel (4096 on 4096 of width 40 in bfloat16, 1024 on 1024 of width 80 in "
        "bfloat16); scores computed twice (4096 on 77 of width 40 in bfloat16, 256 on 256 of width 160 in "
        "bfloat16).",
    ]


def test_nothing_is_said_of_attention_on_pytorch() -> None:
    notes: list[str] = []
    with devices.attention_noted(notes):
        pass
    assert notes == []


@pytest.mark.parametrize(
    ("capability", "policy"),
    [
        (None, "float32"),
        ([], "float32"),
        ("9.0", "mixed_bfloat16"),
        ((8, 0), "mixed_bfloat16"),
        ((7, 5), "mixed_float16"),
        ("7.0", "mixed_float16"),
    ],
)
def test_precision_of_a_card(capability: Any, policy: str) -> None:
    assert devices._half(capability) == policy


def test_precision_here_is_float32() -> None:
    assert devices.best_precision() == "float32"
