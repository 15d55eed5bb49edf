"""Adam-mini is its formula, and its state is small. On TensorFlow: tests/models/test_on_tensorflow.py."""

from __future__ import annotations

import keras
import ml_dtypes
import numpy as np
import pytest

from kcv2diffusers.dreambooth import torch_updates
from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.dreambooth.optimizers import make_optimizer

RATE, DECAY = 0.01, 0.1


def by_hand(value: np.ndarray, gradients: list[np.ndarray], axes: tuple[int, ...]) -> np.ndarray:
    """Adam with bfloat16 first moments, and second moments shared along `axes`."""
    first, second = np.zeros_like(value), np.zeros_like(value)
    for step, gradient in enumerate(gradients, start=1):
        mean = 0.9 * first + 0.1 * gradient
        second = 0.999 * second + 0.001 * np.mean(gradient**2, axis=axes, keepdims=True)
        first = mean.astype(ml_dtypes.bfloat16).astype("float64")
        update = mean / (1 - 0.9**step) / (np.sqrt(second / (1 - 0.999**step)) + 1e-8)
        value = value * (1 - RATE * DECAY) - RATE * update
    return value


@pytest.mark.parametrize(
    ("layer", "shape", "axes"),
    [
        (keras.layers.Dense(3, use_bias=False), (2, 5), (0,)),
        (keras.layers.Conv2D(3, 2, use_bias=False), (1, 4, 4, 5), (0, 1, 2)),
        (keras.layers.Embedding(4, 3), (2, 2), (1,)),
        (keras.layers.LayerNormalization(center=False), (2, 5), ()),
    ],
    ids=["dense", "convolution", "embedding", "norm"],
)
def test_adam_mini(layer: keras.layers.Layer, shape: tuple[int, ...], axes: tuple[int, ...]) -> None:
    layer.build(shape)
    (variable,) = layer.trainable_variables
    config = Config(optimizer="adam_mini", learning_rate=RATE, weight_decay=DECAY, clip_norm=0)
    optimizer = make_optimizer(config, [])
    rng = np.random.default_rng(0)
    before = rng.standard_normal(variable.shape)
    gradients = [rng.standard_normal(variable.shape) for _ in range(4)]
    variable.assign(before)
    optimizer.build([variable])
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient, "float32")])
    expected = by_hand(before, gradients, axes)
    assert np.abs(expected - before).max() > 2 * RATE
    np.testing.assert_allclose(keras.ops.convert_to_numpy(variable), expected, atol=2e-5)


@pytest.mark.parametrize(("name", "stated"), [("adamw", 8), ("lion", 4), ("adafactor", 4), ("adam_mini", 2)])
def test_bytes_of_state_for_a_weight(name: str, stated: int) -> None:
    """As the help of --optimizer says."""
    layer = keras.layers.Dense(256, use_bias=False)
    layer.build((1, 256))
    optimizer = make_optimizer(Config(optimizer=name), [])
    optimizer.build(layer.trainable_variables)
    bytes_of = {"bfloat16": 2, "float32": 4, "int32": 4, "int64": 8}
    held = sum(
        np.prod(variable.shape) * bytes_of[keras.backend.standardize_dtype(variable.dtype)]
        for variable in optimizer.variables
    )
    assert held / 256**2 == pytest.approx(stated, rel=0.02)


@pytest.mark.parametrize("clip", [0.0, 2e-4])
def test_adamw_is_keras_own(clip: float) -> None:
    """Two groups of variables, one at half the rate, which stops after two steps; as AdamW of each rate."""
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((3, 4)).astype("float32") for _ in range(2)]
    gradients = [[rng.standard_normal((3, 4)).astype("float32") * 1e-4 for _ in range(2)] for _ in range(4)]
    ours, theirs = ([keras.Variable(value) for value in values] for _ in range(2))
    config = Config(
        learning_rate=RATE, weight_decay=DECAY, clip_norm=clip, text_encoder_learning_rate=RATE / 2,
        text_encoder_steps=2,
    )  # fmt: skip
    optimizer = make_optimizer(config, ours[1:])
    optimizer.build(ours)
    plain = [keras.optimizers.AdamW(rate, weight_decay=DECAY) for rate in (RATE, RATE / 2)]
    for step, pair in enumerate(gradients):
        optimizer.apply([keras.ops.convert_to_tensor(gradient) for gradient in pair])
        for one, variable, gradient in zip(plain, theirs, pair, strict=True):
            norm = np.sqrt(sum((g**2).sum() for g in pair))
            assert not clip or norm > clip
            clipped = gradient * (clip / norm if clip else 1)
            if one is plain[0] or step < 2:
                one.apply([keras.ops.convert_to_tensor(clipped, "float32")], [variable])
    for variable, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, (variable, expected)), atol=1e-6)


