"""AdamW with moments of 8 bits (Dettmers et al. 2022, arXiv:2110.02861), by bitsandbytes on PyTorch.

As in its `AdamW8bit`, 256 numbers share a scale, and the moments of small weights have 32 bits. All state is
in variables, so that checkpoints hold it.
"""

from __future__ import annotations

import functools
import importlib.util
import logging
import math
from typing import TYPE_CHECKING, Any

import keras

from kcv2diffusers.errors import Error, MissingExtra

if TYPE_CHECKING:
    from kcv2diffusers.dreambooth.torch_updates import Pairs

_BLOCK = 256
_LEAST = 4096  # numbers of a weight with moments of 8 bits


class AdamW8bit(keras.optimizers.Optimizer):  # type: ignore[misc]
    """AdamW with 2 instead of 8 bytes of state per weight. Epsilon is as in PyTorch's AdamW."""

    def __init__(
        self,
        learning_rate: Any = 1e-3,
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
        self.first: list[keras.Variable] = []
        self.second: list[keras.Variable] = []
        self.scales: list[keras.Variable | None] = []
        for variable in variables:
            count = math.prod(variable.shape)
            small = count < _LEAST
            for moments, name in ((self.first, "first"), (self.second, "second")):
                dtype = "float32" if small else "uint8"
                moments.append(self.add_variable(variable.shape, dtype=dtype, name=name))
            shape = (2, -(-count // _BLOCK))
            self.scales.append(None if small else self.add_variable(shape, dtype="float32", name="scales"))


def check_adamw8bit() -> None:
    """Raise Error if the backend is not PyTorch, or MissingExtra if bitsandbytes is not installed."""
    if keras.backend.backend() != "torch":
        raise Error(
            f"--optimizer adamw8bit needs PyTorch; this is {keras.backend.backend()}.\n"
            "Set KERAS_BACKEND=torch, or take adam_mini, whose state is as small."
        )
    if importlib.util.find_spec("bitsandbytes") is None:
        raise MissingExtra("bitsandbytes", "bitsandbytes")


@functools.cache
def _functional() -> Any:
    """The functions of bitsandbytes."""
    logging.getLogger("bitsandbytes").setLevel(logging.ERROR)  # it warns of kernels that nothing here uses
    from bitsandbytes import functional

    return functional


@functools.cache
def _tables(device: Any) -> tuple[Any, Any]:
    """The 256 values that a byte of the first and of the second moment stands for."""
    table = _functional().create_dynamic_map
    return table(signed=True).to(device), table(signed=False).to(device)


def update(optimizer: Any, pairs: Pairs, rate: float, weight_decay: float) -> None:
    """One update of some weights, each by a kernel of bitsandbytes."""
    functional = _functional()
    done = optimizer.count() // (optimizer.gradient_accumulation_steps or 1)
    for gradient, variable in pairs:
        place = optimizer._get_variable_index(variable)
        states = optimizer.first[place].value, optimizer.second[place].value
        scales = optimizer.scales[place]
        assert variable.value.is_contiguous(), "the kernels see memory, not strides"
        given = {
            "optimizer_name": "adam",
            "g": gradient.contiguous(),
            "p": variable.value,
            "state1": states[0],
            "state2": states[1],
            "beta1": optimizer.beta_1,
            "beta2": optimizer.beta_2,
            "beta3": 0.0,
            "alpha": 0.0,
            "eps": optimizer.epsilon,
            "step": done + 1,
            "lr": rate,
            "weight_decay": weight_decay,
        }
        if scales is None:
            functional.optimizer_update_32bit(**given)
        else:
            tables = _tables(gradient.device)
            functional.optimizer_update_8bit_blockwise(
                **given,
                qmap1=tables[0],
                qmap2=tables[1],
                absmax1=scales.value[0],
                absmax2=scales.value[1],
            )
