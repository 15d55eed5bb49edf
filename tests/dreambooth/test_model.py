"""The loss is what its formula says, whatever the options; what is trained has gradients, all else none."""

from __future__ import annotations

import itertools
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from support.models.backend_run import TEXT, UNET, gradients

from kcv2diffusers import models
from kcv2diffusers.diffusion import SD, Schedule, alphas_cumprod, timestep_embedding
from kcv2diffusers.dreambooth import lora
from kcv2diffusers.dreambooth.lora import add_lora, attention_projections, store_frozen_as_computed
from kcv2diffusers.dreambooth.model import DreamBooth, embed
from kcv2diffusers.dreambooth.snapshots import Snapshots
from kcv2diffusers.dreambooth.torch_step import TorchStep
from kcv2diffusers.models.layers import Conv2D, dense, dtype_policy

RNG = np.random.default_rng(0)
OPTIONS: dict[str, Any] = {"prior_weight": 0.3, "snr_gamma": 2.0, "prediction_type": "v_prediction"}


def batch(condition: Any) -> dict[str, Any]:
    return {
        "latents": RNG.standard_normal((4, 8, 16, 4), dtype="float32"),
        "noise": RNG.standard_normal((4, 8, 16, 4), dtype="float32"),
        "timesteps": np.array([3, 400, 999, 10], "int32"),
        "condition": condition,
        "prior": np.array([0, 0, 1, 1], "float32"),
    }


def tensors(given: dict[str, Any]) -> dict[str, Any]:
    """As `fit` hands them over, where `compute_loss` is called without it."""
    return {name: keras.ops.convert_to_tensor(value) for name, value in given.items()}


EMBEDDED = batch(RNG.standard_normal((4, 9, 24), dtype="float32"))
TOKENS = batch(RNG.integers(0, 50, (4, 9)).astype("int32"))


@pytest.fixture(scope="module")
def unet() -> keras.Model:
    return models.build_unet(UNET)


def by_hand(
    x: dict[str, Any],
    predicted: Any,
    prior_weight: float,
    snr_gamma: float,
    prediction_type: str,
    schedule: Schedule = SD,
) -> float:
    signal = schedule.alphas_cumprod.astype("float64")[x["timesteps"]]
    losses = []
    for i in range(4):
        a = signal[i]
        target = x["noise"][i]
        if prediction_type == "v_prediction":
            target = a**0.5 * x["noise"][i] - (1 - a) ** 0.5 * x["latents"][i]
        loss = ((predicted[i] - target) ** 2).mean()
        snr = a / (1 - a)
        if snr_gamma:
            loss *= min(snr, snr_gamma) / (snr + 1 if prediction_type == "v_prediction" else snr)
        losses.append(loss)
    return float(np.mean(losses[:2]) + prior_weight * np.mean(losses[2:]))


@pytest.mark.parametrize("chosen", [c for n in range(4) for c in itertools.combinations(OPTIONS, n)])
def test_loss(unet: keras.Model, chosen: tuple[str, ...]) -> None:
    options = {"prior_weight": 1.0, "snr_gamma": 0.0, "prediction_type": "epsilon"}
    options |= {name: OPTIONS[name] for name in chosen}
    model = DreamBooth(unet, **options)
    predicted = keras.ops.convert_to_numpy(model(EMBEDDED))
    got = float(model.compute_loss(tensors(EMBEDDED), None, keras.ops.convert_to_tensor(predicted)))
    assert got == pytest.approx(by_hand(EMBEDDED, predicted, **options), rel=1e-5)


def test_the_bases_schedule_is_trained_with(unet: keras.Model) -> None:
    schedule = Schedule(0.0001, 0.02, "linear", rescale_betas_zero_snr=True)
    options = {"prior_weight": 0.3, "snr_gamma": 2.0, "prediction_type": "v_prediction", "schedule": schedule}
    model = DreamBooth(unet, **options)
    signal = schedule.alphas_cumprod[EMBEDDED["timesteps"]][:, None, None, None]
    assert signal[2] == 0  # timestep 999 is noise alone
    noisy = np.sqrt(signal) * EMBEDDED["latents"] + np.sqrt(1 - signal) * EMBEDDED["noise"]
    embedding = timestep_embedding(EMBEDDED["timesteps"], 32)
    expected = unet({"latent": noisy, "timestep_embedding": embedding, "context": EMBEDDED["condition"]})
    predicted = keras.ops.convert_to_numpy(model(EMBEDDED))
    np.testing.assert_allclose(predicted, keras.ops.convert_to_numpy(expected), atol=2e-5)
    got = float(model.compute_loss(tensors(EMBEDDED), None, keras.ops.convert_to_tensor(predicted)))
    assert got == pytest.approx(by_hand(EMBEDDED, predicted, **options), rel=1e-5)
    usual = DreamBooth(unet, **options | {"schedule": SD})
    usual = float(usual.compute_loss(tensors(EMBEDDED), None, keras.ops.convert_to_tensor(predicted)))
    assert usual != pytest.approx(got, rel=1e-2)


