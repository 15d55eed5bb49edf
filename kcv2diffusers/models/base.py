"""A whole model in a folder: four `.weights.h5` files as KerasCV's models save them, sizes and a tokenizer.

The tiny base that ships with the package is such a folder.
"""

from __future__ import annotations

import dataclasses
from importlib import resources
from pathlib import Path

import keras

from kcv2diffusers.errors import SourceError
from kcv2diffusers.models.config import ModelConfig
from kcv2diffusers.models.sampler import TextToImage
from kcv2diffusers.models.text_encoder import build_text_encoder
from kcv2diffusers.models.tokenizer import Tokenizer
from kcv2diffusers.models.unet import build_unet
from kcv2diffusers.models.vae import build_decoder, build_image_encoder

UNET, TEXT_ENCODER = "diffusion_model.weights.h5", "text_encoder.weights.h5"
DECODER, IMAGE_ENCODER = "decoder.weights.h5", "image_encoder.weights.h5"


@dataclasses.dataclass
class Base:
    """All parts of a Stable Diffusion model."""

    config: ModelConfig
    unet: keras.Model
    text_encoder: keras.Model
    decoder: keras.Model
    image_encoder: keras.Model
    tokenizer: Tokenizer

    def sampler(self) -> TextToImage:
        """Text to picture with these models."""
        return TextToImage(self.text_encoder, self.unet, self.decoder, self.tokenizer)


def tiny_folder() -> Path:
    """Where the tiny base lies."""
    folder = Path(str(resources.files("kcv2diffusers") / "tiny"))
    if not (folder / UNET).exists():
        raise SourceError(folder, "this installation lacks the tiny base")
    return folder


def load_base(folder: str | Path, moments: bool = False, dtype: str | None = None) -> Base:
    """Build and load the models of `folder`; variables are float32 whatever the files hold.

    `moments` makes the image encoder give mean and log variance, `dtype` is a Keras dtype policy.
    """
    folder = Path(folder)
    config = ModelConfig.load(folder / "config.json")
    models = {
        UNET: build_unet(config.unet, dtype),
        TEXT_ENCODER: build_text_encoder(config.text_encoder, dtype),
        DECODER: build_decoder(config.vae, dtype),
        IMAGE_ENCODER: build_image_encoder(config.vae, moments, dtype),
    }
    for name, model in models.items():
        try:
            model.load_weights(folder / name)
        except (OSError, ValueError, KeyError) as problem:
            raise SourceError(folder / name, f"not the weights of this model: {problem}") from problem
    return Base(config, *models.values(), tokenizer=Tokenizer.load(folder / "tokenizer"))
