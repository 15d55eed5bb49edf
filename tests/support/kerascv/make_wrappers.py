"""Write genuine checkpoints of what holds the networks: trainers, functional wrappers, tf.train.Checkpoint.

    python make_wrappers.py OUT [WRAPPING ...]

Each checkpoint is OUT/<wrapping>/<container>; `expected-<part>.json` beside the folders has the digests of
each network. Every wrapping is saved in all containers that this Keras can write it in. A SavedModel has its
functions in the first wrapping, a text encoder alone; tracing takes seconds, and minutes for a VAE or a UNet.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import expected
import numpy as np
import stack
import tensorflow as tf
from make_checkpoints import export_variables

K = stack.keras
KERAS3 = not os.environ.get("TF_USE_LEGACY_KERAS") and hasattr(K, "ops")
TOKENS = [np.zeros((1, 77), "int32"), np.zeros((1, 77), "int32")]
PARTS = ("unet", "text_encoder", "vae_encoder")


class Trainer(K.Model):
    """Holds what it is given by attribute name; the text encoder is what it calls."""

    def __init__(self, called: Any = None, **networks: Any) -> None:
        super().__init__()
        self.called = called
        for name, network in networks.items():
            setattr(self, name, network)

    def call(self, inputs: Any) -> Any:
        return self.called(inputs)

    def get_config(self) -> dict[str, Any]:
        return {}


class Outer(K.Model):
    """A trainer that holds a trainer."""

    def __init__(self, trainer: Any) -> None:
        super().__init__()
        self.trainer = trainer

    def call(self, inputs: Any) -> Any:
        return self.trainer(inputs)

    def get_config(self) -> dict[str, Any]:
        return {}


def functional(network: Any) -> Any:
    """A model of which the network is one layer."""
    inputs = [K.layers.Input(tuple(i.shape)[1:], dtype=i.dtype) for i in network.inputs]
    return K.Model(inputs, network(inputs))


def trained(model: Any) -> Any:
    """The model with the variables of an optimizer, as after a first step."""
    model.compile(optimizer=K.optimizers.Adam(1e-3))
    model.optimizer.build(model.trainable_variables)
    return model


made: dict[tuple[str, int], Any] = {}


def network(part: str, seed: int = 0) -> Any:
    """A small network; the same one each time."""
    if (part, seed) not in made:
        one_layer = {"depth": 1} if part == "text_encoder" else {}
        made[part, seed] = stack.small(part, 1, **one_layer)
        stack.randomise(made[part, seed], seed or 1 + PARTS.index(part))
    return made[part, seed]


def stranger() -> Any:
    other = K.Sequential([K.layers.Dense(5), K.layers.Dense(7)])
    other(np.zeros((1, 3), "f4"))
    return Trainer(network("text_encoder"), classifier=other)


def frozen() -> Any:
    """A trainer of the last layers of an encoder, whose first layers keep their weights."""
    encoder = network("vae_encoder", seed=8)
    for layer in encoder.layers[:4]:
        layer.trainable = False
    return Trainer(network("text_encoder"), vae=encoder)


# What is saved, by name. Each is made when it is its turn: compiling leaves traces.
WRAPPINGS: dict[str, Callable[[], Any]] = {
    "one": lambda: Trainer(network("text_encoder")),
    "functional": lambda: functional(network("text_encoder")),
    "nested": lambda: Outer(Trainer(network("text_encoder"), vae=network("vae_encoder"))),
    "deep": lambda: Outer(functional(functional(network("text_encoder")))),
    "ema": lambda: Trainer(network("text_encoder"), ema_text_encoder=network("text_encoder", seed=9)),
    "twice": lambda: Trainer(network("text_encoder"), other_text_encoder=network("text_encoder", seed=9)),
    "stranger": stranger,
    "pair": lambda: trained(Trainer(network("text_encoder"), vae=network("vae_encoder"))),
    "three": lambda: Trainer(
        network("text_encoder"), diffusion_model=network("unet"), vae=network("vae_encoder")
    ),
    "frozen": frozen,
}


def containers(name: str, model: Any, folder: Path) -> dict[str, Callable[[], Any]]:
    """Every way this Keras has to save the model, by file name."""
    path = {
        container: str(folder / container)
        for container in (
            "weights.weights.h5", "model.keras", "model.h5", "legacy.h5", "export", "saved_model", "tf/ckpt",
        )
    }  # fmt: skip

    def manager() -> None:
        optimizer: Any = getattr(model, "optimizer", None) or tf.Module()
        checkpoint = tf.train.Checkpoint(step=tf.Variable(7), optimizer=optimizer, model=model)
        tf.train.CheckpointManager(checkpoint, str(folder / "manager"), max_to_keep=1).save()

    found: dict[str, Callable[[], Any]] = {
        "weights.weights.h5": lambda: model.save_weights(path["weights.weights.h5"]),
        "manager": manager,
    }
    traces = name == "one"
    if name != "three":
        found["model.keras"] = lambda: model.save(path["model.keras"])
    if name.startswith("functional"):
        found["model.h5"] = lambda: model.save(path["model.h5"])
    if KERAS3:
        found["export"] = lambda: (
            model.export(path["export"], verbose=False) if traces else export_variables(model, path["export"])
        )
        return found
    found["legacy.h5"] = lambda: model.save_weights(path["legacy.h5"], save_format="h5")
    found["tf"] = lambda: model.save_weights(path["tf/ckpt"])
    found["saved_model"] = lambda: model.save(path["saved_model"], save_format="tf", save_traces=traces)
    return found


def main(arguments: list[str]) -> None:
    out = Path(arguments[0])
    stack.CLIPEncoderLayer.get_config = lambda self: {"name": self.name}
    made.clear()  # a session's names begin anew at each request
    out.mkdir(parents=True, exist_ok=True)
    for name in arguments[1:] or [*WRAPPINGS, "side-by-side"]:
        (out / name).mkdir(exist_ok=True)
        if name == "side-by-side":  # networks without a model around them
            # In Keras 3 TensorFlow does not see what a layer of the UNet keeps in a list.
            held = {part: network(part) for part in PARTS if not KERAS3 or part == "text_encoder"}
            step = tf.Variable(3, dtype=tf.int64)
            tf.train.Checkpoint(step=step, **held).write(str(out / name / "ckpt"))
            continue
        model = WRAPPINGS[name]()
        if name != "functional":
            model(TOKENS)
        for container, save in containers(name, model, out / name).items():
            try:
                save()
            except Exception as error:
                print(f"{name}/{container}: {type(error).__name__} {str(error)[:300]}", file=sys.stderr)
    for (part, seed), model in made.items():
        name = f"expected-{part}-{seed}.json" if seed else f"expected-{part}.json"
        (out / name).write_text(json.dumps(expected.digests(part, model)))


if __name__ == "__main__":
    main(sys.argv[1:])
