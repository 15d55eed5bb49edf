"""Write genuine KerasCV checkpoints in every container this stack can write, and what they must become.

    python make_checkpoints.py OUT [--kind small|full] [--parts ...] [--versions 1 2] [--dtypes ...]
                               [--containers ...] [--vocabulary N] [--traces]

Each checkpoint is OUT/<part>-sd<version>-<dtype>/<container>, with `expected.json` (digests of the
diffusers state dict, from the live model) beside it. A SavedModel of a UNet or a VAE has its functions only
with --traces, as tracing them takes up to two minutes.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import expected
import stack
import tensorflow as tf


def export_variables(model: Any, path: str) -> None:
    """`model.export`, with a function in the place of the model's own that takes no minute to trace."""
    archive = stack.keras.export.ExportArchive()
    archive.track(model)
    archive.add_endpoint("serve", tf.identity, [tf.TensorSpec([])])
    archive.write_out(path, verbose=False)


def containers(model: Any, folder: Path, traces: bool) -> dict[str, Callable[[], Any]]:
    """Every way this Keras has to save the model, by file name; a SavedModel with functions if `traces`."""
    path = {
        name: str(folder / name)
        for name in (
            "weights.weights.h5", "sharded.weights.json", "model.keras", "model.h5", "legacy.h5",
            "export", "saved_model", "checkpoint/ckpt",
        )
    }  # fmt: skip
    if stack.KERAS3:
        size = sum(int(tf.size(v)) for v in model.weights) * 4 / 2**30
        return {
            "weights.weights.h5": lambda: model.save_weights(path["weights.weights.h5"]),
            "sharded.weights.json": lambda: model.save_weights(
                path["sharded.weights.json"], max_shard_size=size / 4
            ),
            "model.keras": lambda: model.save(path["model.keras"]),
            "model.h5": lambda: model.save(path["model.h5"]),
            "export": lambda: (
                model.export(path["export"], verbose=False)
                if traces
                else export_variables(model, path["export"])
            ),
            "checkpoint": lambda: tf.train.Checkpoint(model).write(path["checkpoint/ckpt"]),
        }
    return {
        "legacy.h5": lambda: model.save_weights(path["legacy.h5"]),
        "weights.weights.h5": lambda: model.save_weights(path["weights.weights.h5"]),
        "model.keras": lambda: model.save(path["model.keras"]),
        "model.h5": lambda: model.save(path["model.h5"]),
        "saved_model": lambda: model.save(path["saved_model"], save_traces=traces),
        "checkpoint": lambda: model.save_weights(path["checkpoint/ckpt"]),
    }


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("--kind", default="small")
    parser.add_argument("--parts", nargs="+", default=stack.PARTS)
    parser.add_argument("--versions", nargs="+", type=int, default=[1, 2])
    parser.add_argument("--dtypes", nargs="+", default=["float32"])
    parser.add_argument("--containers", nargs="+")
    parser.add_argument("--vocabulary", type=int)
    parser.add_argument("--size", type=int, default=stack.SIZE)
    parser.add_argument("--traces", action="store_true")
    args = parser.parse_args(arguments)
    # KerasCV's layer takes a function and cannot be saved whole; people who did gave it a get_config.
    stack.CLIPEncoderLayer.get_config = lambda self: {"name": self.name}
    for dtype in args.dtypes:
        for part in args.parts:
            for version in args.versions:
                if part.startswith("vae") and version == 2:
                    continue
                folder = args.out / f"{part}-sd{version}-{dtype}"
                folder.mkdir(parents=True, exist_ok=True)
                seed = stack.PARTS.index(part) + 10 * version
                model = stack.build(part, version, args.kind, args.size, seed, args.vocabulary, dtype)
                traces = args.traces or part == "text_encoder"
                for name, save in containers(model, folder, traces).items():
                    if args.containers is None or name in args.containers:
                        save()
                (folder / "expected.json").write_text(json.dumps(expected.digests(part, model)))
                print(folder, file=sys.stderr)


if __name__ == "__main__":
    main(sys.argv[1:])
