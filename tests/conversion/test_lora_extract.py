"""A LoRA from the difference of two models: how much of it is kept, and that it leads back."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.loras import WEIGHTS, kernels, kohya, save
from support.random_pipelines import random_pipeline

from kcv2diffusers import convert, extract_lora, to_keras
from kcv2diffusers.errors import Error

pytestmark = pytest.mark.slow

VERSIONS = ("sd1", "sd2")


@pytest.fixture(scope="module")
def models(tmp_path_factory: pytest.TempPathFactory) -> dict[str, tuple[Path, Path]]:
    """A base of each version and a fine-tune whose layers differ by a matrix of rank 4. Not to be changed."""
    folder = tmp_path_factory.mktemp("models")
    made = {}
    for version in VERSIONS:
        base = random_pipeline(folder / version, version)
        lora = save(kohya(base, scale=0.5), folder / f"{version}.safetensors")
        made[version] = base, convert(base=base, out=folder / f"{version}-tuned", lora=lora).out
    return made


def error(one: Path, other: Path) -> float:
    """The root of the mean squared difference of the layers of two pipelines."""
    first, second = kernels(one), kernels(other)
    assert first.keys() == second.keys()
    squares = [np.square(first[name] - second[name], dtype="float64").ravel() for name in first]
    return float(np.sqrt(np.concatenate(squares).mean()))


@pytest.mark.parametrize("version", VERSIONS)
def test_a_difference_of_low_rank_is_found_whole(version: str, models, tmp_path: Path) -> None:
    base, tuned = models[version]
    found = extract_lora(tuned, base=base, out=tmp_path / "lora.safetensors", rank=4)
    assert found.kept > 1 - 1e-6 and min(found.modules.values()) > 1 - 1e-6
    assert found.modules.keys() == {f"{c}.{m}" for c, m in kernels(base)}
    assert found.left_out == []
    assert "lora_adapter_metadata" not in found.out.read_bytes()[:1000].decode("latin-1")  # alpha is the rank
    back = convert(base=base, out=tmp_path / "back", lora=found.out).out
    assert error(tuned, base) > 0.1 and error(tuned, back) < 1e-5
    auto = extract_lora(tuned, base=base, out=tmp_path / "auto.safetensors", rank="auto", keep=0.9999)
    assert 3 <= max(auto.ranks.values()) <= 4 and auto.kept >= 0.9999


def test_shares_are_those_of_the_singular_values(models, tmp_path: Path) -> None:
    base, tuned = models["sd1"]
    found = extract_lora(tuned, base=base, out=tmp_path / "lora.safetensors", rank=2)
    kept = whole = 0.0
    for (component, module), weight in kernels(tuned).items():
        difference = (weight - kernels(base)[component, module]).reshape(len(weight), -1).astype("float64")
        squares = np.linalg.svd(difference, compute_uv=False) ** 2
        assert found.modules[f"{component}.{module}"] == pytest.approx(
            squares[:2].sum() / squares.sum(), 1e-4
        )
        kept, whole = kept + squares[:2].sum(), whole + squares.sum()
    assert found.kept == pytest.approx(kept / whole, 1e-4)
    # The error after merging is what the shares say of the squares.
    back = convert(base=base, out=tmp_path / "back", lora=found.out).out
    assert error(tuned, back) == pytest.approx(error(tuned, base) * np.sqrt(1 - found.kept), 1e-2)
    auto = extract_lora(tuned, base=base, out=tmp_path / "auto.safetensors", rank="auto", keep=0.7)
    assert min(auto.modules.values()) >= 0.7
    assert len(set(auto.ranks.values())) > 1


def test_keras_checkpoints_and_single_files_give_the_same(models, tmp_path: Path) -> None:
    base, tuned = models["sd1"]
    keras = to_keras(tuned, out=tmp_path / "keras").out
    single = convert(base, out=tmp_path / "base.safetensors").out
    one = extract_lora(tuned, base=base, out=tmp_path / "one.safetensors", rank=3)
    two = extract_lora(keras, base=single, out=tmp_path / "two.safetensors", rank=3)
    assert two.kept == pytest.approx(one.kept, 1e-5)
    merged = [
        convert(base=base, out=tmp_path / f"m{n}", lora=lora.out).out for n, lora in enumerate((one, two))
    ]
    assert error(*merged) < 1e-5


def test_what_a_lora_cannot_hold_is_said(models, tmp_path: Path) -> None:
    base, tuned = models["sd1"]
    other = convert(base=tuned, out=tmp_path / "other").out
    tensors = dict(load_file(other / WEIGHTS["unet"]))
    tensors["conv_in.bias"] = tensors["conv_in.bias"] + np.float32(100)
    save_file(tensors, other / WEIGHTS["unet"], {"format": "pt"})
    found = extract_lora(other, base=base, out=tmp_path / "lora.safetensors", rank=4)
    assert found.left_out == ["unet.conv_in.bias"] and found.kept < 0.9
    assert "are not in it: 1" in found.text()


def test_a_dry_run_writes_nothing(models, tmp_path: Path) -> None:
    base, tuned = models["sd1"]
    options = {"base": base, "out": tmp_path / "lora.safetensors", "rank": 2, "dtype": "fp16"}
    plan = extract_lora(tuned, **options, dry_run=True)
    assert list(tmp_path.iterdir()) == [] and "Nothing was written" in plan.text()
    done = extract_lora(tuned, **options)
    assert (plan.ranks, plan.bytes_written) == (done.ranks, done.bytes_written)
    whole = extract_lora(tuned, base=base, out=tmp_path / "auto.safetensors", rank="auto", dry_run=True)
    for (component, module), weight in kernels(base).items():
        assert whole.ranks[f"{component}.{module}"] == min(len(weight), weight[0].size)
    with pytest.raises(Error, match="do not fit"):
        extract_lora(tuned, base=models["sd2"][0], out=tmp_path / "new.safetensors", dry_run=True)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rank": 0}, "--rank 0"),
        ({"rank": "all"}, "--rank all"),
        ({"keep": 0.0}, "--keep 0"),
        ({"keep": 1.1}, "--keep 1.1"),
        ({"keep": float("nan")}, "--keep nan"),
        ({"format": "peft"}, "--format peft"),
        ({"dtype": "int8"}, "--dtype int8"),
        ({"out": "lora.bin"}, r"ends in \.safetensors"),
    ],
    ids=str,
)
def test_bad_options_are_refused(options: dict, message: str, models, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.chdir(tmp_path)
    base, tuned = models["sd1"]
    with pytest.raises(Error, match=message):
        extract_lora(tuned, **{"base": base, "out": "lora.safetensors", **options})
    assert list(tmp_path.iterdir()) == []


def test_models_that_do_not_fit_are_refused(models, tmp_path: Path) -> None:
    out = tmp_path / "lora.safetensors"
    with pytest.raises(Error, match="do not fit"):
        extract_lora(models["sd1"][1], base=models["sd2"][0], out=out)
    with pytest.raises(Error, match="do not differ"):
        extract_lora(models["sd1"][0], base=models["sd1"][0], out=out)
    keras = to_keras(models["sd1"][0], out=tmp_path / "keras").out
    with pytest.raises(Error, match="neither a UNet nor a text encoder"):
        extract_lora(keras / "vae_decoder.weights.h5", base=models["sd1"][0], out=out)
    assert not out.exists()


def test_command(models, tmp_path: Path) -> None:
    base, tuned = models["sd1"]
    command = [sys.executable, "-m", "kcv2diffusers", "extract-lora", str(tuned), "--base", str(base)]
    command += ["--out", "lora.safetensors", "--dtype", "fp16", "--format", "kohya"]

    def run(*words: str) -> subprocess.CompletedProcess[str]:
        return subprocess.run([*command, *words], cwd=tmp_path, capture_output=True, text=True, check=False)

    done = run("--rank", "auto", "--keep", "0.9", "--json")
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["kept"] >= 0.9 and told["format"] == "kohya"
    tensors = load_file(tmp_path / "lora.safetensors")
    assert {tensor.dtype.name for tensor in tensors.values()} == {"float16"}
    assert all(name.startswith("lora_") for name in tensors)
    assert told["bytes_written"] == sum(tensor.nbytes for tensor in tensors.values())
    again = run("--rank", "2", "--overwrite")
    assert "rank 2" in again.stdout + again.stderr
    refused = run("--rank", "two")
    assert refused.returncode == 1 and "--rank two" in refused.stderr