@pytest.mark.parametrize("together", [1, 1 << 28], ids=["one at a time", "all"])
def test_lion_is_keras_own(monkeypatch: pytest.MonkeyPatch, together: int) -> None:
    monkeypatch.setattr(torch_updates, "_CHUNK", together)
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape).astype("float32") for shape in ((3, 4), (5,), (2, 2, 3))]
    ours, theirs = ([keras.Variable(value) for value in values] for _ in range(2))
    config = Config(optimizer="lion", learning_rate=RATE, weight_decay=DECAY, clip_norm=0)
    optimizer, plain = make_optimizer(config, ()), keras.optimizers.Lion(RATE, weight_decay=DECAY)
    for _ in range(4):
        gradients = [rng.standard_normal(value.shape).astype("float32") for value in values]
        optimizer.apply([keras.ops.convert_to_tensor(gradient) for gradient in gradients], ours)
        plain.apply([keras.ops.convert_to_tensor(gradient) for gradient in gradients], theirs)
    for variable, expected, value in zip(ours, theirs, values, strict=True):
        found, wanted = map(keras.ops.convert_to_numpy, (variable, expected))
        np.testing.assert_allclose(found, wanted, atol=1e-6)
        assert np.abs(found - value).max() > RATE


@pytest.mark.skipif(
    keras.backend.backend() != "torch", reason="only on PyTorch are many weights scaled by one operation"
)
@pytest.mark.parametrize("name", ["adamw", "adam_mini", "lion"])
def test_float16_scaling_is_keras_own(name: str) -> None:
    """The scale doubles after three good steps, and is halved in a step that is skipped."""
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape).astype("float32") for shape in ((3, 4), (5,))]
    both = []
    for _ in range(2):
        variables = [keras.Variable(value) for value in values]
        config = Config(optimizer=name, learning_rate=RATE, weight_decay=DECAY, clip_norm=0.5)
        inner = make_optimizer(config, ())
        scaling = keras.optimizers.LossScaleOptimizer(inner, initial_scale=8.0, dynamic_growth_steps=3)
        scaling.build(variables)
        both.append((scaling, variables))
    scales = []
    for step in range(9):
        gradients = [8 * rng.standard_normal(value.shape).astype("float32") for value in values]
        if step in (1, 5):
            gradients[1][2] = np.inf if step == 1 else np.nan
        (ours, mine), (theirs, other) = both
        torch_updates.update(ours, [keras.ops.convert_to_tensor(g.copy()) for g in gradients], mine)
        theirs.apply([keras.ops.convert_to_tensor(g.copy()) for g in gradients], other)
        for variable, expected in zip(ours.variables, theirs.variables, strict=True):
            np.testing.assert_array_equal(*map(keras.ops.convert_to_numpy, (variable, expected)))
        for variable, expected in zip(mine, other, strict=True):
            np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, (variable, expected)), atol=1e-6)
        scales.append(float(ours.dynamic_scale))
    assert scales == [8, 4, 4, 4, 8, 4, 4, 4, 8]
    assert int(both[0][0].iterations) == 7


@pytest.mark.parametrize("name", ["adam_mini", "lion"])
def test_clipping(name: str) -> None:
    """Gradients above the limit and below it, of two variables; as gradients that were clipped before."""
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((3, 4)).astype("float32") for _ in range(2)]
    ours, theirs = ([keras.Variable(value) for value in values] for _ in range(2))
    clipping = make_optimizer(Config(optimizer=name, learning_rate=RATE, clip_norm=1.0), ())
    plain = make_optimizer(Config(optimizer=name, learning_rate=RATE, clip_norm=0), ())
    norms = []
    for size in (1.0, 0.1, 10.0, 0.05):
        pair = [size * rng.standard_normal((3, 4)).astype("float32") for _ in range(2)]
        norms.append(np.sqrt(sum((gradient**2).sum() for gradient in pair)))
        before = [gradient / max(1.0, norms[-1]) for gradient in pair]
        clipping.apply([keras.ops.convert_to_tensor(gradient) for gradient in pair], ours)
        plain.apply([keras.ops.convert_to_tensor(gradient, "float32") for gradient in before], theirs)
    assert min(norms) < 1 < max(norms)
    for variable, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(*map(keras.ops.convert_to_numpy, (variable, expected)), atol=1e-6)
