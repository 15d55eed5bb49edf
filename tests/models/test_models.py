"""What the models promise apart from KerasCV: memory, precision, activations, configuration."""

from __future__ import annotations

import dataclasses
import math
from typing import Any

import keras
import numpy as np
import pytest
from support.models.backend_run import TEXT, UNET, VAE, gradients
from support.models.small import relative_error

from kcv2diffusers import models
from kcv2diffusers.models import layers, unet

INPUTS = {
    "latent": np.random.default_rng(0).standard_normal((1, 8, 8, 4), dtype="float32"),
    "timestep_embedding": np.random.default_rng(1).standard_normal((1, 32), dtype="float32"),
    "context": np.random.default_rng(2).standard_normal((1, 5, 24), dtype="float32"),
}


@pytest.mark.slow
def test_rematerialised_blocks_are_computed_again(monkeypatch: pytest.MonkeyPatch) -> None:
    calls = 0
    compute = unet.ResBlock.compute

    def counted(self: Any, *tensors: Any) -> Any:
        nonlocal calls
        calls += 1
        return compute(self, *tensors)

    monkeypatch.setattr(unet.ResBlock, "compute", counted)
    model = models.build_unet(UNET)
    blocks = [layer for layer in model.layers if isinstance(layer, layers.Block)]
    assert {type(block).__name__ for block in blocks} == {"ResBlock", "SpatialTransformer"}
    counts = [
        calls
    ]  # one call builds a block; Keras by itself makes two to four, and takes three times as long
    for enabled in (False, True, False):
        models.rematerialise(model, enabled)
        calls = 0
        gradients(model, INPUTS)
        counts.append(calls)
    if keras.backend.backend() == "jax":  # jax.checkpoint repeats the traced operations, not the Python call
        pytest.skip("JAX recomputes inside the compiled program")
    number = sum(isinstance(block, unet.ResBlock) for block in blocks)
    assert counts == [number, number, 2 * number, number]


def test_blocks_say_what_they_give() -> None:
    """Keras takes a block's word for the shape and dtype of its output."""
    model = models.build_unet(UNET, dtype="mixed_bfloat16")
    blocks = [layer for layer in model.layers if isinstance(layer, layers.Block)]
    for block in blocks:
        inputs = [keras.ops.ones([8 if size is None else size for size in x.shape]) for x in block.input]
        given = block(inputs)
        assert given.shape[-1] == block.output.shape[-1]
        assert keras.backend.standardize_dtype(given.dtype) == block.output.dtype == "bfloat16"


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_mixed_precision_stays_close_and_keeps_float32_variables(policy: str) -> None:
    exact, mixed = models.build_unet(UNET), models.build_unet(UNET, dtype=policy)
    mixed.set_weights(exact.get_weights())
    assert {variable.dtype for variable in mixed.weights} == {"float32"}
    assert keras.config.dtype_policy().name == "float32", "the global policy must be as before"
    got = mixed.predict_on_batch(INPUTS)
    assert keras.backend.standardize_dtype(got.dtype) == policy.removeprefix("mixed_")
    error = relative_error(got, exact.predict_on_batch(INPUTS))
    assert 1e-6 < error < 0.05


@pytest.mark.parametrize("make", [lambda: layers.group_norm(2), layers.layer_norm])
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_normalisation_statistics_are_float32(make: Any, policy: str) -> None:
    """Squares of these inputs overflow float16, and bfloat16 loses their differences from the mean."""
    exact = make()
    with layers.dtype_policy(policy):
        mixed = make()
    values = 3e4 + 1e3 * np.random.default_rng(0).standard_normal((1, 4, 4, 8), dtype="float32")
    coarse = keras.ops.cast(values, policy.removeprefix("mixed_"))
    expected = keras.ops.convert_to_numpy(exact(keras.ops.cast(coarse, "float32")))
    got = keras.ops.convert_to_numpy(keras.ops.cast(mixed(coarse), "float32"))
    assert np.isfinite(got).all()
    assert np.abs(got - expected).max() < 0.02


def test_group_normalisation_equals_keras_own() -> None:
    ours, kerases = layers.group_norm(4), keras.layers.GroupNormalization(4, epsilon=layers.EPSILON)
    x = np.random.default_rng(0).standard_normal((2, 6, 10, 16), dtype="float32") * 3 + 1
    for layer in (ours, kerases):
        layer.build(x.shape)
        layer.gamma.assign(np.linspace(0.5, 1.5, 16))
        layer.beta.assign(np.linspace(-1, 1, 16))
    got, expected = (keras.ops.convert_to_numpy(layer(x)) for layer in (ours, kerases))
    assert relative_error(got, expected) < 1e-5


@pytest.mark.slow
def test_gelu_is_an_argument_and_the_two_differ_a_little() -> None:
    tanh = models.build_unet(UNET)
    exact = models.build_unet(dataclasses.replace(UNET, gelu="exact"))
    exact.set_weights(tanh.get_weights())
    error = relative_error(exact.predict_on_batch(INPUTS), tanh.predict_on_batch(INPUTS))
    assert 1e-7 < error < 1e-2
    x = np.linspace(-4, 4, 101, dtype="float32")
    expected = [value * 0.5 * (1 + math.erf(value / math.sqrt(2))) for value in x]
    assert np.abs(keras.ops.convert_to_numpy(layers.ACTIVATIONS["exact"](x)) - expected).max() < 1e-6


def test_a_token_does_not_see_those_after_it() -> None:
    model = models.build_text_encoder(TEXT)
    positions = np.arange(6, dtype="int32")[None]
    first = np.array([[1, 2, 3, 4, 5, 6]], dtype="int32")
    second = np.array([[1, 2, 3, 9, 9, 9]], dtype="int32")
    one, two = (model.predict_on_batch({"tokens": t, "positions": positions}) for t in (first, second))
    assert np.abs(one[:, :3] - two[:, :3]).max() < 1e-5
    assert np.abs(one[:, 3:] - two[:, 3:]).max() > 1e-2


def test_decoder_undoes_the_size_of_the_encoder() -> None:
    encoder, decoder = models.build_image_encoder(VAE), models.build_decoder(VAE)
    latents = encoder.predict_on_batch(np.zeros((1, 48, 80, 3), "float32"))
    assert latents.shape == (1, 24, 40, 4)  # two resolutions in VAE, so one halving
    assert decoder.predict_on_batch(latents).shape == (1, 48, 80, 3)


@pytest.mark.parametrize("change", [{"heads": (5, 4)}, {"norm_groups": 7}, {"heads": (2,)}])
def test_sizes_that_do_not_fit_are_refused(change: dict[str, Any]) -> None:
    with pytest.raises(ValueError, match=r"divide|heads"):
        dataclasses.replace(UNET, **change)
