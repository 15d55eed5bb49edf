"""KerasHub's Stable Diffusion 3: every container and part, exactly and by what it computes.

X
the live objects (support/kerashub/expected.py) and knows nothing of files, names or the weight maps.
"""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file
from support import keras_hub
from support.random_pipelines import TOKENIZER

from kcv2diffusers.conversion.to_diffusers import convert
from kcv2diffusers.conversion.to_kerascv import to_keras

KINDS = keras_hub.KINDS
WHOLE = (
    "backbone.weights.h5",
    "sharded.weights.json",
    "backbone.keras",
    "backbone.h5",
    "before_0_22.weights.h5",
    "preset",
    "preset_sharded",
    "task",
)


def tensors(component: Path) -> dict[str, np.ndarray]:
    """All tensors of a component's folder."""
    return {
        name: value for file in component.glob("*.safetensors") for name, value in load_file(file).items()
    }


def assert_exact(pipeline: Path, kind: str, *components: str) -> None:
    """The folder has these components, and their tensors are the expected ones bit for bit."""
    assert {path.parent.name for path in pipeline.glob("*/*.safetensors")} == set(components)
    for component in components:
        wanted, got = keras_hub.tensors(kind, component), tensors(pipeline / component)
        assert got.keys() == wanted.keys()
        for name, value in wanted.items():
            assert got[name].dtype == value.dtype and got[name].shape == value.shape, name
            assert got[name].tobytes() == value.tobytes(), name


@pytest.mark.parametrize("name", WHOLE)
@pytest.mark.parametrize("kind", KINDS)
def test_a_whole_model_is_exact(tmp_path: Path, kind: str, name: str) -> None:
    convert(keras_hub.models() / kind / name, out=tmp_path / "out", base="none")
    assert_exact(tmp_path / "out", kind, *keras_hub.components(kind))


@pytest.mark.parametrize("file", ["diffuser.weights.h5", "diffuser.h5", "vae.weights.h5", "t5.weights.h5"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_part_is_exact(tmp_path: Path, kind: str, file: str) -> None:
    path = keras_hub.models() / kind / file
    if not path.exists():
        pytest.skip("this kind has no T5")
    convert(path, out=tmp_path / "out", base="none")
    assert_exact(tmp_path / "out", kind, keras_hub.FILES[file.partition(".")[0]])


@pytest.mark.parametrize("file", ["clip_l", "clip_g"])
def test_a_text_encoder_is_exact(tmp_path: Path, file: str) -> None:
    """Alone it has no projection, which the base has."""
    models = keras_hub.models() / "sd35l"
    convert(models / "task", out=tmp_path / "base")
    convert(models / f"{file}.weights.h5", base=tmp_path / "base", out=tmp_path / "out")
    assert_exact(tmp_path / "out", "sd35l", *keras_hub.components("sd35l"))


def test_the_mmdit_that_the_example_saves_with_a_base(tmp_path: Path) -> None:
    """`diffuser.save_weights`, the rest from a pipeline."""
    base, file = tmp_path / "base", keras_hub.models() / "sd35l" / "diffuser.weights.h5"
    convert(keras_hub.models() / "sd35l" / "task", out=base)
    (base / "transformer" / "diffusion_pytorch_model.safetensors").write_bytes(b"")
    convert(file, base=base, out=tmp_path / "out")
    assert_exact(tmp_path / "out", "sd35l", *keras_hub.components("sd35l"))


@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back(tmp_path: Path, kind: str) -> None:
    models = keras_hub.models() / kind
    convert(models / "task", out=tmp_path / "out")
    to_keras(tmp_path / "out", out=tmp_path / "back")
    for file in sorted((tmp_path / "back").glob("*.weights.h5")):
        print(file)
    loaded = json.loads(keras_hub.run("load.py", kind, TOKENIZER))
    assert loaded
