"""Each step split over several devices of one host."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import keras

from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.errors import Error


@contextmanager
def spread(config: Config) -> Iterator[None]:
    """Variables made and steps run in this block are on `config.devices` devices: weights on each, pictures
    divided among them. Raises Error where that cannot be.
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
    """Within `spread`: a block in which batches are whole, as those of drawings, which may be one picture."""
    distribution = keras.distribution.distribution()
    keras.distribution.set_distribution(None)
    try:
        yield
    finally:
        keras.distribution.set_distribution(distribution)
