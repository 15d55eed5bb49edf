"""Precision and devices of a run: the dtype policy, TF32, and data parallelism on one host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import keras

from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.errors import Error


def best_precision() -> str:
    """The dtype policy for the device that Keras computes on.

    It is "mixed_bfloat16" on a GPU with bfloat16 or a TPU, "mixed_float16" on another GPU, and "float32" on a
    CPU.
    """
    backend = keras.backend.backend()
    if backend == "torch":
        import torch

        if not torch.cuda.is_available():
            return "float32"
        return _half(torch.cuda.get_device_capability())
    if backend == "jax":
        import jax

        device = jax.devices()[0]
        if device.platform == "tpu":
            return "mixed_bfloat16"
        return _half(getattr(device, "compute_capability", None))
    import tensorflow as tf

    devices = tf.config.list_physical_devices("GPU")
    return _half(devices and tf.config.experimental.get_device_details(devices[0])["compute_capability"])


def allow_tf32() -> None:
    """Let PyTorch use TF32 for float32 matrix products on a GPU, as JAX and TensorFlow do by default."""
    if keras.backend.backend() == "torch":
        import torch

        torch.backends.cuda.matmul.allow_tf32 = torch.backends.cudnn.allow_tf32 = True


@contextmanager
def attention_noted(notes: list[str]) -> Iterator[None]:
    """After this block, on JAX with a GPU or TPU, append to `notes` how attention was computed in it.

    The method depends on lengths, widths and precision. It is otherwise visible only in time and memory.
    """
    if keras.backend.backend() != "jax":
        yield
        return
    from kcv2diffusers.models import jax_layers

    jax_layers.forget()
    yield
    if words := jax_layers.chosen():
        notes.append(words)


def _half(capability: Any) -> str:
    """The dtype policy for a CUDA compute capability, such as "8.0" or (8, 0); a false value means a CPU."""
    if not capability:
        return "float32"
    major = int(capability.split(".")[0] if isinstance(capability, str) else capability[0])
    return "mixed_bfloat16" if major >= 8 else "mixed_float16"  # bfloat16 since Ampere


@contextmanager
def spread(config: Config) -> Iterator[None]:
    """Run the steps of this block data-parallel on `config.devices` devices.

    Variables created in the block are replicated on each device, and the images of a batch are split among
    them. Raises Error if the backend, the number of devices or the batch size does not allow it.
    """
    count = config.devices
    if count == 1:
        yield
        return
    if keras.backend.backend() != "jax":
        raise Error(
            f"--devices {count} needs JAX; this is {keras.backend.backend()}.\nSet KERAS_BACKEND=jax."
        )
    devices = keras.distribution.list_devices()
    if len(devices) < count:
        raise Error(f"--devices {count}: this machine has {len(devices)} ({', '.join(devices)}).")
    pictures = config.batch_size * (2 if config.prior_preservation else 1)
    if pictures % count:
        raise Error(
            f"--devices {count}: the {pictures} pictures of a step cannot be divided among them.\n"
            "Change --batch-size."
        )
    with keras.distribution.DataParallel(devices=devices[:count]).scope():
        yield


@contextmanager
def together() -> Iterator[None]:
    """Within `spread`: a block whose batches are not split, as for sample images, which may be one image."""
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)
