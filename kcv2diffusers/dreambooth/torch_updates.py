"""Weight updates on PyTorch: one multi-tensor operation where Keras has one operation per weight.

Decisions that depend on the step number are made on the host, so nothing waits for the device.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from typing import Any

import keras
import torch

from kcv2diffusers.dreambooth.prodigy import FIRST

Tensor = torch.Tensor
Pairs = list[tuple[Tensor, keras.Variable]]
"""Gradients with their variables."""


# Bytes of weights per update, for updates that make temporary copies.
_CHUNK = 1 << 28


@torch.no_grad()
def update(optimizer: Any, gradients: list[Tensor], variables: list[keras.Variable]) -> None:
    """Apply the gradients of the scaled loss with the optimizer of a compiled model.

    The gradients may be overwritten. With float16 the host waits for the device once, to check that all
    gradients are finite; PyTorch's GradScaler also does.
    """
    if isinstance(optimizer, keras.optimizers.LossScaleOptimizer):
        _apply_scaled(optimizer, gradients, variables)
    else:
        optimizer.apply(gradients, variables)


def _apply_scaled(scaling: Any, gradients: list[Tensor], variables: list[keras.Variable]) -> None:
    """Keras' `LossScaleOptimizer.apply`.

    The scale doubles after a number of good steps. A step with non-finite gradients halves the scale and
    changes nothing else.
    """
    if not scaling.built:
        scaling.build(variables)
    counter, scale = scaling.step_counter.value, scaling.dynamic_scale.value
    good = getattr(scaling, "good_steps", None)
    if good is None:  # known on the host after the first step
        good = int(counter)
    finite = bool(torch.stack(torch._foreach_norm(gradients)).sum().isfinite())
    if finite:
        torch._foreach_div_(gradients, scale)
        scaling.inner_optimizer.apply(gradients, variables)
    grows = finite and good == scaling.dynamic_growth_steps - 1
    good = good + 1 if finite and not grows else 0
    counter.fill_(good)
    if grows or not finite:
        scale.mul_(2.0 if grows else 0.5)
    scaling.good_steps = good


@torch.no_grad()
def apply(optimizer: Any, gradients: list[Tensor], variables: list[keras.Variable]) -> None:
    """Keras' `Optimizer.apply` for the optimizers of `make_optimizer`; the gradients may be overwritten."""
    step, every = optimizer.count(), optimizer.gradient_accumulation_steps or 1
    places = [optimizer._get_variable_index(variable) for variable in variables]
    if every > 1:
        sums = [optimizer._accumulated_gradients[place].value for place in places]
        torch._foreach_add_(sums, gradients)
        gradients = sums
    if (step + 1) % every == 0:
        if every > 1:
            torch._foreach_div_(gradients, every)
        optimizer.divisor = None
        if optimizer.global_clipnorm:
            optimizer.divisor = excess(gradients, optimizer.global_clipnorm)
            if optimizer.kernel is not fused_adamw:
                torch._foreach_div_(gradients, optimizer.divisor)
        optimizer._backend_update_step(gradients, variables, optimizer.learning_rate)
        if every > 1:
            torch._foreach_zero_(gradients)
    if optimizer.use_ema:
        averages = [optimizer._model_variables_moving_average[place].value for place in places]
        momentum = optimizer.ema_momentum if step // every else 0.0
        torch._foreach_lerp_(averages, [variable.value for variable in variables], 1 - momentum)
    optimizer._iterations.value.add_(1)
    optimizer.counted += 1


def excess(gradients: list[Tensor], limit: float) -> Tensor:
    """The divisor that limits the global norm of the gradients to `limit`: a scalar on the device.

    It is NaN if a gradient is not finite.
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    divisor: Tensor = torch.clamp(norm / limit, min=1.0) + (norm - norm)
    return divisor


def fused_adamw(optimizer: Any, pairs: Pairs, rate: float, weight_decay: float) -> None:
    """Keras' Adam in one pass of PyTorch's fused kernel; Keras' own makes a dozen passes, and copies."""
    from torch.optim.adamw import adamw

    places = [optimizer._get_variable_index(variable) for _, variable in pairs]
    done = optimizer.count() // (optimizer.gradient_accumulation_steps or 1)
    adamw(
        [variable.value for _, variable in pairs],
        [gradient for gradient, _ in pairs],
        [optimizer._momentums[place].value for place in places],
        [optimizer._velocities[place].value for place in places],
        [],
        list(torch.full((len(pairs),), float(done), device=pairs[0][0].device).unbind()),
        fused=True,
        grad_scale=optimizer.divisor,
        amsgrad=False,
        maximize=False,
        beta1=optimizer.beta_1,
        beta2=optimizer.beta_2,
        lr=rate,
        weight_decay=weight_decay,
        # Keras adds epsilon before the bias correction of the second moment, PyTorch after it.
        eps=optimizer.epsilon / math.sqrt(1 - optimizer.beta_2 ** (done + 1)),
    )


