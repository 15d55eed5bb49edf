"""The VAE's encoder and decoder, weight-compatible with KerasCV's `ImageEncoder` and `Decoder`."""

from __future__ import annotations

from typing import Any

import keras

from kcv2diffusers.diffusion import LATENT_CHANNELS, LATENT_SCALE
from kcv2diffusers.models.config import VAEConfig
from kcv2diffusers.models.layers import (
    Block,
    PaddedConv2D,
    Tensor,
    UpSampling2D,
    attention,
    dtype_policy,
    group_norm,
    to_image,
    to_sequence,
)


class ResnetBlock(Block):
    """A residual block: two convolutions, each after group normalisation and SiLU."""

    width: int

    def __init__(self, width: int, groups: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.width = width
        self.norm1 = group_norm(groups)
        self.conv1 = PaddedConv2D(width, 3)
        self.norm2 = group_norm(groups)
        self.conv2 = PaddedConv2D(width, 3)

    def build(self, input_shape: Any) -> None:
        self.residual_projection = PaddedConv2D(self.width, 1) if input_shape[-1] != self.width else None
        super().build(input_shape)

    def compute(self, inputs: Tensor) -> Tensor:
        x = self.conv1(keras.activations.silu(self.norm1(inputs)))
        x = self.conv2(keras.activations.silu(self.norm2(x)))
        return x + (inputs if self.residual_projection is None else self.residual_projection(inputs))


class AttentionBlock(Block):
    """Single-head self-attention over the pixels of a feature map, with a residual connection."""

    def __init__(self, width: int, groups: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.norm = group_norm(groups)
        self.q = PaddedConv2D(width, 1)
        self.k = PaddedConv2D(width, 1)
        self.v = PaddedConv2D(width, 1)
        self.proj_out = PaddedConv2D(width, 1)

    def compute(self, inputs: Tensor) -> Tensor:
        x = self.norm(inputs)
        query, key, value = (to_sequence(layer(x)) for layer in (self.q, self.k, self.v))
        return self.proj_out(to_image(attention(query, key, value, heads=1), like=inputs)) + inputs


class ScaledMean(keras.layers.Layer):  # type: ignore[misc]
    """The mean half of the encoder's moments, times `LATENT_SCALE`."""

    def call(self, inputs: Tensor) -> Tensor:
        return inputs[..., :LATENT_CHANNELS] * LATENT_SCALE


def build_image_encoder(config: VAEConfig, moments: bool = False, dtype: str | None = None) -> keras.Model:
    """Build the VAE encoder as a Keras model with random weights.

    Input: images (batch, height, width, 3) in -1..1, height and width multiples of 8. Output: latents (batch,
    height / 8, width / 8, 4), the scaled mean. With `moments` the output is mean and log variance, unscaled,
    as 8 channels. `dtype` is a Keras dtype policy; default: the global one.
    """
    groups = config.norm_groups
    with dtype_policy(dtype):
        image = keras.Input((None, None, 3), name="image")
        x = PaddedConv2D(config.widths[0], 3)(image)
        for level, width in enumerate(config.widths):
            for _ in range(2):
                x = ResnetBlock(width, groups)(x)
            if level != len(config.widths) - 1:
                x = PaddedConv2D(width, 3, strides=2, pad_end=True)(x)
        x = ResnetBlock(config.widths[-1], groups)(x)
        x = AttentionBlock(config.widths[-1], groups)(x)
        x = ResnetBlock(config.widths[-1], groups)(x)
        x = group_norm(groups)(x)
        x = keras.layers.Activation("silu")(x)
        x = PaddedConv2D(2 * LATENT_CHANNELS, 3)(x)
        x = PaddedConv2D(2 * LATENT_CHANNELS, 1)(x)
        return keras.Model(image, x if moments else ScaledMean()(x), name="image_encoder")


def build_decoder(config: VAEConfig, dtype: str | None = None) -> keras.Model:
    """Build the VAE decoder as a Keras model with random weights.

    Input: latents (batch, height / 8, width / 8, 4), scaled as the encoder scales them. Output: images
    (batch, height, width, 3), about -1..1 and not clipped. `dtype` is a Keras dtype policy; default: the
    global one.
    """
    groups = config.norm_groups
    with dtype_policy(dtype):
        latent = keras.Input((None, None, LATENT_CHANNELS), name="latent")
        x = keras.layers.Rescaling(1 / LATENT_SCALE)(latent)
        x = PaddedConv2D(LATENT_CHANNELS, 1)(x)
        x = PaddedConv2D(config.widths[-1], 3)(x)
        x = ResnetBlock(config.widths[-1], groups)(x)
        x = AttentionBlock(config.widths[-1], groups)(x)
        x = ResnetBlock(config.widths[-1], groups)(x)
        for level, width in reversed(list(enumerate(config.widths))):
            for _ in range(3):
                x = ResnetBlock(width, groups)(x)
            if level != 0:
                x = UpSampling2D(2)(x)
                x = PaddedConv2D(width, 3)(x)
        x = group_norm(groups)(x)
        x = keras.layers.Activation("silu")(x)
        return keras.Model(latent, PaddedConv2D(3, 3)(x), name="decoder")
