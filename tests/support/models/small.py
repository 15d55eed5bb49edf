"""Our configurations of the small models that `stack.build` makes of KerasCV's blocks, and a whole base."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import keras
import numpy as np

from kcv2diffusers import models
from kcv2diffusers.models import TextEncoderConfig, UNetConfig, VAEConfig
from kcv2diffusers.models.tokenizer import Tokenizer
from kcv2diffusers.pipeline.tokenizer_files import write_tokenizer
from kcv2diffusers.pipeline_files import CONFIG_FILE

UNET1 = UNetConfig(widths=(32, 64, 64, 64), heads=(2, 2, 2, 2), context_width=48)
UNET2 = UNetConfig(widths=(32, 64, 64, 64), heads=(2, 2, 2, 2), context_width=48, linear_projection=True)
TEXT1 = TextEncoderConfig(width=48, layers=3, heads=2, vocabulary=300)
TEXT2 = TextEncoderConfig(width=48, layers=3, heads=2, vocabulary=300, activation="exact")  # as in `stack`
VAE = VAEConfig(widths=(32, 64, 96, 96))


def relative_error(got: Any, expected: Any) -> float:
    """Largest absolute difference over the largest absolute value."""
    got, expected = (np.asarray(keras.ops.convert_to_numpy(x), dtype="float64") for x in (got, expected))
    return float(np.abs(got - expected).max() / np.abs(expected).max())


def write_base(folder: Path) -> Path:
    """Write checkpoints of unusual widths with the same random weights each time, as Keras saves them."""
    keras.utils.set_random_seed(1)  # one whose training amplifies rounding little
    tokenizer = Tokenizer.of_words(["a", "red", "car", "tree"])
    vae = VAEConfig((8, 16, 16, 24), norm_groups=2)
    parts = {
        "unet": models.build_unet(UNetConfig((16, 24, 32, 32), (4,) * 4, 24, norm_groups=4)),
        "text_encoder": models.build_text_encoder(
            TextEncoderConfig(24, layers=2, heads=3, vocabulary=len(tokenizer.vocabulary))
        ),
        "vae_decoder": models.build_decoder(vae),
        "vae_encoder": models.build_image_encoder(vae),
    }
    rng = np.random.default_rng(0)
    for name, model in parts.items():
        for variable in model.weights:
            variable.assign(variable + 0.1 * rng.standard_normal(variable.shape))
        model.save_weights(folder / f"{name}.weights.h5")
    stated = {
        "unet": {"attention_head_dim": 4, "norm_num_groups": 4, "sample_size": 8},
        "text_encoder": {"num_attention_heads": 3},
        "vae": {"norm_num_groups": 2, "sample_size": 64},
    }
    (folder / CONFIG_FILE).write_text(json.dumps(stated))
    write_tokenizer(tokenizer.files, folder / "tokenizer")
    return folder
