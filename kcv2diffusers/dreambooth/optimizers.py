"""Keras' optimizers with a learning-rate schedule and a separate learning rate for the text encoder."""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Any

import keras
import numpy as np
from keras import ops

from kcv2diffusers.dreambooth import adamw8bit, prodigy
from kcv2diffusers.dreambooth.adamw8bit import AdamW8bit
from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.dreambooth.prodigy import Prodigy
from kcv2diffusers.models.layers import Tensor

_TOGETHER = 8  # variables per update: on PyTorch, Keras makes several copies of all that it updates


class AdamMini(keras.optimizers.Optimizer):  # type: ignore[misc]
    """Adam with 2 instead of 8 bytes of state per weight (Adam-mini, Zhang et al. 2024, arXiv:2406.16793).

    The weights of an output channel or of an embedded token share one second moment. First moments are
    bfloat16.
    """

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
        self.first, self.second, self.shared = [], [], []
        for variable in variables:
            # Only prompts with a token give gradients to its embedding, so tokens must not share a second
            # moment.
            own = 0 if variable.name == "embeddings" else len(variable.shape) - 1
            shape = [n if axis == own else 1 for axis, n in enumerate(variable.shape)]
            self.shared.append([axis for axis in range(len(shape)) if axis != own])
            self.first.append(self.add_variable(variable.shape, dtype="bfloat16", name="first"))
            self.second.append(self.add_variable(shape, dtype="float32", name="second"))

    def update_step(self, gradient: Tensor, variable: keras.Variable, learning_rate: Tensor) -> None:
        place = self._get_variable_index(variable)
        first, second, shared = self.first[place], self.second[place], self.shared[place]
        gradient = ops.cast(gradient, "float32")
        mean = self.beta_1 * ops.cast(first, "float32") + (1 - self.beta_1) * gradient
        square = ops.square(gradient)
        square = ops.mean(square, axis=shared, keepdims=True) if shared else square
        square = self.beta_2 * second + (1 - self.beta_2) * square
        first.assign(ops.cast(mean, "bfloat16"))
        second.assign(square)
        step = ops.cast(self.iterations + 1, "float32")
        mean = mean / (1 - ops.power(self.beta_1, step))
        square = square / (1 - ops.power(self.beta_2, step))
        update = ops.cast(learning_rate, "float32") * mean / (ops.sqrt(square) + self.epsilon)
        variable.assign_sub(ops.cast(update, variable.dtype))


_MOMENTS = {"beta1": "beta_1", "beta2": "beta_2", "epsilon": "epsilon"}  # names of Config and of Keras
_CLASSES = {
    "adamw": keras.optimizers.Adam,
    "adamw8bit": AdamW8bit,
    "adam_mini": AdamMini,
    "adafactor": keras.optimizers.Adafactor,
    "lion": keras.optimizers.Lion,
    "prodigy": Prodigy,
}


class Course(keras.optimizers.schedules.LearningRateSchedule):  # type: ignore[misc]
    """Learning-rate schedule: linear warm-up to `peak` over `warmup` steps, then one of several kinds.

    The rate stays constant, or decays to 0 at `steps`: linearly, as a `power` of what is left, along a half
    cosine, or along `cycles` of them, each of which begins at `peak` (Loshchilov and Hutter 2017,
    arXiv:1608.03983). Steps are training steps, also with gradient accumulation.
    """

    def __init__(
        self, kind: str, peak: float, warmup: int, steps: int, *, cycles: int = 1, power: float = 1.0
    ) -> None:
        self.kind, self.peak, self.warmup, self.steps = kind, peak, warmup, steps
        self.cycles, self.power = cycles, power

    def __call__(self, step: Tensor) -> Tensor:
        return self.at(ops.cast(step, "float32"), ops)

    def at(self, step: Any, numeric: Any = np) -> Any:
        """The learning rate of a step, computed by NumPy or by `keras.ops`."""
        rise = numeric.minimum(1.0, (step + 1) / (self.warmup + 1))
        left = 1 - numeric.clip((step - self.warmup) / max(1, self.steps - self.warmup), 0.0, 1.0)
        fall = {
            "constant": lambda: numeric.ones_like(left),
            "linear": lambda: left,
            "cosine": lambda: (1 - numeric.cos(math.pi * left)) / 2,
            # The small number keeps rounding from ending a cycle a step late.
            "cosine_with_restarts": lambda: (
                (1 + numeric.cos(math.pi * numeric.mod(self.cycles * (1 - left) + 1e-6, 1.0))) / 2
            ),
            "polynomial": lambda: numeric.power(left, self.power),
        }[self.kind]()
        return self.peak * rise * fall

    def get_config(self) -> dict[str, Any]:
        return dict(vars(self))


