"""Updates of weights on PyTorch: one operation over all of them where Keras has one for each.

What depends on the number of a step is decided on the host, so that nothing waits for the device.
"""

from __future__ import annotations

import math
from typing import Any

import keras
import torch

Tensor = torch.Tensor
Pairs = list[tuple[Tensor, keras.Variable]]
"""Gradients and what they are of."""


@torch.no_grad()
def apply(optimizer: Any, gradients: list[Tensor], variables: list[keras.Variable]) -> None:
    """Keras' `Optimizer.apply` for what `make_optimizer` makes; the gradients may be overwritten."""
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
            if not optimizer.fused:
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
    """What gradients are to be divided by so that their global norm is at most `limit`: a scalar on the
    device, not a number if one gradient is none.
    """
    norm = torch.linalg.vector_norm(torch.stack(torch._foreach_norm(gradients)))
    divisor: Tensor = torch.clamp(norm / limit, min=1.0) + (norm - norm)
    return divisor


def fused_adamw(optimizer: Any, pairs: Pairs, rate: float, weight_decay: float) -> None:
    """Keras' Adam in one pass of PyTorch's kernel over all weights; Keras' own makes a dozen, and copies."""
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
        # Keras adds epsilon before the second moment's bias is corrected, PyTorch after.
        eps=optimizer.epsilon / math.sqrt(1 - optimizer.beta_2 ** (done + 1)),
    )
