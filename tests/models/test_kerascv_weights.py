"""Weights of KerasCV's own models load into ours and back, and both compute the same."""

from __future__ import annotations

import gc
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest

pytest.importorskip("keras_cv")

from kcv2diffusers import models
from tests.models import kerascv
from tests.models.kerascv import SMALL1, SMALL2, randomise, relative_error

Inputs = dict[str, Any] | Any


def unet_inputs(config: models.UNetConfig, height: int = 64, width: int = 64) -> Inputs:
    rng = np.random.default_rng(1)
    return {
        "latent": rng.standard_normal((2, height // 8, width // 8, 4), dtype="float32"),
        "timestep_embedding": rng.standard_normal((2, config.timestep_width), dtype="float32"),
        "context": rng.standard_normal((2, 77, config.context_width), dtype="float32"),
    }


def text_inputs(vocabulary: int) -> Inputs:
    tokens = np.random.default_rng(2).integers(0, vocabulary, (2, 77)).astype("int32")
    return {"tokens": tokens, "positions": np.tile(np.arange(77, dtype="int32"), (2, 1))}


def latents() -> Inputs:
    return np.random.default_rng(3).standard_normal((1, 8, 8, 4), dtype="float32")


def pictures(size: int = 64) -> Inputs:
    return np.random.default_rng(4).uniform(-1, 1, (1, size, size, 3)).astype("float32")


SMALL: dict[str, tuple[Callable[[], keras.Model], Callable[[], keras.Model], Inputs]] = {
    "sd1-unet": (
        lambda: kerascv.small_unet(1),
        lambda: models.build_unet(SMALL1.unet),
        unet_inputs(SMALL1.unet),
    ),
    "sd2-unet": (
        lambda: kerascv.small_unet(2),
        lambda: models.build_unet(SMALL2.unet),
        unet_inputs(SMALL2.unet),
    ),
    "sd1-text": (
        lambda: kerascv.small_text_encoder(1),
        lambda: models.build_text_encoder(SMALL1.text_encoder),
        text_inputs(60),
    ),
    "sd2-text": (
        lambda: kerascv.small_text_encoder(2),
        lambda: models.build_text_encoder(SMALL2.text_encoder),
        text_inputs(60),
    ),
    "decoder": (kerascv.small_decoder, lambda: models.build_decoder(SMALL1.vae), latents()),
    "image-encoder": (
        kerascv.small_image_encoder,
        lambda: models.build_image_encoder(SMALL1.vae),
        pictures(),
    ),
}


@pytest.mark.parametrize("part", SMALL)
def test_weight_files_are_exchangeable(part: str, tmp_path: Path) -> None:
    make_theirs, make_ours, inputs = SMALL[part]
    theirs, ours = make_theirs(), make_ours()
    assert [w.shape for w in ours.weights] == [w.shape for w in theirs.weights]

    randomise(theirs, seed=1)
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    ours.load_weights(tmp_path / "theirs.weights.h5")
    assert relative_error(ours.predict_on_batch(inputs), theirs.predict_on_batch(inputs)) < 1e-5

    before = theirs.predict_on_batch(inputs)
    randomise(ours, seed=2)
    ours.save_weights(tmp_path / "ours.weights.h5")
    theirs.load_weights(tmp_path / "ours.weights.h5")
    expected = theirs.predict_on_batch(inputs)
    assert relative_error(before, expected) > 0.1, "the second set of weights made no difference"
    assert relative_error(ours.predict_on_batch(inputs), expected) < 1e-5


@pytest.mark.parametrize(("height", "width"), [(64, 64), (128, 64), (64, 192)])
def test_one_unet_serves_every_size(height: int, width: int) -> None:
    theirs = kerascv.small_unet(1, height, width)
    ours = models.build_unet(SMALL1.unet)
    for size in ((64, 64), (height, width)):  # the second call must not be bound to the size of the first
        randomise(ours)
        got = ours.predict_on_batch(unet_inputs(SMALL1.unet, *size))
    theirs.set_weights(ours.get_weights())
    assert relative_error(got, theirs.predict_on_batch(unet_inputs(SMALL1.unet, height, width))) < 1e-5


def test_moments_begin_with_the_mean() -> None:
    encoder, both = (models.build_image_encoder(SMALL1.vae, moments=m) for m in (False, True))
    randomise(encoder)
    both.set_weights(encoder.get_weights())
    mean, moments = encoder.predict_on_batch(pictures()), both.predict_on_batch(pictures())
    assert moments.shape == (1, 8, 8, 8)
    assert relative_error(moments[..., :4] * models.LATENT_SCALE, mean) < 1e-6


@pytest.mark.full_size
@pytest.mark.parametrize("part", ["unet", "text", "decoder", "image-encoder"])
@pytest.mark.parametrize("version", [1, 2])
def test_full_size_agrees(version: int, part: str) -> None:
    from keras_cv.src.models.stable_diffusion import decoder, diffusion_model, image_encoder, text_encoder

    config = models.SD1 if version == 1 else models.SD2
    name = {1: "", 2: "V2"}[version]
    if part == "unet":
        theirs = getattr(diffusion_model, f"DiffusionModel{name}")(128, 128, 77, download_weights=False)
        ours, inputs = models.build_unet(config.unet), unet_inputs(config.unet, 128, 128)
    elif part == "text":
        theirs = getattr(text_encoder, f"TextEncoder{name}")(77, download_weights=False)
        ours, inputs = models.build_text_encoder(config.text_encoder), text_inputs(49408)
    elif version == 2:
        pytest.skip("SD2 has SD1's autoencoder")
    elif part == "decoder":
        theirs = decoder.Decoder(64, 64, download_weights=False)
        ours, inputs = models.build_decoder(config.vae), latents()
    else:
        theirs = image_encoder.ImageEncoder(download_weights=False)
        ours, inputs = models.build_image_encoder(config.vae), pictures()
    randomise(theirs)
    assert len(ours.weights) == len(theirs.weights)
    for mine, their in zip(ours.weights, theirs.weights, strict=True):
        mine.assign(their)
    error = relative_error(ours.predict_on_batch(inputs), theirs.predict_on_batch(inputs))
    print(f"\nfull-size SD{version} {part}: relative error {error:.1e}")
    assert error < 1e-5
    del theirs, ours
    gc.collect()
