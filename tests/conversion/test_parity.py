"""The same numbers come out: KerasCV's forward pass beside that of diffusers, transformers and our models.

Every variable is random. Keras runs in a process of its own, which ends after each full-size model, so that
one is in memory at a time. All of them are in this file, which one worker runs: two at once would not fit
into 24 GB.
The full-size tests leave what they measured in .cache/parity.json, which `tools/docs.py --measured` puts into
the documentation.
"""

from __future__ import annotations

import json
import os
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import google_crc32c
import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from support.checkpoints import ROOT, cached, run_script
from support.servers import stop_all
from transformers import CLIPTextConfig, CLIPTextModel

from kcv2diffusers import convert, to_keras

pytestmark = pytest.mark.slow

REPORT = ROOT / ".cache" / "parity.json"
KINDS = ["small", pytest.param("full", marks=pytest.mark.full_size)]

KerasSide = Callable[[str, int], dict[str, np.ndarray]]


@pytest.fixture
def folder() -> Iterator[Path]:
    """A folder that does not outlive the test: a UNet is 3.4 GB."""
    with TemporaryDirectory(prefix="kcv2diffusers-parity-") as name:
        yield Path(name)


@pytest.fixture
def keras(folder: Path, kind: str) -> KerasSide:
    """Put a part's random weights into `folder`; returns its inputs and output."""

    def run(part: str, version: int) -> dict[str, np.ndarray]:
        if kind == "full":
            stop_all()
            run_script("keras3", "forward.py", folder, part, str(version), "--kind", kind)
            stop_all()
            assert error_of_ours(folder, part, version) < 1e-5
        else:
            for file in cached("keras3-torch", "forward.py", part, str(version)).iterdir():
                if not (folder / file.name).exists():
                    (folder / file.name).symlink_to(file)
        with np.load(folder / f"{part}.npz") as arrays:
            return dict(arrays)

    return run


