"""The layers as a GPU computes them are those of a CPU, forward and backward; here by a CPU's kernels."""

from __future__ import annotations

from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
import torch
from support.models.backend_run import UNET

from kcv2diffusers.dreambooth.model import DreamBooth
from kcv2diffusers.dreambooth.torch_step import TorchStep
from kcv2diffusers.models import build_unet, layers, torch_layers
from kcv2diffusers.models.layers import PaddedConv2D, dtype_policy, group_norm


def results(layer: keras.layers.Layer, x: np.ndarray) -> list[np.ndarray]:
    """The output, and the gradients of the input and of the weights."""
    given = torch.from_numpy(x).requires_grad_()
    output = layer(given)
    weight = torch.from_numpy(np.random.default_rng(1).standard_normal(output.shape).astype("float32"))
    values = [variable.value for variable in layer.trainable_variables]
    gradients = torch.autograd.grad((output.float() * weight).sum(), [given, *values])
    return [tensor.detach().float().numpy() for tensor in (output, *gradients)]


@pytest.fixture
def on_gpu(monkeypatch: pytest.MonkeyPatch) -> Any:
    """A function after which layers compute as on a GPU."""

    def start() -> None:
        monkeypatch.setattr(layers, "_on_torch_gpu", lambda _: True)
        monkeypatch.setattr(torch_layers, "_on_cpu", torch_layers._on_gpu)

    return start


CONVOLUTIONS = {
    "convolution": lambda: PaddedConv2D(6, 3),
    "of one pixel": lambda: PaddedConv2D(6, 1),
    "halving": lambda: PaddedConv2D(6, 3, strides=2),
    "halving, padded at the end": lambda: PaddedConv2D(6, 3, strides=2, pad_end=True),
}


@pytest.mark.parametrize("policy", ["float32", "mixed_bfloat16"])
@pytest.mark.parametrize("make", [*CONVOLUTIONS.values(), lambda: group_norm(2)], ids=[*CONVOLUTIONS, "norm"])
def test_as_on_a_cpu(make: Any, policy: str, on_gpu: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 8, 6, 4)).astype("float32")
    with dtype_policy(policy):
        layer = make()
        layer.build(x.shape)
    for variable in layer.weights:
        variable.assign(rng.standard_normal(variable.shape))
    before = results(layer, x)
    on_gpu()
    after = results(layer, x)
    assert len(before) == len(after) == 2 + len(layer.weights)
    tolerance = 1e-5 if policy == "float32" else 0.02
    for one, other in zip(before, after, strict=True):
        np.testing.assert_allclose(other, one, atol=tolerance * np.abs(one).max())


@pytest.mark.parametrize("size", [6, 16])  # a matrix product on a CPU, and a convolution
@pytest.mark.parametrize("make", CONVOLUTIONS.values(), ids=CONVOLUTIONS)
def test_a_low_rank_update_is_the_merged_kernel(make: Any, size: int, on_gpu: Any) -> None:
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, size, size, 4)).astype("float32")
    layer, plain = make(), make()
    for each in (layer, plain):
        each(x)
    plain.set_weights([rng.standard_normal(variable.shape) for variable in plain.weights])
    layer.set_weights(plain.get_weights())
    layer.conv2d.enable_lora(2, lora_alpha=6)
    first, second = layer.conv2d.lora_kernel_a, layer.conv2d.lora_kernel_b
    first.assign(rng.standard_normal(first.shape))
    second.assign(rng.standard_normal(second.shape))
    kernel, bias = plain.get_weights()
    plain.set_weights([kernel + 3 * first.numpy() @ second.numpy(), bias])
    expected = results(plain, x)
    assert sorted(v.name for v in layer.trainable_variables) == ["bias", "lora_kernel_a", "lora_kernel_b"]
    _, _, of_kernel, _ = expected
    of_first = 3 * of_kernel @ second.numpy().T
    of_second = 3 * np.einsum("hwir,hwio->ro", first.numpy(), of_kernel)
    for start in (lambda: None, on_gpu):
        start()
        found = dict(
            zip(
                ["output", "input", *(v.name for v in layer.trainable_variables)],
                results(layer, x),
                strict=True,
            )
        )
        for name, wanted in (
            ("output", expected[0]),
            ("input", expected[1]),
            ("lora_kernel_a", of_first),
            ("lora_kernel_b", of_second),
            ("bias", expected[3]),
        ):
            np.testing.assert_allclose(found[name], wanted, atol=1e-5 * np.abs(wanted).max())


@pytest.mark.slow
def test_a_training_step_is_that_of_a_cpu(on_gpu: Any) -> None:
    """Loss and gradients of a small UNet."""
    model = DreamBooth(build_unet(UNET))
    model.optimizer = SimpleNamespace(scale_loss=lambda loss: loss)
    rng = np.random.default_rng(0)
    batch = {
        "latents": rng.standard_normal((2, 8, 16, 4), dtype="float32"),
        "noise": rng.standard_normal((2, 8, 16, 4), dtype="float32"),
        "timesteps": np.array([3, 700], "int32"),
        "condition": rng.standard_normal((2, 9, 24), dtype="float32"),
        "prior": np.array([0, 1], "float32"),
    }
    found = []
    for start in (lambda: None, on_gpu):
        start()
        given = {name: torch.from_numpy(value) for name, value in batch.items()}
        loss, gradients = TorchStep(model)._compute(given)
        found.append([tensor.numpy() for tensor in (loss, *gradients)])
    for one, other in zip(*found, strict=True):
        np.testing.assert_allclose(other, one, atol=1e-4 * np.abs(one).max())


def test_a_kernel_that_was_turned_round_is_not_copied() -> None:
    kernel = torch.randn(3, 3, 4, 6)
    turned = torch_layers.turn_round(kernel)
    assert torch.equal(kernel, turned)
    x = torch.randn(1, 5, 5, 4)
    seen: list[int] = []

    def convolve(x: torch.Tensor, weight: torch.Tensor, *rest: Any) -> torch.Tensor:
        seen.append(weight.data_ptr())
        assert weight.is_contiguous(memory_format=torch.channels_last)
        assert x.is_contiguous(memory_format=torch.channels_last)
        return torch.conv2d(x, weight, *rest)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(torch.nn.functional, "conv2d", convolve)
        one, other = (torch_layers.convolve(x, each, None, 1, 1) for each in (kernel, turned))
    assert torch.equal(one, other)
    assert seen[0] != kernel.data_ptr() and seen[1] == turned.data_ptr()
