"""Keras' optimizers with the course of the learning rate, and a rate of its own for the text encoder."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import keras
from keras import ops

from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.models.layers import Tensor

_TOGETHER = 8  # variables updated at a time: on PyTorch, Keras makes several copies of all that it updates
_CLASSES = {
    "adamw": keras.optimizers.Adam,
    "adafactor": keras.optimizers.Adafactor,
    "lion": keras.optimizers.Lion,
}


class Course(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """A learning rate that rises to `peak` over `warmup` steps and then stays, or falls to 0 at `steps`
    linearly or along half a cosine. Steps are training steps, also where several make one update.
    """

    def __init__(self, kind: str, peak: float, warmup: int, steps: int) -> None:
        self.kind, self.peak, self.warmup, self.steps = kind, peak, warmup, steps

    def __call__(self, step: Tensor) -> Tensor:
        step = ops.cast(step, "float32")
        rise = ops.minimum(1.0, (step + 1) / (self.warmup + 1))
        left = 1 - ops.clip((step - self.warmup) / max(1, self.steps - self.warmup), 0.0, 1.0)
        fall = {
            "constant": lambda: ops.ones_like(left),
            "linear": lambda: left,
            "cosine": lambda: (1 - ops.cos(math.pi * left)) / 2,
        }[self.kind]()
        return self.peak * rise * fall

    def get_config(self) -> dict[str, Any]:
        return {"kind": self.kind, "peak": self.peak, "warmup": self.warmup, "steps": self.steps}


def make_optimizer(config: Config, slower: Iterable[keras.Variable]) -> keras.optimizers.Optimizer:
    """The optimizer that `config` asks for; the variables `slower` have the text encoder's rate and end."""
    peak = config.learning_rate
    factor = (config.text_encoder_learning_rate or peak) / peak if peak else 1.0
    end = math.ceil((config.text_encoder_steps or config.steps) / config.accumulate)
    ids = {id(variable) for variable in slower}

    kind: Any = type(_CLASSES[config.optimizer]())  # on PyTorch, Keras makes one of a quicker class

    class TwoRates(kind):  # type: ignore[misc]
        """Updates the text encoder's variables at `factor` times the rate, and not after its last step.

        Weight decay is decoupled (Loshchilov and Hutter 2019) and follows each rate; Keras' knows only one.
        """

        def _backend_update_step(self, grads: list[Tensor], variables: list[Any], rate: Tensor) -> None:
            later = rate * factor * ops.cast(self.iterations < end, "float32")
            pairs = list(zip(grads, variables, strict=True))
            for first in range(0, len(pairs), _TOGETHER):
                chunk = pairs[first : first + _TOGETHER]
                for slow, own_rate in ((False, rate), (True, later)):
                    group = [pair for pair in chunk if (id(pair[1]) in ids) is slow]
                    for _, variable in group:
                        kept = ops.cast(1 - own_rate * config.weight_decay, variable.dtype)
                        variable.assign(variable * kept)
                    if group:
                        super()._backend_update_step([g for g, _ in group], [v for _, v in group], own_rate)

    optimizer: keras.optimizers.Optimizer = TwoRates(
        Course(config.lr_schedule, peak, config.warmup_steps, config.steps),
        global_clipnorm=config.clip_norm or None,
        gradient_accumulation_steps=config.accumulate if config.accumulate > 1 else None,
        use_ema=config.ema > 0,
        ema_momentum=config.ema or 0.99,
        name=config.optimizer,
    )
    return optimizer
