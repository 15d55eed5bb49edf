"""Back again: what `to-keras` writes, KerasCV loads, and every variable has the bits it started from."""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import torch
from safetensors.torch import load_file, save_file
from support.checkpoints import ROOT, cached, run_script
from support.hdf5 import datasets

from kcv2diffusers import convert, to_keras

pytestmark = pytest.mark.slow

PARTS = ("unet", "text_encoder", "vae_decoder", "vae_encoder")
FORMATS = ("weights.h5", "h5")
CLASSES = {"unet": "DiffusionModel", "text_encoder": "TextEncoder"}
VAE_CLASSES = {"vae_decoder": "Decoder", "vae_encoder": "ImageEncoder"}


def made(part: str, version: int) -> Path:
    """The folder of a small part as Keras 3 saved it."""
    return cached("keras3-torch", "forward.py", part, str(version if part in CLASSES else 1))


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory, bpe: Path) -> dict[int, Path]:
    """A small SD1 and a small SD2 pipeline. Tests copy them before they change anything."""
    folder = tmp_path_factory.mktemp("pipelines")
    for version in (1, 2):
        sources = [made(part, version) / f"{part}.weights.h5" for part in PARTS]
        convert(*sources, out=folder / str(version), base="none")
    return {version: folder / str(version) for version in (1, 2)}


