"""Files of other families are refused by name, and parts of two families do not make a pipeline."""

from __future__ import annotations

import json
import shutil
from importlib import resources
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import save_file
from support import keras_hub
from support.checkpoints import kept

from kcv2diffusers.conversion.to_diffusers import convert
from kcv2diffusers.errors import Error
from kcv2diffusers.sources.locate import TINY


def refusal(*sources: str | Path, out: Path, **options: str | Path) -> str:
    """The message of `convert`, which has two lines."""
    with pytest.raises(Error) as raised:
        convert(*sources, out=out, **options)  # type: ignore[arg-type]
    message = str(raised.value)
    assert len(message.splitlines()) == 2 and not out.exists(), message
    return message


@pytest.fixture(scope="module")
def flux() -> Path:
    """A genuine model of KerasHub."""
    script = keras_hub.MAKER / "make_flux.py"
    return kept("kerashub-flux", [script], lambda folder: keras_hub.run(script.name, folder))


@pytest.mark.slow
@pytest.mark.parametrize("name", ["flux.weights.h5", "flux.h5", "preset"])
def test_flux_of_kerashub(flux: Path, tmp_path: Path, name: str) -> None:
    assert "of Flux, which is not read here" in refusal(flux / name, out=tmp_path / "out", base=TINY)


@pytest.mark.parametrize(
    ("name", "family"),
    [
        ("double_blocks.0.img_attn.qkv.weight", "Flux"),
        ("single_transformer_blocks.0.attn.to_q.weight", "Flux"),
        ("model.diffusion_model.joint_blocks.0.x_block.attn.qkv.weight", "Stable Diffusion 3"),
        ("transformer_blocks.0.attn.add_q_proj.weight", "Stable Diffusion 3"),
    ],
)
def test_single_files(tmp_path: Path, name: str, family: str) -> None:
    save_file({name: np.zeros((4, 4), "float32")}, tmp_path / "model.safetensors")
    message = refusal(tmp_path / "model.safetensors", out=tmp_path / "out")
    assert f"of {family}, which is not read here" in message


def test_a_flux_pipeline_as_base(tmp_path: Path) -> None:
    base = tmp_path / "flux"
    (base / "transformer").mkdir(parents=True)
    (base / "model_index.json").write_text(json.dumps({"_class_name": "FluxPipeline"}))
    (base / "transformer" / "config.json").write_text(json.dumps({"_class_name": "FluxTransformer2DModel"}))
    tensors = {"single_transformer_blocks.0.attn.to_q.weight": np.zeros((4, 4), "float32")}
    save_file(tensors, base / "transformer" / "diffusion_pytorch_model.safetensors")
    file = keras_hub.models() / "sd35l" / "diffuser.weights.h5"
    assert "of Flux, which is not read here" in refusal(file, out=tmp_path / "out", base=base)


def test_a_transformer_of_another_class(tmp_path: Path) -> None:
    base, file = tmp_path / "pixart", keras_hub.models() / "sd35l" / "clip_l.weights.h5"
    (base / "transformer").mkdir(parents=True)
    (base / "transformer" / "config.json").write_text(json.dumps({"_class_name": "PixArtTransformer2DModel"}))
    tensors = {"transformer_blocks.0.attn1.to_q.weight": np.zeros((4, 4), "float32")}
    save_file(tensors, base / "transformer" / "diffusion_pytorch_model.safetensors")
    assert "of PixArtTransformer2DModel, which is" in refusal(file, out=tmp_path / "out", base=base)


def test_an_mmdit_with_a_vae_of_kerascv(tmp_path: Path) -> None:
    file, vae = keras_hub.models() / "sd35l" / "diffuser.weights.h5", tmp_path / "vae_decoder.weights.h5"
    shutil.copy(Path(str(resources.files("kcv2diffusers"))) / "tiny" / vae.name, vae)
    message = refusal(file, vae, out=tmp_path / "out", base="none")
    assert "(MMDiT)" in message and "(VAE decoder) do not belong together" in message
    assert "Stable Diffusion 3" in message.splitlines()[1]


def test_an_mmdit_with_a_base_of_kerascv(tmp_path: Path) -> None:
    file = keras_hub.models() / "sd35l" / "diffuser.weights.h5"
    assert "do not belong together" in refusal(file, out=tmp_path / "out", base=TINY)


def test_parts_of_two_models_of_one_family(tmp_path: Path) -> None:
    """The T5 of one model is narrower than the context of the other's MMDiT."""
    models = keras_hub.models()
    message = refusal(
        models / "sd3" / "diffuser.weights.h5",
        models / "sd35m" / "t5.weights.h5",
        out=tmp_path / "out",
        base="none",
    )
    assert "do not belong together" in message


def test_a_shard_is_missing(tmp_path: Path) -> None:
    for file in (keras_hub.models() / "sd35l").glob("sharded*"):
        shutil.copy(file, tmp_path)
    (tmp_path / "sharded_00001.weights.h5").unlink()
    message = refusal(tmp_path / "sharded.weights.json", out=tmp_path / "out", base="none")
    assert "its shard sharded_00001.weights.h5 is missing" in message
