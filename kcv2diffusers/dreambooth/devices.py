"""Precision and devices of a run: the dtype policy, TF32, and data parallelism."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager
from typing import Any

import keras
import numpy as np

from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.dreambooth.ranks import Group
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


def devices_of(config: Config, group: Group) -> list[str]:
    """JAX's devices for `spread`: `config.devices`, or all of all processes; empty if there is one.

    Raises Error if the backend, the number of devices or the batch size does not allow it.
    """
    count, words, on_jax = config.devices, f"--devices {config.devices}", keras.backend.backend() == "jax"
    if count > 1 and group.count > 1:
        raise Error(f"{words} is for one process; this run has {group.count}, which use all theirs.")
    if count > 1 and not on_jax:
        raise Error(
            f"{words} needs JAX; this is {keras.backend.backend()}.\n"
            "Set KERAS_BACKEND=jax, or start a process for each device with torchrun."
        )
    devices = list(keras.distribution.list_devices()) if on_jax else []
    if group.count > 1:
        count = len(devices) or group.count
        words = f"{group.count} processes with {count} devices"
    elif len(devices) < count and on_jax:
        raise Error(f"{words}: this machine has {len(devices)} ({', '.join(devices)}).")
    pictures = config.batch_size * (2 if config.prior_preservation else 1)
    if pictures % count:
        raise Error(
            f"{words}: the {pictures} pictures of a step cannot be divided among them.\nChange --batch-size."
        )
    return devices[:count] if count > 1 else []


@contextmanager
def spread(devices: list[str], models: Iterable[keras.Model]) -> Iterator[None]:
    """Run the steps of this block data-parallel on `devices`, if there are any.

    The variables of `models`, and those created in the block, are replicated on each device. The images of a
    batch are split among them.
    """
    if not devices:
        yield
        return
    with keras.distribution.DataParallel(devices=devices, auto_shard_dataset=False).scope():
        for variable in (variable for model in models for variable in model.variables):
            variable._initialize_layout()
            # From the host, because JAX copies no array from a device to those of other processes.
            variable._direct_assign(np.asarray(variable.value))
        yield


@contextmanager
def together(models: Sequence[keras.Variable], others: Sequence[keras.Variable]) -> Iterator[None]:
    """Within or after `spread`: a block that computes on one device of this process, as for sample images.

    The variables have their values there. Those of `models` are copies, because JAX's predictions overwrite
    the weights that they are given.
    """
    if not any(getattr(variable, "_layout", None) for variable in (*models, *others)):
        yield
        return
    distribution = keras.distribution.distribution()
    held = [(variable, variable._layout, variable._value) for variable in (*models, *others)]
    keras.distribution.set_distribution(None)
    for number, (variable, _, value) in enumerate(held):
        value = value.addressable_data(0)
        variable._layout, variable._value = None, value.copy() if number < len(models) else value
    try:
        yield
    finally:
        for variable, layout, value in held:
            variable._layout, variable._value = layout, value
        keras.distribution.set_distribution(distribution)
