"""Checkpoints of a partly frozen model, where Keras puts the trainable weights of each layer first.

    python frozen.py OUT PART VERSION

OUT/<session>/ gets expected.json and the containers that keep no more than an order; session "fresh" has
the first layers that a session makes (without numbers in their names), "late" those of a later model.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import expected
import numpy as np
import stack


def freeze(model: Any, seed: int) -> None:
    """Every second layer that has weights of its own, at random."""
    rng = np.random.default_rng(seed)
    before = written(model)
    for layer in model._flatten_layers(include_self=False):
        if layer.weights and not any(inner.weights for inner in layer._flatten_layers(include_self=False)):
            layer.trainable = bool(rng.integers(2))
    assert written(model) != before, "nothing is out of order"


def written(model: Any) -> list[list[int]]:
    """The order in which Keras writes each layer's weights."""
    return [[id(w) for w in layer.trainable_weights + layer.non_trainable_weights] for layer in model.layers]


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("part")
    parser.add_argument("version", type=int)
    args = parser.parse_args(arguments)
    stack.CLIPEncoderLayer.get_config = lambda self: {"name": self.name}
    for seed, session in enumerate(("fresh", "late")):
        model = stack.small(args.part, args.version)
        stack.randomise(model, seed)
        freeze(model, seed)
        folder = args.out / session
        folder.mkdir(parents=True)
        if os.environ.get("TF_USE_LEGACY_KERAS"):
            model.save_weights(folder / "legacy.h5")
        else:
            model.save(folder / "model.h5")
            if session == "late":  # names play no part in it
                model.export(folder / "export", verbose=False)
        (folder / "kcv2diffusers.json").write_text(json.dumps(stack.HEADS))
        (folder / "expected.json").write_text(json.dumps(expected.digests(args.part, model)))


if __name__ == "__main__":
    main(sys.argv[1:])