def test_the_unet_sees_the_noised_latents(unet: keras.Model) -> None:
    signal = alphas_cumprod()[EMBEDDED["timesteps"]][:, None, None, None]
    noisy = np.sqrt(signal) * EMBEDDED["latents"] + np.sqrt(1 - signal) * EMBEDDED["noise"]
    embedding = timestep_embedding(EMBEDDED["timesteps"], 32)
    expected = unet({"latent": noisy, "timestep_embedding": embedding, "context": EMBEDDED["condition"]})
    got = DreamBooth(unet)(EMBEDDED)
    np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, (got, expected)), atol=2e-5)
    np.testing.assert_allclose(
        keras.ops.convert_to_numpy(embed(EMBEDDED["timesteps"], 32)), embedding, atol=1e-4
    )


@pytest.mark.slow
@pytest.mark.parametrize("rank", [0, 2])
@pytest.mark.parametrize("text", [False, True])
def test_what_is_trained(rank: int, text: bool) -> None:
    unet = models.build_unet(UNET)
    text_encoder = models.build_text_encoder(TEXT) if text else None
    if rank:
        for part in filter(None, (unet, text_encoder)):
            add_lora(part, rank, rank, conv_rank=rank)
            for layer in lora.lora_layers(part):  # zeros at first, which gives A no gradient
                layer.lora_kernel_b.assign(0.1 * RNG.standard_normal(layer.lora_kernel_b.shape))
    model = DreamBooth(unet, text_encoder)
    names = {variable.path for variable in model.trainable_variables}
    if rank:
        assert names and all("lora_kernel" in name for name in names)
    else:
        assert len(names) == len(unet.weights) + (len(text_encoder.weights) if text_encoder else 0)
    given = TOKENS if text else EMBEDDED
    found = gradients(model, given, lambda output: model.compute_loss(tensors(given), None, output))
    assert len(found) == len(model.trainable_variables)
    for variable, gradient in zip(model.trainable_variables, found, strict=True):
        values = keras.ops.convert_to_numpy(gradient)
        # Attention does not change when one number is added to all scores: CLIP's key bias has no gradient.
        if not variable.path.endswith("k_proj/bias"):
            assert np.abs(values).max() > 0, variable.path


def test_lora_is_the_merged_kernel_and_has_its_gradients() -> None:
    given, layer = keras.Input((4, 5), name="x"), dense(7)
    model = keras.Model({"x": given}, layer(given))
    x, weight = RNG.standard_normal((3, 4, 5), "float32"), RNG.standard_normal((3, 4, 7), "float32")
    base = model.predict_on_batch({"x": x})
    add = {"lora_kernel_a": RNG.standard_normal((5, 2)), "lora_kernel_b": RNG.standard_normal((2, 7))}
    layer.enable_lora(2, lora_alpha=6)
    model.predict_function = None
    for name, value in add.items():
        getattr(layer, name).assign(value)
    first, second = add.values()
    np.testing.assert_allclose(
        model.predict_on_batch({"x": x}), base + 3 * x @ first @ second, rtol=1e-5, atol=1e-5
    )
    of_kernel = np.einsum("bti,bto->io", x, weight)
    expected = {
        "bias": weight.sum((0, 1)),
        "lora_kernel_a": 3 * of_kernel @ second.T,
        "lora_kernel_b": 3 * first.T @ of_kernel,
    }
    found = gradients(model, {"x": x}, lambda output: keras.ops.sum(keras.ops.multiply(output, weight)))
    assert {variable.name for variable in model.trainable_variables} == set(expected)
    for variable, gradient in zip(model.trainable_variables, found, strict=True):
        got = keras.ops.convert_to_numpy(gradient)
        np.testing.assert_allclose(got, expected[variable.name], rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("size", "stride", "padding", "pixels"),
    [(3, 1, "same", 8), (3, 1, "same", 2), (1, 1, "same", 8), (3, 2, "valid", 9)],
    ids=["usual", "as a product", "1x1", "down"],
)
def test_lora_of_a_convolution_is_the_merged_kernel(
    size: int, stride: int, padding: str, pixels: int
) -> None:
    """In the output and in the gradients; the gradient of the kernel itself by Keras."""
    made = [Conv2D(7, size, strides=stride, padding=padding) for _ in range(2)]
    given = keras.Input((None, None, 5), name="x")
    ours, merged = (keras.Model({"x": given}, layer(given)) for layer in made)
    x = RNG.standard_normal((3, pixels, pixels, 5), "float32")
    first, second = RNG.standard_normal((size, size, 5, 2)), RNG.standard_normal((2, 7))
    made[0].enable_lora(2, lora_alpha=6)
    ours.predict_function = None
    made[0].lora_kernel_a.assign(first)
    made[0].lora_kernel_b.assign(second)
    made[1].kernel.assign(keras.ops.convert_to_numpy(made[0]._kernel) + 3 * first @ second)
    weight = RNG.standard_normal(merged.predict_on_batch({"x": x}).shape, "float32")
    np.testing.assert_allclose(
        ours.predict_on_batch({"x": x}), merged.predict_on_batch({"x": x}), rtol=1e-4, atol=1e-4
    )
    found, whole = (
        {
            variable.name: keras.ops.convert_to_numpy(gradient)
            for variable, gradient in zip(
                model.trainable_variables,
                gradients(model, {"x": x}, lambda output: keras.ops.sum(keras.ops.multiply(output, weight))),
                strict=True,
            )
        }
        for model in (ours, merged)
    )
    of_kernel = whole["kernel"]
    expected = {
        "bias": whole["bias"],
        "lora_kernel_a": 3 * of_kernel @ second.T,
        "lora_kernel_b": 3 * np.einsum("hwir,hwio->ro", first, of_kernel),
    }
    assert found.keys() == expected.keys()
    for name, value in expected.items():
        np.testing.assert_allclose(found[name], value, rtol=1e-3, atol=1e-3)


