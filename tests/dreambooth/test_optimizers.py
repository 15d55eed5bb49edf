"""Adam-mini is its formula, and its state is small. On TensorFlow: tests/models/test_on_tensorflow.py."""

from __future__ import annotations

import keras
import ml_dtypes
import numpy as np
import pytest

from kcv2diffusers.dreambooth import adamw8bit, prodigy, torch_updates
from kcv2diffusers.dreambooth.config import MOMENTS, Config
from kcv2diffusers.dreambooth.optimizers import Course, make_optimizer
from kcv2diffusers.dreambooth.weight_bytes import STATES
from kcv2diffusers.errors import Error

RATE, DECAY = 0.01, 0.1


def by_hand(
    value: np.ndarray,
    gradients: list[np.ndarray],
    axes: tuple[int, ...],
    beta1: float = 0.9,
    beta2: float = 0.999,
    epsilon: float = 1e-8,
) -> np.ndarray:
    """Adam with bfloat16 first moments, and second moments shared along `axes`."""
    first, second = np.zeros_like(value), np.zeros_like(value)
    for step, gradient in enumerate(gradients, start=1):
        mean = beta1 * first + (1 - beta1) * gradient
        second = beta2 * second + (1 - beta2) * np.mean(gradient**2, axis=axes, keepdims=True)
        first = mean.astype(ml_dtypes.bfloat16).astype("float64")
        update = mean / (1 - beta1**step) / (np.sqrt(second / (1 - beta2**step)) + epsilon)
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
@pytest.mark.parametrize("moments", [{}, {"beta1": 0.8, "beta2": 0.95, "epsilon": 0.1}], ids=["own", "given"])
def test_adam_mini(
    layer: keras.layers.Layer, shape: tuple[int, ...], axes: tuple[int, ...], moments: dict[str, float]
) -> None:
    if not layer.built:
        layer.build(shape)
    (variable,) = layer.trainable_variables
    config = Config(optimizer="adam_mini", learning_rate=RATE, weight_decay=DECAY, clip_norm=0, **moments)
    optimizer = make_optimizer(config, [])
    rng = np.random.default_rng(0)
    before = rng.standard_normal(variable.shape)
    gradients = [rng.standard_normal(variable.shape) for _ in range(4)]
    variable.assign(before)
    optimizer.build([variable])
    for gradient in gradients:
        optimizer.apply([keras.ops.convert_to_tensor(gradient, "float32")])
    expected = by_hand(before, gradients, axes, **moments)
    assert np.abs(expected - before).max() > 2 * RATE
    np.testing.assert_allclose(keras.ops.convert_to_numpy(variable), expected, atol=2e-5)


@pytest.mark.parametrize("name", MOMENTS)
def test_bytes_of_state_for_a_weight(name: str) -> None:
    """As the advice on memory computes with."""
    layer = keras.layers.Dense(256, use_bias=False)
    layer.build((1, 256))
    optimizer = make_optimizer(Config(optimizer=name), [])
    optimizer.build(layer.trainable_variables)
    bytes_of = {"bfloat16": 2, "float32": 4, "int32": 4, "int64": 8, "uint8": 1}
    held = sum(
        np.prod(variable.shape) * bytes_of[keras.backend.standardize_dtype(variable.dtype)]
        for variable in optimizer.variables
    )
    assert held / 256**2 == pytest.approx(4 * STATES[name], rel=0.02)


