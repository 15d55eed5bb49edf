"""The network that DreamBooth trains, and its loss; `fit` runs the training loop."""

from __future__ import annotations

import ctypes
import math
from typing import Any

import keras
from keras import ops

from kcv2diffusers.diffusion import SD, Array, Schedule, min_snr_weights
from kcv2diffusers.dreambooth.ranks import ALONE, Group
from kcv2diffusers.models.layers import Tensor


def _free_after_compiling() -> None:
    """On JAX, return the memory of XLA's compiler to the system after each compilation.

    This is a gigabyte for a full-size UNet, freed before the program runs.
    """
    from jax import monitoring

    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)  # only glibc has it
    if trim is None:
        return

    def heard(event: str, duration_secs: float, **_: object) -> None:
        if event.endswith("backend_compile_duration"):
            trim(0)

    monitoring.register_event_duration_secs_listener(heard)


if keras.backend.backend() == "jax":
    _free_after_compiling()


class DreamBooth(keras.Model):  # type: ignore[misc]
    """A UNet trained to denoise latents of the subject and, with prior preservation, of its class.

    See Ruiz et al. 2023. `fit` takes the dictionaries of `Batches`. If `text_encoder` is given it is trained
    too, and `condition` holds tokens; otherwise it holds the text encoder's output. `prediction_type` is
    "epsilon" or "v_prediction". `snr_gamma` weights timesteps by min-SNR (Hang et al. 2023,
    arXiv:2303.09556); 0 weights all equally. The weight of a timestep applies to its own image, of the
    subject or of the class. `schedule` is the noise schedule that the UNet was trained with. `record_steps`
    is for PyTorch on a GPU: the step of each batch shape is recorded once as a CUDA graph and then replayed.
    On PyTorch `group` has the processes that each train on a share of a step, and `photos` is the number of
    the subject's images in a whole step; the sum of their losses is the loss of the step.
    """

    def __init__(
        self,
        unet: keras.Model,
        text_encoder: keras.Model | None = None,
        *,
        prediction_type: str = "epsilon",
        prior_weight: float = 1.0,
        snr_gamma: float = 0.0,
        schedule: Schedule = SD,
        record_steps: bool = True,
        group: Group = ALONE,
        photos: int = 0,
    ) -> None:
        super().__init__(name="dreambooth", autocast=False)
        self.unet, self.text_encoder = unet, text_encoder
        self.prediction_type, self.prior_weight = prediction_type, prior_weight
        signal = schedule.alphas_cumprod
        self.signal = self._table("signal", signal)
        self.weight = self._table("weight", min_snr_weights(signal, snr_gamma, prediction_type))
        self.step_loss = Last(name="step_loss")
        self.record_steps = record_steps
        self.group, self.photos = group, photos
        self._torch_step: Any = None
        self.built = True

    def call(self, inputs: dict[str, Tensor], training: bool = False) -> Tensor:
        """The UNet's output for the noised latents, (n, height / 8, width / 8, 4) float32."""
        signal = self._signal(inputs["timesteps"])
        noisy = ops.sqrt(signal) * inputs["latents"] + ops.sqrt(1 - signal) * inputs["noise"]
        context = inputs["condition"]
        if self.text_encoder is not None:
            positions = ops.broadcast_to(ops.arange(context.shape[1], dtype="int32"), ops.shape(context))
            context = self.text_encoder({"tokens": context, "positions": positions}, training=training)
        embedding = embed(inputs["timesteps"], self.unet.input_shape[1][-1])
        given = {"latent": noisy, "timestep_embedding": embedding, "context": context}
        return ops.cast(self.unet(given, training=training), "float32")

    def train_step(self, *given: Any) -> Any:
        """Keras' own step; on PyTorch, `TorchStep`."""
        if keras.backend.backend() != "torch":
            return super().train_step(*given)
        if self._torch_step is None:
            from kcv2diffusers.dreambooth.torch_step import TorchStep

            self._torch_step = TorchStep(self)
        batch, _, _ = keras.utils.unpack_x_y_sample_weight(*given)
        return {"step_loss": self._torch_step(batch)}

    def compute_loss(
        self,
        x: dict[str, Tensor] | None = None,
        y: Tensor = None,
        y_pred: Tensor = None,
        sample_weight: Tensor = None,
        training: bool = True,
    ) -> Tensor:
        """The mean weighted squared error of the subject's images, plus the prior-preservation loss.

        The latter is `prior_weight` times the same mean over the class images.
        """
        assert x is not None
        loss = self.loss_of(x, y_pred)
        self.step_loss.update_state(loss)
        return loss

    def loss_of(self, x: dict[str, Tensor], y_pred: Tensor) -> Tensor:
        """`compute_loss` without updating the metric."""
        weight = 1 - x["prior"] + self.prior_weight * x["prior"]
        return ops.sum(weight * self.errors(x, y_pred)) / (self.photos or ops.sum(1 - x["prior"]))

    def errors(self, x: dict[str, Tensor], y_pred: Tensor) -> Tensor:
        """The mean squared error of each image, weighted by its mask and its timestep: (n,)."""
        signal = self._signal(x["timesteps"])
        target = x["noise"]
        if self.prediction_type == "v_prediction":  # Salimans and Ho 2022, arXiv:2202.00512
            target = ops.sqrt(signal) * target - ops.sqrt(1 - signal) * x["latents"]
        square = ops.square(y_pred - target)
        if "mask" in x:  # of mean 1, which makes this a weighted mean
            square = square * x["mask"]
        error = ops.mean(square, axis=(1, 2, 3))
        return ops.take(self.weight, x["timesteps"]) * error

    def _table(self, name: str, values: Array) -> keras.Variable:
        """A float32 variable with one value per timestep, on the device from the start."""
        return self.add_weight(
            shape=values.shape,
            initializer=lambda *_, **__: ops.convert_to_tensor(values),
            dtype="float32",
            trainable=False,
            name=name,
        )

    def _signal(self, timesteps: Tensor) -> Tensor:
        return ops.reshape(ops.take(self.signal, timesteps), (-1, 1, 1, 1))


class Last(keras.metrics.Metric):  # type: ignore[misc]
    """A metric that is the last value; Keras' own metrics average over an epoch."""

    def __init__(self, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.value = self.add_weight(name="value", shape=(), initializer="zeros")

    def update_state(self, value: Tensor) -> None:
        self.value.assign(value)

    def result(self) -> Tensor:
        return ops.convert_to_tensor(self.value)


def embed(timesteps: Tensor, width: int) -> Tensor:
    """Sinusoidal embedding of (n,) timesteps, cosines first: (n, width) float32.

    It is `timestep_embedding` computed on the device.
    """
    half = width // 2
    frequencies = ops.exp(-math.log(10000) * ops.arange(half, dtype="float32") / half)
    angles = ops.cast(timesteps, "float32")[:, None] * frequencies
    return ops.concatenate([ops.cos(angles), ops.sin(angles)], axis=1)
