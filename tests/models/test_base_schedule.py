"""A base of other noise than Stable Diffusion's: ours draws what diffusers draws, or refuses."""

from __future__ import annotations

import json
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import pytest

from kcv2diffusers import convert, to_keras
from kcv2diffusers.diffusion import SD, Schedule
from kcv2diffusers.errors import Error
from kcv2diffusers.models.base import load_base
from kcv2diffusers.models.tokenizer import Tokenizer
from kcv2diffusers.pictures import psnr
from kcv2diffusers.pipeline.tokenizer_files import write_tokenizer
from kcv2diffusers.sources.locate import TINY, locate
from kcv2diffusers.verification.stock_pipeline import replay

LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
TRAILING = {"timestep_spacing": "trailing"}
ZERO_SNR = TRAILING | {"rescale_betas_zero_snr": True, "prediction_type": "v_prediction"}
NOISE = np.random.default_rng(3).standard_normal((1, 8, 8, 4)).astype("float32")


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "pipeline"
    convert(TINY, out=out)
    return out


def drawn(pipeline: Path) -> Any:
    return replay(pipeline, ["a red car"], NOISE, steps=4, guidance_scale=5.0)


@pytest.fixture(scope="module")
def usual(made: Path) -> Any:
    """The picture of Stable Diffusion's own noise."""
    return drawn(made)


def with_noise(made: Path, folder: Path, **entries: Any) -> Path:
    shutil.copytree(made, folder)
    path = folder / "scheduler" / "scheduler_config.json"
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))
    return folder


@pytest.mark.slow
@pytest.mark.parametrize("noise", [{}, LINEAR, TRAILING, ZERO_SNR])
def test_pictures_are_diffusers(noise: dict[str, Any], made: Path, usual: Any, tmp_path: Path) -> None:
    pipeline = with_noise(made, tmp_path / "pipeline", **noise)
    base = load_base(pipeline)
    stated = {name: value for name, value in noise.items() if name != "prediction_type"}
    assert base.schedule == Schedule(**stated)
    assert base.stated.get("scheduler", {}) == noise
    sampler = base.sampler()
    ours = sampler.decode(sampler.sample(["a red car"], NOISE, steps=4, guidance_scale=5.0))
    assert psnr(ours, drawn(pipeline)).min() > 55
    assert not noise or psnr(ours, usual).min() < 30


@pytest.mark.slow
def test_checkpoints_of_such_a_base(made: Path, tmp_path: Path) -> None:
    """Through to-keras, and, without it, by what Base states for the checkpoints of a training."""
    to_keras(with_noise(made, tmp_path / "pipeline", **ZERO_SNR), out=tmp_path / "keras")
    base = load_base(tmp_path / "keras")
    assert (base.prediction_type, base.stated["scheduler"]) == ("v_prediction", ZERO_SNR)
    trained = shutil.copytree(locate(TINY), tmp_path / "trained")
    (trained / "kcv2diffusers.json").write_text(json.dumps(base.stated))
    convert(trained, out=tmp_path / "again")
    again, before = (
        json.loads((tmp_path / name / "scheduler" / "scheduler_config.json").read_text())
        for name in ("again", "pipeline")
    )
    assert again == before
    assert load_base(TINY).schedule == SD


@pytest.mark.slow
def test_noise_predicted_from_noise_alone_is_refused(made: Path, tmp_path: Path) -> None:
    pipeline = with_noise(made, tmp_path / "pipeline", rescale_betas_zero_snr=True)
    with pytest.raises(Error, match="rescale_betas_zero_snr"):
        load_base(pipeline).sampler()


def test_a_tokenizer_with_too_many_tokens_is_refused(tmp_path: Path) -> None:
    words = [a + b + c for a in "bcdfghjklmnp" for b in "aeiou" for c in "rstvwxz"]
    write_tokenizer(Tokenizer.of_words(words).files, tmp_path / "tokenizer")
    with pytest.raises(Error, match="691 token embeddings, fewer than"):
        load_base(TINY, tokenizer=tmp_path / "tokenizer")