def error_of_ours(folder: Path, part: str, version: int) -> float:
    """The full-size model of `kcv2diffusers.models`, on another backend than KerasCV's."""
    done = subprocess.run(
        [sys.executable, ROOT / "tests" / "support" / "models" / "ours.py", folder, part, str(version)],
        env={**os.environ, "KERAS_BACKEND": "torch"},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr[-3000:]
    error = float(done.stdout)
    print(f"\nfull SD{version} {part}, ours: {error:.1e}")
    return error


@pytest.fixture
def measured(kind: str) -> Callable[[str, np.ndarray, Any, float], float]:
    """Maximum error over maximum value, reported and checked against a limit."""

    def check(name: str, expected: np.ndarray, actual: Any, limit: float) -> float:
        actual = np.asarray(actual)
        assert actual.shape == expected.shape and np.isfinite(expected).all()
        error = float(np.abs(actual - expected).max() / np.abs(expected).max())
        print(f"\n{kind} {name}: {error:.1e} (limit {limit:.0e})")
        if kind == "full":
            known = json.loads(REPORT.read_text()) if REPORT.exists() else {}
            REPORT.parent.mkdir(exist_ok=True)
            REPORT.write_text(json.dumps(known | {name: {"error": error, "limit": limit}}, indent=2))
        assert error <= limit
        return error

    return check


@pytest.fixture(autouse=True)
def no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


def first(tensor: np.ndarray) -> torch.Tensor:
    """Channels first."""
    return torch.from_numpy(np.ascontiguousarray(np.moveaxis(tensor, -1, 1)))


def last(tensor: torch.Tensor) -> np.ndarray:
    return np.moveaxis(tensor.numpy(), 1, -1)


def datasets(file: Path) -> dict[str, tuple[object, ...]]:
    """Shape, dtype and checksum of each dataset of an HDF5 file."""
    found: dict[str, tuple[object, ...]] = {}

    def add(name: str, value: Any) -> None:
        if isinstance(value, h5py.Dataset):
            array = value[()]
            found[name] = array.shape, array.dtype, google_crc32c.value(array.tobytes())

    with h5py.File(file) as opened:
        opened.visititems(add)
    return found


def assert_comes_back(folder: Path, *parts: str) -> None:
    """Back in Keras 3's format the file holds the datasets it came from, bit for bit.

    Neither file is left: a UNet's take 3.4 GB each.
    """
    given = {part: datasets(folder / f"{part}.weights.h5") for part in parts}
    for part in parts:
        (folder / f"{part}.weights.h5").unlink()
    to_keras(folder / "out", out=folder / "back")
    # Beside the weights only what they do not tell: a small model's numbers of heads, or another GELU.
    files = {file.name for file in (folder / "back").iterdir()}
    small = (folder / "kcv2diffusers.json").exists()
    assert files - {"kcv2diffusers.json"} == {f"{part}.weights.h5" for part in parts}
    assert "kcv2diffusers.json" in files or not small
    for part in parts:
        assert datasets(folder / "back" / f"{part}.weights.h5") == given[part]
    shutil.rmtree(folder / "back")


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_text_encoder(
    kind: str, version: int, folder: Path, keras: KerasSide, measured: Callable[..., float]
) -> None:
    given = keras("text_encoder", version)
    convert(folder / "text_encoder.weights.h5", out=folder / "out", base="none", gelu="tanh")
    assert_comes_back(folder, "text_encoder")
    tokens = torch.from_numpy(given["tokens"])

    def hidden(**config: str) -> np.ndarray:
        model = CLIPTextModel.from_pretrained(folder / "out" / "text_encoder", **config).eval()
        return model(tokens).last_hidden_state.numpy()

    name = f"SD{version} text encoder"
    if version == 1:
        measured(name, given["output"], hidden(), 1e-5)
    else:
        # Keras' GELU, in the small model and in KerasCV up to 0.6.0, is exact; that of 0.9.0 is approximate.
        right, wrong = ("gelu", "gelu_pytorch_tanh")[:: 1 if kind == "small" else -1]
        if kind == "full":
            assert CLIPTextConfig.from_pretrained(folder / "out" / "text_encoder").hidden_act == right
        measured(name, given["output"], hidden(hidden_act=right), 1e-5)
        assert measured(f"{name}, other GELU", given["output"], hidden(hidden_act=wrong), 1e-3) > 1e-5
    if kind == "full" and version == 1:
        to_keras(folder / "out", out=folder / "legacy", format="h5")
        file = folder / "legacy" / "text_encoder.h5"
        loaded = run_script("keras3", "load_checkpoint.py", "--kind", "full", file, "text_encoder", "1", "0")
        stop_all()
        expected = json.loads((folder / "text_encoder.expected.json").read_text())
        assert json.loads(loaded.splitlines()[-1]) == {str(file): expected}


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("kind", KINDS)
def test_unet(
    kind: str,
    version: int,
    folder: Path,
    keras: KerasSide,
    measured: Callable[..., float],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    given = keras("unet", version)
    convert(folder / "unet.weights.h5", out=folder / "out", base="none")
    assert_comes_back(folder, "unet")
    model = UNet2DConditionModel.from_pretrained(folder / "out" / "unet").eval()
    timesteps, context = torch.from_numpy(given["timesteps"]), torch.from_numpy(given["context"])

    def predicted() -> np.ndarray:
        return last(model(first(given["latent"]), timesteps, context).sample)

    name = f"SD{version} UNet"
    stock = measured(name, given["output"], predicted(), 5e-4)
    # What remains is KerasCV's tanh approximation of the GELU.
    monkeypatch.setattr(GEGLU, "gelu", lambda self, gate: F.gelu(gate, approximate="tanh"))
    assert measured(f"{name}, tanh GELU", given["output"], predicted(), 2e-5) < stock


@pytest.mark.parametrize("kind", KINDS)
def test_vae(kind: str, folder: Path, keras: KerasSide, measured: Callable[..., float]) -> None:
    decoder, encoder = keras("vae_decoder", 1), keras("vae_encoder", 1)
    files = [folder / f"{part}.weights.h5" for part in ("vae_encoder", "vae_decoder")]
    convert(*files, out=folder / "out", base="none")
    assert_comes_back(folder, "vae_encoder", "vae_decoder")
    model = AutoencoderKL.from_pretrained(folder / "out" / "vae").eval()
    scale = model.config.scaling_factor
    image = model.decode(first(decoder["latent"]) / scale).sample
    measured("VAE decoder", decoder["output"], last(image), 5e-5)
    latent = model.encode(first(encoder["image"])).latent_dist.mean * scale
    measured("VAE encoder", encoder["output"], last(latent), 5e-5)