@pytest.fixture(scope="module")
def back(pipelines: dict[int, Path], tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Both in both formats: <version>-<format>/<part>.<format>."""
    folder = tmp_path_factory.mktemp("back")
    for version, pipeline in pipelines.items():
        for form in FORMATS:
            to_keras(pipeline, out=folder / f"{version}-{form}", format=form)  # type: ignore[arg-type]
    return folder


# KerasCV loads it

STACKS = [
    *(("keras3-torch", form, version) for form in FORMATS for version in (1, 2)),
    *(("keras2", "h5", version) for version in (1, 2)),
    ("sprint", "h5", 1),
]
LOADS = [(*load, part) for load in STACKS for part in PARTS if part in CLASSES or load[2] == 1]  # one VAE


@pytest.fixture(scope="module")
def held(back: Path) -> Any:
    """What KerasCV models of a stack hold after loading each file; one process for all its files."""
    known: dict[str, dict[str, Any]] = {}

    def get(stack: str) -> dict[str, Any]:
        if stack not in known:
            arguments: list[str | Path] = []
            for _, form, version, part in (load for load in LOADS if load[0] == stack):
                arguments += [back / f"{version}-{form}" / f"{part}.{form}", part, str(version), "0"]
            printed = run_script(stack, "load_checkpoint.py", *arguments)
            known[stack] = json.loads(printed.splitlines()[-1])
        return known[stack]

    return get


@pytest.mark.parametrize(("stack", "form", "version", "part"), LOADS)
def test_kerascv_loads_it(stack: str, form: str, version: int, part: str, back: Path, held: Any) -> None:
    expected = json.loads((made(part, version) / f"{part}.expected.json").read_text())
    assert held(stack)[str(back / f"{version}-{form}" / f"{part}.{form}")] == expected


@pytest.mark.parametrize("count", [1, 2])
def test_extra_embeddings_come_along(count: int, bpe: Path, tmp_path: Path) -> None:
    """A textual-inversion text encoder: KerasCV's TextEncoder takes its vocabulary as an argument."""
    sample = cached("keras3-torch", "sample.py", "1", str(bpe))
    source = sample / f"inverted_{count}" / "text_encoder.weights.h5"
    names = ["<a>", "<b>"][:count]
    convert(source, out=tmp_path / "out", base="none", placeholder_tokens=names, tokenizer=bpe)
    result = to_keras(tmp_path / "out", out=tmp_path / "back")
    assert result.models == {"text_encoder": f"TextEncoder (vocab_size={49408 + count})"}
    new, old = datasets(tmp_path / "back" / result.files["text_encoder"]), datasets(source)
    assert new.keys() == old.keys()
    assert all(np.array_equal(new[name], old[name]) for name in old)


# There and back


@pytest.mark.parametrize("version", [1, 2])
@pytest.mark.parametrize("form", FORMATS)
def test_round_trip(form: str, version: int, pipelines: dict[int, Path], back: Path, tmp_path: Path) -> None:
    convert(back / f"{version}-{form}", out=tmp_path / "again", base="none")
    old, new = (
        {str(file.relative_to(folder)): file.read_bytes() for file in folder.rglob("*") if file.is_file()}
        for folder in (pipelines[version], tmp_path / "again")
    )
    assert old.keys() == new.keys() and len(old) == 6
    assert [name for name in old if old[name] != new[name]] == []


def test_same_datasets_as_keras_3(pipelines: dict[int, Path], back: Path) -> None:
    for version in pipelines:
        for part in PARTS:
            old = datasets(made(part, version) / f"{part}.weights.h5")
            new = datasets(back / f"{version}-weights.h5" / f"{part}.weights.h5")
            assert new.keys() == old.keys()
            for name in old:
                assert old[name].dtype == new[name].dtype and np.array_equal(old[name], new[name]), name


@pytest.mark.parametrize("form", FORMATS)
@pytest.mark.parametrize("dtype", ["float16", "bfloat16"])
def test_half_precision_is_written_as_float32(dtype: str, form: str, tmp_path: Path) -> None:
    sources = [made(part, 1) / f"{part}.weights.h5" for part in PARTS]
    convert(*sources, out=tmp_path / "half", base="none", dtype=dtype, variant="half")
    result = to_keras(tmp_path / "half", out=tmp_path / "back", format=form, variant="half")  # type: ignore[arg-type]
    for file in result.files.values():
        assert {value.dtype for value in datasets(tmp_path / "back" / file).values()} == {np.dtype("<f4")}
    convert(tmp_path / "back", out=tmp_path / "again", base="none", dtype="float32")
    files = sorted((tmp_path / "half").rglob("*.safetensors"))
    assert len(files) == 3
    for file in files:
        half = load_file(file)
        name = file.name.replace(".half", "")
        again = load_file(tmp_path / "again" / file.parent.name / name)
        assert {tensor.dtype for tensor in half.values()} == {getattr(torch, dtype)}
        assert again.keys() == half.keys()
        for key, tensor in half.items():
            assert torch.equal(again[key], tensor.float()), key
            assert again[key].dtype == torch.float32


def test_other_spellings_of_a_pipeline(pipelines: dict[int, Path], back: Path, tmp_path: Path) -> None:
    """Names of older diffusers and of transformers 5 make the same files, byte for byte."""
    shutil.copytree(pipelines[1], tmp_path / "other")
    vae = tmp_path / "other" / "vae" / "diffusion_pytorch_model.safetensors"
    old = {".to_q.": ".query.", ".to_k.": ".key.", ".to_v.": ".value.", ".to_out.0.": ".proj_attn."}
    renamed = {}
    for name, tensor in load_file(vae).items():
        for new_part, old_part in old.items():
            name = name.replace(new_part, old_part)
        renamed[name] = tensor
    assert renamed.keys() != load_file(vae).keys()
    save_file(renamed, vae)
    text = tmp_path / "other" / "text_encoder" / "model.safetensors"
    bare = {name.removeprefix("text_model."): tensor for name, tensor in load_file(text).items()}
    save_file(bare | {"embeddings.position_ids": torch.arange(77)[None]}, text)
    for form in FORMATS:
        to_keras(tmp_path / "other", out=tmp_path / form, format=form)  # type: ignore[arg-type]
        for part in PARTS:
            name = f"{part}.{form}"
            assert (tmp_path / form / name).read_bytes() == (back / f"1-{form}" / name).read_bytes(), name


# The command


@pytest.mark.parametrize("form", FORMATS)
def test_command(form: str, pipelines: dict[int, Path], back: Path, tmp_path: Path) -> None:
    arguments = ["to-keras", pipelines[1], "--out", tmp_path / "out", "--format", form, "--json"]
    done = subprocess.run(
        [sys.executable, "-m", "kcv2diffusers", *map(str, arguments)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout)
    assert result.pop("seconds") > 0
    files = {part: f"{part}.{form}" for part in PARTS}
    values = sum(
        value.nbytes for file in files.values() for value in datasets(tmp_path / "out" / file).values()
    )
    assert result == {
        "out": str(tmp_path / "out"),
        "files": files,
        "models": CLASSES | VAE_CLASSES | {"text_encoder": "TextEncoder (vocab_size=300)"},
        "bytes_written": values,
    }
    for file in files.values():
        assert (tmp_path / "out" / file).read_bytes() == (back / f"1-{form}" / file).read_bytes()
