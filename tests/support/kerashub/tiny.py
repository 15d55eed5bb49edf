"""Tiny genuine Stable Diffusion 3 models of KerasHub; every variable is random.

The three kinds have the structure of the released models: "sd3" (medium), "sd35m" (3.5 medium: dual attention
in the first blocks, q/k norm) and "sd35l" (3.5 large: q/k norm).
"""

from __future__ import annotations

import zlib
from typing import Any

import keras
import keras_hub
import numpy as np
from keras_hub.src.models.stable_diffusion_3.mmdit import MMDiT
from keras_hub.src.models.stable_diffusion_3.t5_encoder import T5Encoder
from keras_hub.src.models.vae.vae_backbone import VAEBackbone

KINDS = ("sd3", "sd35m", "sd35l")
SIZE = 64  # pixels
VOCABULARY = 1000  # of T5; CLIP's is that of the tiny tokenizer
CONTEXT = 64  # 4096 in the released models, and in KerasHub where there is no T5


def set_early(self: Any, name: str, value: Any) -> None:
    """T5 sets layers before PyTorch's module is initialised, which it refuses."""
    (keras.Model if hasattr(self, "_layers") else object).__setattr__(self, name, value)


T5Encoder.__setattr__ = set_early


def clip(name: str, width: int, layers: int, words: int, activation: str) -> Any:
    return keras_hub.models.CLIPTextEncoder(
        vocabulary_size=words,
        embedding_dim=width,
        hidden_dim=width,
        num_layers=layers,
        num_heads=2,
        intermediate_dim=4 * width,
        intermediate_activation=activation,
        intermediate_output_index=-2,
        name=name,
    )


def vae() -> Any:
    return VAEBackbone(
        encoder_num_filters=[32, 32, 64, 64],
        encoder_num_blocks=[2, 2, 2, 2],
        decoder_num_filters=[64, 64, 32, 32],
        decoder_num_blocks=[3, 3, 3, 3],
        sampler_method="mode",
        sample_channels=32,
        name="vae",
    )


def t5() -> Any:
    return T5Encoder(
        vocabulary_size=VOCABULARY,
        num_layers=2,
        num_heads=4,
        hidden_dim=CONTEXT,
        intermediate_dim=96,
        key_value_dim=8,
        activation="gelu",
        name="t5",
    )


def mmdit_options(kind: str) -> dict[str, Any]:
    """Layers and widths; a head has 8 channels."""
    heads = 6 if kind == "sd35l" else 4
    return {
        "patch_size": 2,
        "hidden_dim": 8 * heads,
        "num_layers": 4 if kind == "sd35m" else 3,
        "num_heads": heads,
        "position_size": 12,
        "qk_norm": None if kind == "sd3" else "rms_norm",
        "dual_attention_indices": (0, 1) if kind == "sd35m" else None,
    }


def backbone(kind: str, words: int, *, with_t5: bool, seed: int = 0, size: int = SIZE) -> Any:
    keras.utils.clear_session()
    options = {f"mmdit_{name}": value for name, value in mmdit_options(kind).items()}
    made = keras_hub.models.StableDiffusion3Backbone(
        **options,
        vae=vae(),
        clip_l=clip("clip_l", 16, 2, words, "quick_gelu"),
        clip_g=clip("clip_g", 24, 3, words, "gelu"),
        t5=t5() if with_t5 else None,
        image_shape=(size, size, 3),
        name="stable_diffusion_3_backbone",
    )
    randomise(made, seed)
    return made


def mmdit(kind: str, seed: int = 0, latent: int = SIZE // 8) -> Any:
    """The MMDiT alone, for a context of the width of a small T5."""
    keras.utils.clear_session()
    made = MMDiT(
        **mmdit_options(kind),
        latent_shape=(latent, latent, 16),
        context_shape=(None, CONTEXT),
        pooled_projection_shape=(40,),
        name="diffuser",
    )
    randomise(made, seed)
    return made


def randomise(model: Any, seed: int) -> None:
    """Kernels at the scale that keeps activations near one, norms around one, biases small."""
    for variable in model.weights:
        rng = np.random.default_rng([seed, zlib.crc32(variable.path.encode())])
        values = rng.standard_normal(tuple(variable.shape), dtype=np.float32)
        last = variable.name
        if "norm" in variable.path and last in ("gamma", "scale", "weight"):
            values = 1 + 0.1 * values
        elif last in ("bias", "beta"):
            values = 0.1 * values
        elif last in ("embeddings", "position_embedding", "relative_attention_bias"):
            values = 0.3 * values
        else:
            values /= np.sqrt(np.prod(variable.shape[:-1]))
        variable.assign(values)
