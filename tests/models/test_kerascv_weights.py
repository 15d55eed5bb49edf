"""Weights of KerasCV's own models load into ours and back, and both compute the same.

The full size is in tests/conversion/test_parity.py.
"""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
from support.models.small import TEXT1, TEXT2, UNET1, UNET2, VAE, relative_error

from kcv2diffusers import models

pytestmark = pytest.mark.slow

Inputs = dict[str, Any] | Any
SIZE = 128


def theirs_of(part: str, version: int = 1) -> keras.Model:
    """KerasCV's model. It is imported here: every process of a test run collects this file."""
    from support.kerascv import stack

    assert stack.SIZE == SIZE
    return stack.build(part, version)


def randomise(model: keras.Model, seed: int) -> None:
    from support.kerascv import stack

    stack.randomise(model, seed)


def unet_inputs(config: models.UNetConfig, height: int = SIZE, width: int = SIZE) -> Inputs:
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
    return np.random.default_rng(3).standard_normal((1, 16, 16, 4), dtype="float32")


def pictures(size: int = SIZE) -> Inputs:
    return np.random.default_rng(4).uniform(-1, 1, (1, size, size, 3)).astype("float32")


SMALL: dict[str, tuple[Callable[[], keras.Model], Callable[[], keras.Model], Inputs]] = {
    "sd1-unet": (
        lambda: theirs_of("unet", 1),
        lambda: models.build_unet(UNET1),
        unet_inputs(UNET1),
    ),
    "sd2-unet": (
        lambda: theirs_of("unet", 2),
        lambda: models.build_unet(UNET2),
        unet_inputs(UNET2),
    ),
    "sd1-text": (
        lambda: theirs_of("text_encoder", 1),
        lambda: models.build_text_encoder(TEXT1),
        text_inputs(TEXT1.vocabulary),
    ),
    "sd2-text": (
        lambda: theirs_of("text_encoder", 2),
        lambda: models.build_text_encoder(TEXT2),
        text_inputs(TEXT2.vocabulary),
    ),
    "decoder": (lambda: theirs_of("vae_decoder"), lambda: models.build_decoder(VAE), latents()),
    "image-encoder": (
        lambda: theirs_of("vae_encoder"),
        lambda: models.build_image_encoder(VAE),
        pictures(),
    ),
}


@pytest.mark.parametrize("part", SMALL)
def test_weight_files_are_exchangeable(part: str, tmp_path: Path) -> None:
    make_theirs, make_ours, inputs = SMALL[part]
    theirs, ours = make_theirs(), make_ours()
    assert [w.shape for w in ours.weights] == [w.shape for w in theirs.weights]

    randomise(theirs, 1)
    theirs.save_weights(tmp_path / "theirs.weights.h5")
    ours.load_weights(tmp_path / "theirs.weights.h5")
    assert relative_error(ours.predict_on_batch(inputs), theirs.predict_on_batch(inputs)) < 1e-5

    before = theirs.predict_on_batch(inputs)
    randomise(ours, 2)
    ours.save_weights(tmp_path / "ours.weights.h5")
    theirs.load_weights(tmp_path / "ours.weights.h5")
    expected = theirs.predict_on_batch(inputs)
    assert relative_error(before, expected) > 0.1, "the second set of weights made no difference"
    assert relative_error(ours.predict_on_batch(inputs), expected) < 1e-5


@pytest.mark.parametrize(("height", "width"), [(128, 128), (64, 192)])
def test_one_unet_serves_every_size(height: int, width: int) -> None:
    from support.kerascv import stack

    square = height == width == SIZE
    theirs = theirs_of("unet") if square else stack.small_unet(1, (height, width))
    ours = models.build_unet(UNET1)
    for size in ((64, 64), (height, width)):  # the second call must not be bound to the size of the first
        randomise(ours, 0)
        got = ours.predict_on_batch(unet_inputs(UNET1, *size))
    theirs.set_weights(ours.get_weights())
    assert relative_error(got, theirs.predict_on_batch(unet_inputs(UNET1, height, width))) < 1e-5


def test_moments_begin_with_the_mean() -> None:
    encoder, both = (models.build_image_encoder(VAE, moments=m) for m in (False, True))
    randomise(encoder, 0)
    both.set_weights(encoder.get_weights())
    mean, moments = encoder.predict_on_batch(pictures()), both.predict_on_batch(pictures())
    assert moments.shape == (1, 16, 16, 8)
    assert relative_error(moments[..., :4] * models.LATENT_SCALE, mean) < 1e-6
