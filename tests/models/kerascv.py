"""The real KerasCV 0.9.0 models at small widths, built by KerasCV's own constructors.

Those constructors hard-code their widths, so their modules are given layer classes that divide every width
they are asked for; topology, call order and weight paths stay KerasCV's.
"""

from __future__ import annotations

import importlib
from collections.abc import Callable
from types import ModuleType
from typing import Any
from unittest import mock

import keras
import numpy as np

from kcv2diffusers.models import ModelConfig, TextEncoderConfig, UNetConfig, VAEConfig

SMALL1 = ModelConfig(
    unet=UNetConfig(widths=(32, 64, 128, 128), heads=(4, 4, 4, 4), context_width=76),
    text_encoder=TextEncoderConfig(width=76, heads=4, vocabulary=60, layers=12),
    vae=VAEConfig(widths=(32, 64, 128, 128)),
)
SMALL2 = ModelConfig(
    unet=UNetConfig(widths=(32, 64, 128, 128), heads=(4, 4, 4, 4), context_width=100, linear_projection=True),
    text_encoder=TextEncoderConfig(width=100, heads=4, vocabulary=60, layers=23, activation="tanh"),
    vae=VAEConfig(widths=(32, 64, 128, 128)),
)


def _module(name: str) -> ModuleType:
    return importlib.import_module(f"keras_cv.src.models.stable_diffusion.{name}")


# Other numbers that the constructors pass on (channels of pictures and latents, widths of narrowed layers'
# own sublayers) are not in these tables and stay.
UNET = {320: 32, 640: 64, 1280: 128}
CONTEXT = {320: 32, 768: 76, 1024: 100}
VAE = {128: 32, 256: 64, 512: 128}


def _narrow(kind: Callable[..., Any], widths: dict[int, int]) -> Callable[..., Any]:
    return lambda width, *args, **kwargs: kind(widths.get(width, width), *args, **kwargs)


class _NarrowLayers:
    """`keras.layers` as the UNet's constructor sees it."""

    Dense = staticmethod(_narrow(keras.layers.Dense, {1280: 128}))

    @staticmethod
    def Input(shape: tuple[int, ...], **kwargs: Any) -> Any:
        return keras.layers.Input((*shape[:-1], CONTEXT.get(shape[-1], shape[-1])), **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(keras.layers, name)


class _NarrowKeras:
    layers = _NarrowLayers()

    def __getattr__(self, name: str) -> Any:
        return getattr(keras, name)


def small_unet(version: int, height: int = 64, width: int = 64) -> keras.Model:
    """KerasCV's `DiffusionModel` or `DiffusionModelV2` at a tenth of its widths."""
    module = _module("diffusion_model")
    transformer = module.SpatialTransformer
    names = ("ResBlock", "PaddedConv2D", "Upsample")
    replaced = {name: _narrow(getattr(module, name), UNET) for name in names}
    replaced["SpatialTransformer"] = lambda heads, size, **kw: transformer(4, heads * size // 40, **kw)
    with mock.patch.multiple(module, keras=_NarrowKeras(), **replaced):
        make = module.DiffusionModel if version == 1 else module.DiffusionModelV2
        return make(height, width, 77, download_weights=False)


def _small_vae_half(module: ModuleType, kind: str, *args: int) -> keras.Model:
    names = ("PaddedConv2D", "ResnetBlock", "AttentionBlock")
    with mock.patch.multiple(module, **{name: _narrow(getattr(module, name), VAE) for name in names}):
        return getattr(module, kind)(*args, download_weights=False)


def small_decoder(height: int = 64, width: int = 64) -> keras.Model:
    """KerasCV's `Decoder` at a quarter of its widths."""
    return _small_vae_half(_module("decoder"), "Decoder", height, width)


def small_image_encoder() -> keras.Model:
    """KerasCV's `ImageEncoder` at a quarter of its widths."""
    return _small_vae_half(_module("image_encoder"), "ImageEncoder")


def small_text_encoder(version: int, vocabulary: int = 60) -> keras.Model:
    """KerasCV's `TextEncoder` or `TextEncoderV2` at a tenth of its width, with 4 heads."""
    module = _module("text_encoder")
    embedding, layer = module.CLIPEmbedding, module.CLIPEncoderLayer
    replaced = {
        "CLIPEmbedding": lambda tokens, width, length: embedding(tokens, CONTEXT[width], length),
        "CLIPEncoderLayer": lambda width, heads, activation: layer(CONTEXT[width], 4, activation=activation),
    }
    with mock.patch.multiple(module, **replaced):
        make = module.TextEncoder if version == 1 else module.TextEncoderV2
        return make(77, vocabulary, download_weights=False)


def randomise(model: keras.Model, seed: int = 0) -> None:
    """Give every variable random values, biases and gammas too, that keep activations of about unit size."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        noise = rng.standard_normal(variable.shape, dtype="float32")
        if variable.path.endswith("gamma"):
            variable.assign(1 + 0.1 * noise)
        elif len(variable.shape) < 2 or "embedding" in variable.path:
            variable.assign(0.1 * noise)
        else:
            variable.assign(noise / np.sqrt(np.prod(variable.shape[:-1])))


def relative_error(got: Any, expected: Any) -> float:
    """Largest absolute difference over the largest absolute value."""
    got, expected = (np.asarray(keras.ops.convert_to_numpy(x), dtype="float64") for x in (got, expected))
    return float(np.abs(got - expected).max() / np.abs(expected).max())
