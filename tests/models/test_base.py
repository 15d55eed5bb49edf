"""A model loads from KerasCV checkpoints, from the pipeline made of them, and computes the same."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from support.checkpoints import small_base

from kcv2diffusers import models
from kcv2diffusers.conversion.to_diffusers import convert
from kcv2diffusers.errors import Error
from kcv2diffusers.models.base import load_base

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def folder() -> Path:
    return small_base()


def sample(base: Any) -> Any:
    noise = np.random.default_rng(1).standard_normal((1, 8, 8, 4)).astype("float32")
    return base.sampler().sample(["a red car"], noise, steps=3)


def test_a_base_loads_with_its_heads_and_groups(folder: Path) -> None:
    base = load_base(folder)
    assert base.version == "sd1"
    assert base.config.unet.heads == (4, 4, 4, 4)
    assert (base.config.unet.norm_groups, base.config.vae.norm_groups) == (4, 2)
    assert base.config.text_encoder.heads == 3
    assert base.config.unet.gelu == "tanh"
    assert len(base.tokenizer.encode("a red car")) == 5
    again = models.build_unet(base.config.unet)
    again.load_weights(folder / "unet.weights.h5")
    for loaded, expected in zip(base.unet.get_weights(), again.get_weights(), strict=True):
        assert np.array_equal(loaded, expected)


def test_the_pipeline_made_of_it_gives_the_same_model(folder: Path, tmp_path: Path) -> None:
    convert(folder, out=tmp_path / "pipeline", tokenizer=folder / "tokenizer", image_size=64)
    expected, got = load_base(folder), load_base(tmp_path / "pipeline", gelu="tanh")
    assert got.config == expected.config
    for part in ("unet", "text_encoder", "decoder", "image_encoder"):
        pairs = zip(getattr(got, part).get_weights(), getattr(expected, part).get_weights(), strict=True)
        assert all(np.array_equal(one, other) for one, other in pairs), part
    assert np.array_equal(sample(got), sample(expected))
    assert load_base(tmp_path / "pipeline").config.unet.gelu == "exact"


def test_a_pipeline_that_predicts_v(folder: Path, tmp_path: Path) -> None:
    """Ours beside diffusers on the same UNet; a UNet of KerasCV predicts noise, whatever the base does."""
    pytest.importorskip("diffusers")
    from kcv2diffusers.verification.stock_pipeline import replay

    options = {"tokenizer": folder / "tokenizer", "image_size": 64}
    convert(folder, out=tmp_path / "v", prediction_type="v_prediction", **options)
    convert(unet=folder / "unet.weights.h5", base=tmp_path / "v", out=tmp_path / "e")
    pictures = {}
    noise = np.random.default_rng(1).standard_normal((1, 8, 8, 4)).astype("float32")
    for name in ("v", "e"):
        base = load_base(tmp_path / name)
        assert base.prediction_type == {"v": "v_prediction", "e": "epsilon"}[name]
        pictures[name] = base.sampler().decode(base.sampler().sample(["a red car"], noise, steps=3))
        stock = replay(tmp_path / name, ["a red car"], noise, steps=3)
        assert np.abs(pictures[name].astype(int) - stock).max() <= 1
    assert np.abs(pictures["v"].astype(int) - pictures["e"]).max() > 20


def test_what_is_not_a_whole_model_is_refused(folder: Path) -> None:
    with pytest.raises(Error, match="VAE decoder"):
        load_base(folder / "unet.weights.h5", folder / "text_encoder.weights.h5")