@pytest.mark.parametrize("clip", [0.0, 2e-4])
@pytest.mark.parametrize("moments", [{}, {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-4}])
def test_adamw_is_keras_own(clip: float, moments: dict[str, float]) -> None:
    """Two groups of variables, one at half the rate, which stops after two steps; as AdamW of each rate."""
    rng = np.random.default_rng(0)
    values = [rng.standard_normal((3, 4)).astype("float32") for _ in range(2)]
    gradients = [[rng.standard_normal((3, 4)).astype("float32") * 1e-4 for _ in range(2)] for _ in range(4)]
    ours, theirs = ([keras.Variable(value) for value in values] for _ in range(2))
    config = Config(
        learning_rate=RATE, weight_decay=DECAY, clip_norm=clip, text_encoder_learning_rate=RATE / 2,
        text_encoder_steps=2, **moments,
    )  # fmt: skip
    named = {name.replace("beta", "beta_"): value for name, value in moments.items()}
    optimizer = make_optimizer(config, ours[1:])
    optimizer.build(ours)
    plain = [keras.optimizers.AdamW(rate, weight_decay=DECAY, **named) for rate in (RATE, RATE / 2)]
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
    config = Config(optimizer="lion", learning_rate=RATE, weight_decay=DECAY, clip_norm=0, beta1=0.8)
    optimizer = make_optimizer(config, ())
    plain = keras.optimizers.Lion(RATE, weight_decay=DECAY, beta_1=0.8)
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


@pytest.mark.parametrize(
    ("kind", "options"),
    [
        ("linear", {}),
        ("cosine", {}),
        ("polynomial", {"power": 2.5}),
        ("cosine_with_restarts", {"cycles": 3}),
    ],
)
def test_schedules_are_diffusers(kind: str, options: dict[str, float]) -> None:
    """Without warm-up, which there begins at 0; computed by NumPy and by the backend."""
    import torch
    from diffusers import optimization as theirs

    steps = 40
    made = torch.optim.SGD([torch.zeros(1)], lr=0.5)
    expected = {
        "linear": lambda: theirs.get_linear_schedule_with_warmup(made, 0, steps),
        "cosine": lambda: theirs.get_cosine_schedule_with_warmup(made, 0, steps),
        "polynomial": lambda: theirs.get_polynomial_decay_schedule_with_warmup(
            made, 0, steps, lr_end=0, **options
        ),
        "cosine_with_restarts": lambda: theirs.get_cosine_with_hard_restarts_schedule_with_warmup(
            made, 0, steps, num_cycles=options["cycles"]
        ),
    }[kind]().lr_lambdas[0]
    course = Course(kind, 0.5, 0, steps, **options)
    for step in range(steps):
        assert course.at(step) == pytest.approx(0.5 * expected(step), abs=1e-6)
        assert float(course(step)) == pytest.approx(course.at(step), abs=1e-5)
    warm = Course(kind, 0.5, 4, steps, **options)
    assert [warm.at(step) for step in (0, 3)] == pytest.approx([0.1, 0.4])
    assert Course.from_config(course.get_config()).at(7) == course.at(7)


@pytest.mark.parametrize("together", [1, 1 << 28, 0], ids=["one at a time", "all", "every backend's"])
@pytest.mark.parametrize("moments", [{}, {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-3}])
def test_prodigy_is_its_authors(
    monkeypatch: pytest.MonkeyPatch, together: int, moments: dict[str, float]
) -> None:
    """On a quadratic function, with a schedule. The weights are small, because what they have moved since the
    start is their difference, which has few digits at first.
    """
    import torch
    from prodigyopt import Prodigy as Theirs

    if together:
        monkeypatch.setattr(torch_updates, "_CHUNK", together)
    else:
        monkeypatch.setattr(torch_updates, "prodigy", prodigy.update)
    rng = np.random.default_rng(0)
    values = [1e-3 * rng.standard_normal(shape).astype("float32") for shape in ((3, 4), (5,), (2, 2, 3))]
    ours = [keras.Variable(value) for value in values]
    theirs = [torch.nn.Parameter(torch.from_numpy(value.copy())) for value in values]
    config = Config(
        optimizer="prodigy", learning_rate=0.7, weight_decay=DECAY, clip_norm=0, lr_schedule="linear",
        steps=400, **moments,
    )  # fmt: skip
    optimizer = make_optimizer(config, ())
    optimizer.build(ours)
    plain = Theirs(
        theirs, betas=(moments.get("beta1", 0.9), moments.get("beta2", 0.999)),
        eps=moments.get("epsilon", 1e-8), weight_decay=DECAY, use_bias_correction=True, safeguard_warmup=True,
    )  # fmt: skip
    for step in range(200):
        plain.param_groups[0]["lr"] = 0.7 * (1 - step / 400)
        gradients = [2 * (keras.ops.convert_to_numpy(variable) - 0.1) for variable in ours]
        optimizer.apply([keras.ops.convert_to_tensor(gradient) for gradient in gradients], ours)
        for parameter in theirs:
            parameter.grad = 2 * (parameter.detach() - 0.1)
        plain.step()
        assert float(optimizer.estimate) == pytest.approx(plain.param_groups[0]["d"], rel=1e-3)
    assert float(optimizer.estimate) > 10 * prodigy.FIRST
    for variable, expected in zip(ours, theirs, strict=True):
        found, wanted = keras.ops.convert_to_numpy(variable), expected.detach().numpy()
        np.testing.assert_allclose(found, wanted, rtol=1e-3, atol=1e-4)