def test_what_has_a_lora(unet: keras.Model) -> None:
    """Convolutions but for those from and to latents."""
    convolutions = [v for v in unet.weights if len(v.shape) == 4]
    assert len(lora.convolutions(unet)) == len(convolutions) - 2
    assert lora.lora_layers(unet) == []


@pytest.mark.slow
def test_lora_starts_at_the_base_and_saves_merged(tmp_path) -> None:
    unet = models.build_unet(UNET)
    given = {
        "latent": EMBEDDED["latents"],
        "timestep_embedding": timestep_embedding(EMBEDDED["timesteps"], 32),
    }
    given["context"] = EMBEDDED["condition"]
    before = unet.predict_on_batch(given)
    add_lora(unet, 3, 6)
    np.testing.assert_allclose(unet.predict_on_batch(given), before, atol=1e-5)
    for layer in attention_projections(unet):  # with more, attention turns round-off into other pictures
        layer.lora_kernel_b.assign(0.1 * RNG.standard_normal(layer.lora_kernel_b.shape))
    changed = unet.predict_on_batch(given)
    assert np.abs(changed - before).max() > 1e-2
    unet.save_weights(tmp_path / "merged.weights.h5")
    plain = models.build_unet(UNET)
    plain.load_weights(tmp_path / "merged.weights.h5")
    np.testing.assert_allclose(plain.predict_on_batch(given), changed, atol=1e-4)


@pytest.mark.slow
@pytest.mark.parametrize("policy", ["mixed_bfloat16", "mixed_float16"])
def test_frozen_weights_in_16_bits_change_no_bit(policy: str) -> None:
    """Of the loss and of the gradients; those in float32 stay so."""
    rng = np.random.default_rng(0)
    with dtype_policy(policy):
        unet, text_encoder = models.build_unet(UNET), models.build_text_encoder(TEXT)
        for part in (unet, text_encoder):
            add_lora(part, 2, 2)
            for layer in attention_projections(part):
                layer.lora_kernel_b.assign(0.1 * rng.standard_normal(layer.lora_kernel_b.shape))
        model = DreamBooth(unet, text_encoder)
    frozen = [v for part in (unet, text_encoder) for v in part.weights if not v.trainable]
    found, sizes = [], []
    for _ in range(2):
        sizes.append(Snapshots(frozen).bytes)
        step = TorchStep(model)
        model.optimizer = SimpleNamespace(scale_loss=lambda loss: 128 * loss)
        loss, gradients = step._compute(tensors(TOKENS))
        found.append([keras.ops.convert_to_numpy(one) for one in (loss, *gradients)])
        for part in (unet, text_encoder):
            store_frozen_as_computed(part)
    assert 0.5 <= sizes[1] / sizes[0] < 0.52
    assert {v.dtype for v in model.trainable_variables} == {"float32"}
    assert {v.dtype for v in frozen if len(v.shape) > 1} == {policy.removeprefix("mixed_")}
    assert all(keras.backend.standardize_dtype(v.value.dtype) == v.dtype for v in frozen)
    parameters = {id(parameter) for part in (unet, text_encoder) for parameter in part.parameters()}
    assert {id(variable._value) for variable in frozen} <= parameters
    assert np.isfinite(found[0][0]) and len(found[0]) > 10
    for one, other in zip(*found, strict=True):
        np.testing.assert_array_equal(one, other)
