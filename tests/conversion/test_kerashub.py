"""KerasHub's Stable Diffusion 3: every container and part becomes the tensors of diffusers, and back.

What they must be is computed from the live objects (support/kerashub/expected.py), which knows nothing of
files, names or the weight maps.
"""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Literal

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import keras_hub
from support.random_pipelines import TOKENIZER

from kcv2diffusers.conversion.to_diffusers import convert
from kcv2diffusers.conversion.to_kerascv import to_keras
from kcv2diffusers.errors import SourceError

pytestmark = pytest.mark.slow

KINDS = keras_hub.KINDS
WHOLE = (
    "backbone.weights.h5",
    "sharded.weights.json",
    "backbone.keras",
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


@pytest.mark.parametrize("file", ["diffuser.weights.h5", "vae.weights.h5", "t5.weights.h5"])
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
    other = base / "transformer" / "diffusion_pytorch_model.safetensors"
    save_file({name: np.zeros_like(value) for name, value in load_file(other).items()}, other)
    convert(file, base=base, out=tmp_path / "out")
    assert_exact(tmp_path / "out", "sd35l", *keras_hub.components("sd35l"))


@pytest.mark.parametrize("file", ["diffuser.h5", "backbone.h5"])
def test_legacy_files_are_refused(tmp_path: Path, file: str) -> None:
    """They have the names of layers instead of attributes."""
    with pytest.raises(SourceError, match=r"not those of a .*\n.* KerasHub's as \.weights\.h5"):
        convert(keras_hub.models() / "sd35l" / file, out=tmp_path / "out", base="none")


WRITTEN = {"diffuser": "mmdit", "clip_l": "clip_l", "clip_g": "clip_g", "t5": "t5", "vae": "vae16"}
"""The name that `to-keras` gives the file of a model of the backbone."""


@pytest.fixture(scope="module")
def back(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Any]:
    """What KerasHub's models say of all files that `to-keras` writes, see support/kerashub/load.py."""
    folder, plan = tmp_path_factory.mktemp("back"), {}
    for kind in KINDS:
        out, files = folder / kind, folder / f"{kind}-files"
        convert(keras_hub.models() / kind / "task", out=out, base="none")
        to_keras(out, out=files)
        to_keras(out, out=folder / f"{kind}-preset", format="preset")
        plan[kind] = {
            part: str(path)
            for part, name in WRITTEN.items()
            if (path := files / f"{name}.weights.h5").exists()
        }
        plan[kind]["preset"] = str(folder / f"{kind}-preset")
    (folder / "plan.json").write_text(json.dumps(plan))
    return dict(json.loads(keras_hub.run("load.py", TOKENIZER, folder / "plan.json")))


@pytest.mark.parametrize("kind", KINDS)
def test_keras_hub_loads_what_is_written_back(back: dict[str, Any], kind: str) -> None:
    """Bit for bit: `load_weights` of each model, and `from_preset` of the folder."""
    models = {*WRITTEN} - (set() if kind == "sd35m" else {"t5"})
    assert back[kind].keys() == {*models, "preset"}
    assert all(found["different"] == [] and found["variables"] for found in back[kind].values())
    parts = sum(back[kind][model]["variables"] for model in models)
    assert back[kind]["preset"]["variables"] == parts + 2  # the projections of CLIP are the backbone's own


@pytest.mark.parametrize("form", ["weights.h5", "preset"])
@pytest.mark.parametrize("kind", KINDS)
def test_there_and_back_and_there(tmp_path: Path, kind: str, form: Literal["weights.h5", "preset"]) -> None:
    convert(keras_hub.models() / kind / "task", out=tmp_path / "out", base="none")
    to_keras(tmp_path / "out", out=tmp_path / "back", format=form)
    convert(tmp_path / "back", out=tmp_path / "again", base="none")
    assert_exact(tmp_path / "again", kind, *keras_hub.components(kind))
    for config in sorted((tmp_path / "out").glob("*/*.json")):
        again = tmp_path / "again" / config.relative_to(tmp_path / "out")
        assert again.read_bytes() == config.read_bytes(), config
