"""Run in processes of their own, on JAX: steps of a small network with averages and held-out photos.

    python jax_run.py OUT DEVICES

`fit` with the callback of a run. DEVICES is the number of devices of this process; of several processes
(KERAS_DISTRIBUTION_*) each has one. The first prints the validation losses and the sums of the weights and of
their averages.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kcv2diffusers.dreambooth.batches import Batches, Examples
from kcv2diffusers.dreambooth.checkpoints import Checkpoints
from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.dreambooth.devices import devices_of, spread
from kcv2diffusers.dreambooth.follow import Follow, Unread
from kcv2diffusers.dreambooth.model import DreamBooth
from kcv2diffusers.dreambooth.optimizers import make_optimizer
from kcv2diffusers.dreambooth.photos import Photo
from kcv2diffusers.dreambooth.ranks import joined
from kcv2diffusers.dreambooth.validation import Validation
from kcv2diffusers.progress import silent_stages


class Unsaved(Checkpoints):
    """Checkpoints that are asked for, and not written."""

    def __init__(self, trainer: keras.Model) -> None:
        self.trainer, self._thread, self._error = trainer, None, None

    def save(self, step: int, *, last: bool = False) -> None:
        self.trainer.jax_state_sync()


def unet() -> keras.Model:
    latent = keras.Input((None, None, 4), name="latent")
    time = keras.Input((32,), name="timestep_embedding")
    context = keras.Input((None, 24), name="context")
    dense = [keras.layers.Dense(4, kernel_initializer=keras.initializers.GlorotUniform(n)) for n in range(3)]
    both = dense[0](time) + dense[1](keras.layers.GlobalAveragePooling1D()(context))
    return keras.Model([latent, time, context], dense[2](latent) + keras.layers.Reshape((1, 1, 4))(both))


def examples(seed: int) -> Examples:
    rng = np.random.default_rng(seed)
    photos = [Photo(Path(f"{number}.png"), (64, 64), prompt="sks") for number in range(2)]
    found = Examples(photos, {"sks": rng.standard_normal((9, 24), dtype="float32")}, None, 64)
    for number in range(2):
        found._moments[number, (64, 64), False] = rng.standard_normal((8, 8, 8), dtype="float32")
    return found


def main(out: str, devices: int) -> None:
    config = Config(
        out=out, steps=5, batch_size=2, validation_every=2, ema=0.5, learning_rate=0.01, devices=devices,
        checkpoint_every=3,
    )  # fmt: skip
    with joined("jax") as group:
        network = unet()
        with spread(devices_of(config, group), [network]):
            model = DreamBooth(network)
            model.compile(make_optimizer(config, []), jit_compile=True)
            model.optimizer.build(model.trainable_variables)
            batches = Batches(examples(0), None, batch_size=2, steps=config.steps, group=group)
            validation = None
            if group.first:
                validation = Validation(examples(1), Path(out), batch_size=4, timesteps=1000, seed=0)
            drawings: Any = None
            run = Follow(config, Unsaved(model), drawings, 0, silent_stages, validation, group)
            callbacks = Unread([run], add_history=True, model=model, epochs=1, steps=len(batches))
            model.fit(batches, epochs=1, shuffle=False, verbose=0, callbacks=callbacks)
        sums = [
            float(sum(np.abs(np.asarray(variable.value)).sum(dtype="float64") for variable in variables))
            for variables in (model.trainable_variables, model.optimizer._model_variables_moving_average)
        ]
        group.leave()
        if validation is not None:
            print(json.dumps([validation.rows, sums]))


if __name__ == "__main__":
    main(sys.argv[1], int(sys.argv[2]))