def adam_mini(optimizer: Any, pairs: Pairs, rate: float, weight_decay: float) -> None:
    """`AdamMini.update_step` on many weights at a time."""
    done = optimizer.count() // (optimizer.gradient_accumulation_steps or 1) + 1
    for chunk in _chunks(pairs):
        places = [optimizer._get_variable_index(variable) for _, variable in chunk]
        gradients = [gradient.float() for gradient, _ in chunk]
        first = [optimizer.first[place].value for place in places]
        second = [optimizer.second[place].value for place in places]
        shared = [optimizer.shared[place] for place in places]
        means = [torch.empty_like(gradient) for gradient in gradients]
        torch._foreach_copy_(means, first)
        torch._foreach_lerp_(means, gradients, 1 - optimizer.beta_1)
        torch._foreach_copy_(first, means)
        # Mean squares along the shared axes, each by one operation that makes no copy of the weight.
        norms = [
            torch.linalg.vector_norm(gradient, dim=axes, keepdim=True) if axes else gradient
            for gradient, axes in zip(gradients, shared, strict=True)
        ]
        squares = torch._foreach_mul(norms, norms)
        counts = [g.numel() // norm.numel() for g, norm in zip(gradients, norms, strict=True)]
        torch._foreach_div_(squares, [float(count) for count in counts])
        torch._foreach_lerp_(second, squares, 1 - optimizer.beta_2)
        torch._foreach_copy_(squares, second)
        torch._foreach_div_(squares, 1 - optimizer.beta_2**done)
        torch._foreach_sqrt_(squares)
        torch._foreach_add_(squares, optimizer.epsilon)
        torch._foreach_div_(means, squares)
        _move(chunk, means, rate / (1 - optimizer.beta_1**done), rate * weight_decay)


def lion(optimizer: Any, pairs: Pairs, rate: float, weight_decay: float) -> None:
    """Keras' Lion on many weights at a time."""
    for chunk in _chunks(pairs):
        gradients = [gradient for gradient, _ in chunk]
        momentums = [optimizer._momentums[optimizer._get_variable_index(v)].value for _, v in chunk]
        steps = torch._foreach_lerp(momentums, gradients, 1 - optimizer.beta_1)
        torch._foreach_sign_(steps)
        torch._foreach_lerp_(momentums, gradients, 1 - optimizer.beta_2)
        _move(chunk, list(steps), rate, rate * weight_decay)


def prodigy(optimizer: Any, pairs: Pairs, rate: float, weight_decay: float) -> None:
    """`prodigy.update` on many weights at a time; nothing waits for the estimate of the rate."""
    done = optimizer.count() // (optimizer.gradient_accumulation_steps or 1)
    before, beta3 = optimizer.estimate.value.clone(), math.sqrt(optimizer.beta_2)
    taken = before * (rate * optimizer.correction(done))
    chunks = [_Chunk(optimizer, chunk) for chunk in _chunks(pairs)]
    towards, size = torch.zeros_like(before), torch.zeros_like(before)
    for each in chunks:
        moved = torch._foreach_sub(each.starts, each.weights)
        torch._foreach_mul_(moved, each.gradients)
        towards += torch.stack([product.sum() for product in moved]).sum()
        scaled = torch._foreach_mul(each.gradients, before)
        torch._foreach_mul_(each.first, optimizer.beta_1)
        torch._foreach_add_(each.first, scaled, alpha=1 - optimizer.beta_1)
        torch._foreach_mul_(each.second, optimizer.beta_2)
        torch._foreach_addcmul_(each.second, scaled, scaled, value=1 - optimizer.beta_2)
        torch._foreach_mul_(scaled, before / FIRST)
        torch._foreach_mul_(each.sums, beta3)
        torch._foreach_add_(each.sums, scaled)
        size += torch.stack(torch._foreach_norm(each.sums, 1)).sum()
    numerator, estimate = optimizer.numerator.value, optimizer.estimate.value
    numerator.mul_(beta3).add_(before / FIRST * taken * towards)
    estimate.copy_(torch.maximum(before, numerator / size.clamp(min=1e-30)))
    for each in chunks:
        scale = torch._foreach_sqrt(each.second)
        torch._foreach_add_(scale, estimate * optimizer.epsilon)
        steps = torch._foreach_div(each.first, scale)
        torch._foreach_mul_(steps, -taken)
        torch._foreach_mul_(each.weights, 1 - taken * weight_decay)
        torch._foreach_add_(each.weights, steps)


class _Chunk:
    """Gradients, weights and Prodigy's state of some variables."""

    def __init__(self, optimizer: Any, pairs: Pairs) -> None:
        places = [optimizer._get_variable_index(variable) for _, variable in pairs]
        self.gradients = [gradient for gradient, _ in pairs]
        self.weights = [variable.value for _, variable in pairs]
        states = (optimizer.first, optimizer.second, optimizer.sums, optimizer.starts)
        self.first, self.second, self.sums, self.starts = (
            [state[place].value for place in places] for state in states
        )


def decay(pairs: Pairs, factor: float) -> None:
    """Weight decay: multiply the weights by 1 - `factor`."""
    torch._foreach_mul_([variable.value for _, variable in pairs], 1 - factor)


def _move(pairs: Pairs, steps: list[Tensor], rate: float, factor: float) -> None:
    decay(pairs, factor)
    torch._foreach_add_([variable.value for _, variable in pairs], steps, alpha=-rate)


def _chunks(pairs: Pairs) -> Iterator[Pairs]:
    """Chunks of `pairs` of about `_CHUNK` bytes."""
    chunk: Pairs = []
    size = 0
    for pair in pairs:
        chunk.append(pair)
        size += pair[0].numel() * pair[0].element_size()
        if size >= _CHUNK:
            yield chunk
            chunk, size = [], 0
    if chunk:
        yield chunk