def make_optimizer(config: Config, slower: Iterable[keras.Variable]) -> keras.optimizers.Optimizer:
    """The optimizer that `config` asks for.

    The variables in `slower` have the text encoder's learning rate and are frozen after its last step.
    """
    peak = config.learning_rate
    factor = (config.text_encoder_learning_rate or peak) / peak if peak else 1.0
    end = math.ceil((config.text_encoder_steps or config.steps) / config.accumulate)
    ids = {id(variable) for variable in slower}

    kind: Any = type(_CLASSES[config.optimizer]())  # on PyTorch, Keras returns an instance of a faster class
    on_torch = keras.backend.backend() == "torch"
    course = Course(
        config.lr_schedule,
        peak,
        config.warmup_steps,
        config.steps,
        cycles=config.lr_cycles,
        power=config.lr_power,
    )
    moments = {keras_name: getattr(config, name) for name, keras_name in _MOMENTS.items()}

    class TwoRates(kind):  # type: ignore[misc]
        """Updates the text encoder's variables at `factor` times the rate, and not after its last step.

        Weight decay is decoupled (Loshchilov and Hutter 2019) and follows each rate; Keras' own uses only one
        rate.
        """

        kernel = _kernel(config.optimizer)
        divisor: Tensor | None = None  # on PyTorch: divisor of the gradients in the fused kernel
        counted: int | None = None  # on PyTorch: training steps so far, counted on the host

        def count(self) -> int:
            """Training steps so far. Only the first call waits for the device."""
            if self.counted is None:
                self.counted = int(self._iterations)
            return self.counted

        def apply(self, grads: list[Tensor], trainable_variables: Any = None) -> None:
            if not on_torch:
                super().apply(grads, trainable_variables)
                return
            from kcv2diffusers.dreambooth import torch_updates

            variables = list(trainable_variables or self._trainable_variables)
            self.build(variables)
            torch_updates.apply(self, grads, variables)

        def _get_current_learning_rate(self) -> Any:
            return float(course.at(self.count())) if on_torch else course(self._iterations)

        def _backend_update_step(self, grads: list[Tensor], variables: list[Any], rate: Tensor) -> None:
            if on_torch:
                later = rate * factor if self.count() // config.accumulate < end else 0.0
            else:
                later = rate * factor * ops.cast(self.iterations < end, "float32")
            pairs = list(zip(grads, variables, strict=True))
            together = len(pairs) if self.kernel else _TOGETHER
            for slow, own_rate in ((False, rate), (True, later)):
                group = [pair for pair in pairs if (id(pair[1]) in ids) is slow]
                for first in range(0, len(group), together):
                    chunk = group[first : first + together]
                    if self.kernel:
                        self.kernel(self, chunk, own_rate, config.weight_decay)
                        continue
                    _decay(chunk, own_rate * config.weight_decay)
                    super()._backend_update_step([g for g, _ in chunk], [v for _, v in chunk], own_rate)

    optimizer: keras.optimizers.Optimizer = TwoRates(
        course,
        global_clipnorm=config.clip_norm or None,
        gradient_accumulation_steps=config.accumulate if config.accumulate > 1 else None,
        use_ema=config.ema > 0,
        ema_momentum=config.ema or 0.99,
        name=config.optimizer,
        **{name: value for name, value in moments.items() if value},
    )
    return optimizer


def _kernel(name: str) -> Any:
    """An update of all weights including weight decay, where the backend has a faster one than Keras'."""
    backend = keras.backend.backend()
    if backend == "torch":
        from kcv2diffusers.dreambooth import torch_updates

        kernels = {
            "adamw": torch_updates.fused_adamw,
            "adamw8bit": adamw8bit.update,
            "adam_mini": torch_updates.adam_mini,
            "lion": torch_updates.lion,
            "prodigy": torch_updates.prodigy,
        }
        return staticmethod(kernels[name]) if name in kernels else None
    if name == "prodigy":
        return staticmethod(prodigy.update)
    return staticmethod(_fused_on_tensorflow) if (backend, name) == ("tensorflow", "adamw") else None


def _decay(pairs: list[tuple[Tensor, keras.Variable]], factor: Any) -> None:
    """Weight decay: multiply the weights by 1 - `factor`."""
    if keras.backend.backend() == "torch":
        from kcv2diffusers.dreambooth import torch_updates

        return torch_updates.decay(pairs, factor)
    for _, variable in pairs:
        variable.assign(variable * ops.cast(1 - factor, variable.dtype))


def _fused_on_tensorflow(
    optimizer: Any, pairs: list[tuple[Tensor, keras.Variable]], rate: Tensor, weight_decay: float
) -> None:
    """Keras' Adam by TensorFlow's fused kernel, in place, one weight at a time.

    Keras' own operations run as soon as their inputs are ready, for many weights at once, and hold copies of
    them meanwhile.
    """
    import tensorflow as tf

    step = ops.cast(optimizer.iterations + 1, "float32")
    for gradient, variable in pairs:
        place = optimizer._get_variable_index(variable)
        if weight_decay:
            with tf.control_dependencies([gradient]):  # not earlier, or all weights would be in memory twice
                variable.assign(variable * (1 - rate * weight_decay))
        tf.raw_ops.ResourceApplyAdam(
            var=variable.value.handle,
            m=optimizer._momentums[place].value.handle,
            v=optimizer._velocities[place].value.handle,
            beta1_power=ops.power(optimizer.beta_1, step),
            beta2_power=ops.power(optimizer.beta_2, step),
            lr=rate,
            beta1=optimizer.beta_1,
            beta2=optimizer.beta_2,
            epsilon=optimizer.epsilon,
            grad=tf.convert_to_tensor(gradient),
        )
