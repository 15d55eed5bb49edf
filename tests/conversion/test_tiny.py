"""The base that ships with the package: small, whole, converted like any other, never taken unasked."""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from kcv2diffusers import convert, inspect
from kcv2diffusers.cli import main
from kcv2diffusers.errors import Error
from kcv2diffusers.models.base import load_base
from kcv2diffusers.pictures import psnr
from kcv2diffusers.sources.locate import TINY, locate
from kcv2diffusers.verification.stock_pipeline import replay

PROMPTS = ["a red car in a meadow", "a panda in the snow"]
STEPS, GUIDANCE_SCALE = 10, 5.0  # tools/demo.py and the notebooks draw in 25

Patch = pytest.MonkeyPatch
Captured = pytest.CaptureFixture[str]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    convert(TINY, out=folder)
    return folder


def test_size() -> None:
    files = [path for path in locate(TINY).rglob("*") if path.is_file()]
    assert sum(path.stat().st_size for path in files) <= 16e6
    parts = inspect(TINY)
    assert {part.part for part in parts} == {"unet", "text_encoder", "vae_decoder", "vae_encoder"}
    assert sum(part.parameters for part in parts) <= 8e6
    assert {part.container for part in parts} == {".weights.h5"}


@pytest.mark.slow
def test_pictures_of_the_converted_pipeline(pipeline: Path) -> None:
    """The stock pipeline, from the same noise: equal to what the eye sees, and to KerasCV's GELU exactly."""
    noise = np.random.default_rng(3).standard_normal((len(PROMPTS), 8, 8, 4)).astype("float32")
    sampler = load_base(TINY).sampler()
    keras = sampler.decode(sampler.sample(PROMPTS, noise, steps=STEPS, guidance_scale=GUIDANCE_SCALE))
    assert keras.std() > 30  # not all of one colour
    for tanh_gelu, least in ((False, 40), (True, 55)):
        stock = replay(
            pipeline, PROMPTS, noise, steps=STEPS, guidance_scale=GUIDANCE_SCALE, tanh_gelu=tanh_gelu
        )
        found = psnr(keras, stock)
        print(f"\ntanh GELU {tanh_gelu}: PSNR {found.round(1)} dB")
        assert found.min() >= least
    other = replay(pipeline, PROMPTS[::-1], noise, steps=STEPS, guidance_scale=GUIDANCE_SCALE)
    assert psnr(keras, other).min() < 30  # what a mistake looks like


def test_image_size(pipeline: Path, tmp_path: Path) -> None:
    def sizes(folder: Path) -> list[int]:
        names = ("unet", "vae")
        return [json.loads((folder / name / "config.json").read_text())["sample_size"] for name in names]

    assert sizes(pipeline) == [8, 64]
    convert(TINY, out=tmp_path / "larger", image_size=128)
    assert sizes(tmp_path / "larger") == [16, 128]


def test_it_fills_in_for_a_part_of_its_own_size(tmp_path: Path) -> None:
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("unet.weights.h5", "kcv2diffusers.json"):
        shutil.copy(locate(TINY) / name, mine)
    done = convert(mine, out=tmp_path / "out", base="tiny")
    assert done.complete and done.parts["unet"].startswith(str(mine))


def test_it_is_never_taken_unasked(tmp_path: Path, monkeypatch: Patch) -> None:
    with pytest.raises(Error, match="still needs: VAE"):
        convert(
            locate(TINY) / "unet.weights.h5", locate(TINY) / "text_encoder.weights.h5", out=tmp_path / "x"
        )
    monkeypatch.chdir(tmp_path)
    (tmp_path / "tiny").mkdir()
    for take in (load_base, inspect):
        with pytest.raises(Error, match=r"Say \./tiny for it, or tiny://"):
            take("tiny")


def run(monkeypatch: Patch, *arguments: str | Path) -> int:
    monkeypatch.setattr(sys, "argv", ["kcv2diffusers", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert isinstance(stop.value.code, int)
    return stop.value.code


@pytest.mark.slow
def test_generate(tmp_path: Path, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> None:
    out = tmp_path / "pictures"
    command = ["generate", "--base", "tiny", "--prompt", PROMPTS[0], "--prompt", PROMPTS[1], "--steps", "3"]
    assert run(monkeypatch, *command, "--seed", "4", "--out", out) == 0
    assert capsys.readouterr().out.split() == [str(out / "000.png"), str(out / "001.png")]
    assert run(monkeypatch, *command, "--seed", "4", "--out", out) == 0
    assert run(monkeypatch, *command[:5], "--steps", "2", "--images-per-prompt", "2", "--out", out) == 0
    pictures = [np.asarray(Image.open(path)) for path in sorted(out.iterdir())]
    assert [picture.shape for picture in pictures] == [(64, 64, 3)] * 6
    assert np.array_equal(pictures[0], pictures[2]) and np.array_equal(pictures[1], pictures[3])
    assert not np.array_equal(pictures[4], pictures[5])


@pytest.mark.slow
@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--height", "100"], "multiples of 64"),
        (["--steps", "0"], "at least 1"),
        (["--images-per-prompt", "0"], "at least one image"),
        (["--tokenizer", "missing"], "no such file or folder"),
        (["--base", "missing"], "no such file or folder"),
    ],
)
def test_generate_refuses(
    tmp_path: Path, monkeypatch: Patch, capsys: Captured, options: list[str], message: str
) -> None:
    base = [] if "--base" in options else ["--base", "tiny"]
    assert run(monkeypatch, "generate", *base, "--prompt", "a cat", "--out", tmp_path / "out", *options) == 1
    assert message in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
