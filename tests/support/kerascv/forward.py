"""One KerasCV part with random variables: its `.weights.h5`, its digests and what it computes.

    python forward.py OUT PART VERSION [--kind small|full] [--size PIXELS]

OUT gets <part>.weights.h5, <part>.npz (the inputs and `output`, channels last), for a small model
kcv2diffusers.json, and for that or a text encoder <part>.expected.json.
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

TIMESTEPS = (3, 801)


def timestep_embedding(timestep: int, width: int) -> np.ndarray:
    """KerasCV's own; the width is its `dim`."""
    from keras_cv.src.models.stable_diffusion.stable_diffusion import StableDiffusionBase

    return stack.array(StableDiffusionBase._get_timestep_embedding(None, timestep, 1, dim=width))


def inputs(part: str, model: Any, size: int) -> dict[str, np.ndarray]:
    rng = np.random.default_rng(7)
    batch = len(TIMESTEPS)
    if part == "text_encoder":
        (embedding,) = (layer for layer in model.layers if hasattr(layer, "token_embedding"))
        return {"tokens": rng.integers(0, embedding.token_embedding.input_dim, (batch, stack.TEXT_LENGTH))}
    shape = (batch, size, size, 3) if part == "vae_encoder" else (batch, size // 8, size // 8, 4)
    values = {"image": rng.uniform(-1, 1, shape)} if shape[-1] == 3 else {"latent": rng.normal(size=shape)}
    if part == "unet":
        values["context"] = rng.normal(size=(batch, *model.inputs[2].shape[1:]))
        values["timesteps"] = np.array(TIMESTEPS)
    return {name: value.astype(np.float32) for name, value in values.items()}


def forward(part: str, model: Any, given: dict[str, np.ndarray]) -> Any:
    """The model is called, not `predict_on_batch`, which would compile it for one batch."""
    if part == "unet":
        embeddings = [timestep_embedding(t, model.inputs[1].shape[1]) for t in TIMESTEPS]
        return model([given["latent"], np.concatenate(embeddings), given["context"]])
    if part == "text_encoder":
        tokens = given["tokens"].astype("int32")
        positions = np.broadcast_to(np.arange(stack.TEXT_LENGTH, dtype="int32"), tokens.shape)
        return model([tokens, positions])
    return model(next(iter(given.values())))


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("out", type=Path)
    parser.add_argument("part")
    parser.add_argument("version", type=int)
    parser.add_argument("--kind", default="small")
    parser.add_argument("--size", type=int, default=stack.SIZE)
    args = parser.parse_args(arguments)
    model = stack.build(args.part, args.version, args.kind, args.size, seed=args.version)
    file = args.out / args.part
    model.save_weights(file.with_suffix(".weights.h5"))
    if args.kind == "small":
        (args.out / "kcv2diffusers.json").write_text(json.dumps(stack.HEADS))
    given = inputs(args.part, model, args.size)
    output = stack.array(forward(args.part, model, given))
    np.savez(file.with_suffix(".npz"), output=output, **given)
    if args.kind == "small" or args.part == "text_encoder":  # a UNet's take long, and none are asked for
        file.with_suffix(".expected.json").write_text(json.dumps(expected.digests(args.part, model)))


if __name__ == "__main__":
    main(sys.argv[1:])
