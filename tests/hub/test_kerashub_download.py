"""hf:// sources of KerasHub: presets as KerasHub uploads them, and sharded pipelines as base."""

from __future__ import annotations

import filecmp
import shutil
from pathlib import Path

import pytest
from support import keras_hub
from support.hub.hub import Hub

import kcv2diffusers

pytestmark = pytest.mark.slow

pytest_plugins = ["support.hub.fixtures"]


def same(one: Path, other: Path) -> bool:
    """Whether two pipelines have the same files, byte for byte but for the record of their sources."""
    files = {path.relative_to(one) for path in one.rglob("*.*") if path.name != "conversion.json"}
    assert files == {p.relative_to(other) for p in other.rglob("*.*") if p.name != "conversion.json"}
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in files)


def sent(hub: Hub) -> set[str]:
    """Paths in repositories whose contents were sent since the last look at the log."""
    return {e["path"].split("/resolve/")[1].partition("/")[2] for e in hub.log() if e.get("sent")}


@pytest.fixture(scope="module")
def expected(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What a preset of this machine becomes."""
    out = tmp_path_factory.mktemp("expected") / "out"
    kcv2diffusers.convert(keras_hub.models() / "sd35l" / "task", out=out)
    return out


def test_a_preset(hub: Hub, expected: Path, tmp_path: Path) -> None:
    """Its tokenizers come with it; what describes preprocessors is not downloaded."""
    hub.seed("keras/tiny_sd35", keras_hub.models() / "sd35l" / "task")
    hub.log()
    hub.does("convert", "hf://keras/tiny_sd35", "--out", tmp_path / "out")
    assert same(expected, tmp_path / "out")
    tokenizers = {
        f"assets/{part}_tokenizer/{file}"
        for part in ("clip_l", "clip_g")
        for file in ("vocabulary.json", "merges.txt")
    }
    got, weights = sent(hub), {"model.weights.h5", "config.json"}
    assert weights < got <= weights | tokenizers  # files of the same content are sent once


def test_a_sharded_preset_below_a_path(hub: Hub, expected: Path, tmp_path: Path) -> None:
    """Its config.json has the number of heads, which the weights of Stable Diffusion 3 do not show."""
    hub.seed("keras/presets", keras_hub.models() / "sd3" / "preset_sharded", at="sd3/")
    hub.does("convert", "hf://keras/presets/sd3", "--base", "none", "--out", tmp_path / "out")
    kcv2diffusers.convert(keras_hub.models() / "sd3" / "preset_sharded", out=tmp_path / "here", base="none")
    assert same(tmp_path / "here", tmp_path / "out")


def test_a_part_of_a_preset(hub: Hub, expected: Path, tmp_path: Path) -> None:
    """The DreamBooth example of keras.io: the diffuser is a file here, the rest is a preset on the Hub."""
    hub.seed("keras/base", keras_hub.models() / "sd35l" / "task")
    file = keras_hub.models() / "sd35l" / "diffuser.weights.h5"
    hub.does("convert", file, "--base", "hf://keras/base", "--out", tmp_path / "out")
    assert same(expected, tmp_path / "out")


def test_a_sharded_pipeline_as_base(hub: Hub, expected: Path, tmp_path: Path) -> None:
    import torch
    from diffusers import SD3Transformer2DModel

    folder = tmp_path / "sharded"
    model = SD3Transformer2DModel.from_pretrained(expected / "transformer", torch_dtype=torch.float32)
    model.save_pretrained(folder / "transformer", max_shard_size="100KB")
    shards = {path.name for path in (folder / "transformer").glob("*-of-*.safetensors")}
    assert len(shards) > 2
    for path in expected.iterdir():
        if path.is_file():
            shutil.copy(path, folder)
        elif path.name != "transformer":
            shutil.copytree(path, folder / path.name)
    hub.seed("alice/sharded", folder)
    hub.log()
    file = keras_hub.models() / "sd35l" / "vae.weights.h5"
    hub.does("convert", file, "--base", "hf://alice/sharded", "--out", tmp_path / "out")
    assert same(expected, tmp_path / "out")
    assert {f"transformer/{name}" for name in shards} <= sent(hub)
