"""Prodigy: Adam that finds its learning rate itself (Mishchenko and Defazio 2024, arXiv:2306.06101).

The estimate of the rate is of all weights together, so an update sees them all. The package prodigyopt
is its authors' own, for PyTorch only. It waits for the device twice for each weight, and its state is not in
the variables that checkpoints hold. As they recommend for diffusion models, the moments are corrected for
their start, and warm-up does not enter the estimate.
"""

from __future__ import annotations

import math
from typing import Any

import keras
from keras import ops

from kcv2diffusers.models.layers import Tensor

FIRST = 1e-6  # the estimate before the first step


class Prodigy(keras.optimizers.Optimizer):  # type: ignore[misc]
    """Prodigy with 16 bytes of state per weight. The learning rate is a factor, usually 1.

    `estimate` is the rate that it has found so far.
    """

    def __init__(
        self,
        learning_rate: Any = 1.0,
        beta_1: float = 0.9,
        beta_2: float = 0.999,
        epsilon: float = 1e-8,
        **kwargs: Any,
    ) -> None:
        super().__init__(learning_rate=learning_rate, **kwargs)
        self.beta_1, self.beta_2, self.epsilon = beta_1, beta_2, epsilon

    def build(self, variables: list[keras.Variable]) -> None:
        if self.built:
            return
        super().build(variables)
        self.first, self.second, self.sums, self.starts = (
            [self.add_variable_from_reference(variable, name=name) for variable in variables]
            for name in ("first", "second", "sums", "starts")
        )
        for start, variable in zip(self.starts, variables, strict=True):
            start.assign(variable)
        self.numerator = self.add_variable((), dtype="float32", name="numerator")
        self.estimate = self.add_variable((), dtype="float32", name="estimate")
        self.estimate.assign(FIRST)

    def correction(self, done: Any) -> Any:
        """The factor of the rate that corrects both moments for their start, after `done` updates."""
        return (1 - self.beta_2 ** (done + 1)) ** 0.5 / (1 - self.beta_1 ** (done + 1))


def update(
    optimizer: Any, pairs: list[tuple[Tensor, keras.Variable]], rate: Tensor, weight_decay: float
) -> None:
    """One update of all weights."""
    places = [optimizer._get_variable_index(variable) for _, variable in pairs]
    before, beta3 = ops.convert_to_tensor(optimizer.estimate), math.sqrt(optimizer.beta_2)
    rate = before * rate * optimizer.correction(ops.cast(optimizer.iterations, "float32"))
    towards, size = 0.0, 0.0
    for (gradient, variable), place in zip(pairs, places, strict=True):
        gradient = ops.cast(gradient, "float32")
        first, second, sums = optimizer.first[place], optimizer.second[place], optimizer.sums[place]
        towards = towards + ops.sum(gradient * (optimizer.starts[place] - variable))
        first.assign(optimizer.beta_1 * first + (1 - optimizer.beta_1) * before * gradient)
        second.assign(optimizer.beta_2 * second + (1 - optimizer.beta_2) * ops.square(before * gradient))
        sums.assign(beta3 * sums + before / FIRST * before * gradient)
        size = size + ops.sum(ops.abs(sums))
    optimizer.numerator.assign(beta3 * optimizer.numerator + before / FIRST * rate * towards)
    found = optimizer.numerator / ops.maximum(size, 1e-30)
    optimizer.estimate.assign(ops.maximum(before, found))
    for (_, variable), place in zip(pairs, places, strict=True):
        scale = ops.sqrt(optimizer.second[place]) + optimizer.estimate * optimizer.epsilon
        variable.assign(variable * (1 - rate * weight_decay) - rate * optimizer.first[place] / scale)
