"""How far our model is from KerasCV's output for one part that forward.py left, in a process of its own.

    python ours.py FOLDER PART VERSION

prints the relative error; the model has the full size.
"""

from __future__ import annotations

import sys
from pathlib import Path

import numpy as np
from small import relative_error

from kcv2diffusers import models
from kcv2diffusers.diffusion import timestep_embedding
from kcv2diffusers.models.layers import zeros


def main(folder: Path, part: str, version: str) -> None:
    config = models.SD1 if version == "1" else models.SD2
    with np.load(folder / f"{part}.npz") as arrays:
        given = dict(arrays)
    with zeros():
        if part == "unet":
            model = models.build_unet(config.unet)
            embedding = timestep_embedding(given["timesteps"], config.unet.timestep_width)
            inputs = {k: given[k] for k in ("latent", "context")} | {"timestep_embedding": embedding}
        elif part == "text_encoder":
            model = models.build_text_encoder(config.text_encoder)
            tokens = given["tokens"].astype("int32")
            positions = np.tile(np.arange(tokens.shape[1], dtype="int32"), (len(tokens), 1))
            inputs = {"tokens": tokens, "positions": positions}
        elif part == "vae_decoder":
            model, inputs = models.build_decoder(config.vae), given["latent"]
        else:
            model, inputs = models.build_image_encoder(config.vae), given["image"]
    model.load_weights(folder / f"{part}.weights.h5")
    print(relative_error(model.predict_on_batch(inputs), given["output"]))


if __name__ == "__main__":
    main(Path(sys.argv[1]), sys.argv[2], sys.argv[3])
