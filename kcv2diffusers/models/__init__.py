"""Stable Diffusion in Keras 3, weight-compatible with KerasCV; runs on TensorFlow, JAX and PyTorch."""

# ruff: noqa: E402
from kcv2diffusers.backend import choose_backend
from kcv2diffusers.errors import MissingExtra

choose_backend()  # before Keras is imported
try:
    import keras  # noqa: F401
except ModuleNotFoundError as error:
    raise MissingExtra(str(error.name), "keras") from error

from kcv2diffusers.diffusion import LATENT_SCALE
from kcv2diffusers.models.config import SD1, SD2, ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig
from kcv2diffusers.models.layers import rematerialise
from kcv2diffusers.models.text_encoder import build_text_encoder
from kcv2diffusers.models.unet import build_unet
from kcv2diffusers.models.vae import build_decoder, build_image_encoder

__all__ = [
    "LATENT_SCALE",
    "SD1",
    "SD2",
    "ModelConfig",
    "TextEncoderConfig",
    "UNetConfig",
    "VAEConfig",
    "build_decoder",
    "build_image_encoder",
    "build_text_encoder",
    "build_unet",
    "rematerialise",
]