@pytest.mark.skipif(keras.backend.backend() != "torch", reason="bitsandbytes is for PyTorch")
@pytest.mark.parametrize("moments", [{}, {"beta1": 0.8, "beta2": 0.95, "epsilon": 1e-4}])
def test_adamw8bit_is_that_of_bitsandbytes(moments: dict[str, float]) -> None:
    """Bit by bit; of weights whose last block is not full, and of one with moments of 32 bits."""
    import torch

    optim = pytest.importorskip("bitsandbytes.optim")
    rng = np.random.default_rng(0)
    values = [rng.standard_normal(shape).astype("float32") for shape in ((70, 60), (3, 3, 20, 30), (50,))]
    ours = [keras.Variable(value) for value in values]
    theirs = [torch.nn.Parameter(torch.from_numpy(value.copy())) for value in values]
    config = Config(
        optimizer="adamw8bit", learning_rate=RATE, weight_decay=DECAY, clip_norm=0, lr_schedule="linear",
        steps=20, **moments,
    )  # fmt: skip
    optimizer = make_optimizer(config, ())
    optimizer.build(ours)
    plain = optim.AdamW8bit(
        theirs, betas=(moments.get("beta1", 0.9), moments.get("beta2", 0.999)),
        eps=moments.get("epsilon", 1e-8), weight_decay=DECAY,
    )  # fmt: skip
    for step in range(20):
        plain.param_groups[0]["lr"] = float(RATE * (1 - step / 20))
        for parameter in theirs:
            parameter.grad = torch.from_numpy(rng.standard_normal(parameter.shape, dtype="float32"))
        optimizer.apply([parameter.grad.clone() for parameter in theirs])
        plain.step()
    states = [plain.state[parameter] for parameter in theirs]
    for place, (variable, expected, value) in enumerate(zip(ours, theirs, values, strict=True)):
        found = keras.ops.convert_to_numpy(variable)
        np.testing.assert_array_equal(found, expected.detach().numpy())
        assert np.abs(found - value).max() > RATE
        np.testing.assert_array_equal(optimizer.second[place].value, states[place]["state2"])
    assert [str(variable.dtype) for variable in optimizer.first] == ["uint8", "uint8", "float32"]
    np.testing.assert_array_equal(optimizer.scales[1].value[0], states[1]["absmax1"])


def test_adamw8bit_where_it_cannot_be(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(keras.backend, "backend", lambda: "jax")
    with pytest.raises(Error, match="--optimizer adamw8bit needs PyTorch; this is jax"):
        adamw8bit.check_adamw8bit()
    monkeypatch.setattr(keras.backend, "backend", lambda: "torch")
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    with pytest.raises(Error, match=r"pip install 'kcv2diffusers\[bitsandbytes\]'"):
        adamw8bit.check_adamw8bit()
