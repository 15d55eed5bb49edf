"""Files of stable-diffusion-tensorflow, KerasCV's ancestor, convert like KerasCV's.

The published files cannot be had here. The models of support/kerascv/make_ancestor.py have their structure.
"""

from __future__ import annotations

import hashlib
import json
import shutil
from pathlib import Path

import h5py
import pytest
from safetensors.numpy import load_file
from support.checkpoints import cached

import kcv2diffusers
from kcv2diffusers.errors import SourceError

pytestmark = pytest.mark.slow

COMPONENTS = {
    "unet": ["unet"],
    "text_encoder": ["text_encoder"],
    "vae": ["vae_decoder", "vae_encoder"],
}


@pytest.fixture(scope="module")
def files() -> Path:
    return cached("sprint", "make_ancestor.py")


@pytest.mark.parametrize("component", COMPONENTS)
def test_it_is_exact(files: Path, tmp_path: Path, component: str) -> None:
    parts = COMPONENTS[component]
    for name in ("kcv2diffusers.json", *(f"{part}.h5" for part in parts)):
        shutil.copy(files / name, tmp_path)
    sources = [tmp_path / f"{part}.h5" for part in parts]
    kcv2diffusers.convert(*sources, out=tmp_path / "out", base="none")
    (weights,) = (tmp_path / "out" / component).glob("*.safetensors")
    got = {
        name: [list(value.shape), hashlib.sha256(value.tobytes()).hexdigest()]
        for name, value in load_file(weights).items()
    }
    wanted = {}
    for part in parts:
        wanted |= json.loads((files / f"{part}.json").read_text())
    assert got == wanted


def test_frozen_layers_are_refused(files: Path, tmp_path: Path) -> None:
    """Keras lists trainable weights first; nothing then shows which tensor is which."""
    shutil.copy(files / "unet.h5", tmp_path)
    with h5py.File(tmp_path / "unet.h5", "a") as file:
        attributes = file["u_net_model"].attrs
        chunks = sorted(
            (name for name in attributes if name.startswith("weight_names")), key=lambda n: (len(n), n)
        )
        names = [name for chunk in chunks for name in attributes[chunk]]
        names = [*names[-300:], *names[:-300]]
        for chunk in chunks:
            size = len(attributes[chunk])
            attributes[chunk], names = names[:size], names[size:]
    with pytest.raises(SourceError, match="its 686 tensors are not those of"):
        kcv2diffusers.convert(tmp_path / "unet.h5", out=tmp_path / "out", base="none")
