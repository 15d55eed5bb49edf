"""KerasCV's Stable Diffusion, whichever of its three generations the interpreter holds.

- keras-cv 0.9.0 on Keras 3 (the last release), on TensorFlow or on PyTorch,
- the same on Keras 2 (`TF_USE_LEGACY_KERAS=1` with tf-keras),
- keras-cv 0.4.2 on TensorFlow 2.12 (the stack of the 2023 DreamBooth sprint).

`build(part, version, size)` gives a model with every variable random: "full" is KerasCV's own class,
"small" the same topology composed of KerasCV's own blocks at small widths. Even so Keras 3 takes 8 s of a
processor to build a UNet on TensorFlow (2.5 s on PyTorch), so a process builds each small model once.
"""

from __future__ import annotations

import functools
import importlib
import os
from typing import Any

import numpy as np
import tensorflow as tf

try:
    from keras_cv.src.backend import keras

    _HOME, _BLOCKS = "keras_cv.src.models.stable_diffusion", "keras_cv.src.models.stable_diffusion"
except ImportError:
    from tensorflow import keras

    _HOME = "keras_cv.models.stable_diffusion"
    _BLOCKS = "keras_cv.models.stable_diffusion.__internal__.layers"

KERAS3 = not os.environ.get("TF_USE_LEGACY_KERAS") and hasattr(keras, "ops")
PARTS = ("unet", "text_encoder", "vae_decoder", "vae_encoder")
LAYERS = keras.layers
TEXT_LENGTH = 77
SIZE = 128  # pixels; with fewer the inner levels of a UNet have one position each
SMALL_VOCABULARY = 300
# What has to stand in a kcv2diffusers.json beside a small model, by component and config.json entry.
HEADS = {"unet": {"attention_head_dim": 2}, "text_encoder": {"num_attention_heads": 2}}


def _get(module: str, name: str, home: str = _HOME) -> Any:
    return getattr(importlib.import_module(f"{home}.{module}"), name)


PaddedConv2D = _get("padded_conv2d", "PaddedConv2D", _BLOCKS)
ResnetBlock = _get("resnet_block", "ResnetBlock", _BLOCKS)
AttentionBlock = _get("attention_block", "AttentionBlock", _BLOCKS)
ResBlock = _get("diffusion_model", "ResBlock")
SpatialTransformer = _get("diffusion_model", "SpatialTransformer")
Upsample = _get("diffusion_model", "Upsample")
CLIPEmbedding = _get("text_encoder", "CLIPEmbedding")
CLIPEncoderLayer = _get("text_encoder", "CLIPEncoderLayer")
quick_gelu = _get("text_encoder", "quick_gelu")
GroupNormalization = (
    LAYERS.GroupNormalization
    if hasattr(LAYERS, "GroupNormalization")
    else importlib.import_module("keras_cv.layers").GroupNormalization
)


def _build_without_rehearsals() -> None:
    """Keras 3 calls a layer that has no `build` of its own once more before the call that is wanted, and so
    for each of the layers within. There the call that follows builds them as well; models are the same.
    """
    from keras.src.backend.common.symbolic_scope import in_symbolic_scope
    from keras.src.layers import layer

    unbuilt = layer.might_have_unbuilt_state
    layer.might_have_unbuilt_state = lambda it: not in_symbolic_scope() and unbuilt(it)


if KERAS3:
    _build_without_rehearsals()


def start_anew(dtype: str = "float32") -> None:
    """What is built next has the names of a new process, at first without numbers, and has `dtype`."""
    keras.backend.clear_session()
    if KERAS3:
        keras.config.set_dtype_policy(dtype)
    else:
        keras.mixed_precision.set_global_policy(dtype)


def array(value: Any) -> np.ndarray:
    """What a model computed, or a variable, on whichever backend."""
    return keras.ops.convert_to_numpy(value) if KERAS3 else np.asarray(value)


def _swish() -> Any:
    return LAYERS.Activation("swish")


def small_unet(
    version: int,
    size: int | tuple[int, int] = SIZE,
    widths: tuple[int, ...] = (32, 64, 64, 64),
    context: int = 48,
    heads: int = 2,
) -> Any:
    """KerasCV's UNet at other widths, for pictures of `size` pixels (a side, or height and width)."""
    sides = size if isinstance(size, tuple) else (size, size)
    fully = version == 2
    inputs_context = LAYERS.Input((TEXT_LENGTH, context), name="context")
    inputs_time = LAYERS.Input((widths[0],), name="timestep_embedding")
    latent = LAYERS.Input((sides[0] // 8, sides[1] // 8, 4), name="latent")
    t = LAYERS.Dense(widths[0] * 4)(inputs_time)
    t = LAYERS.Dense(widths[0] * 4)(_swish()(t))

    def attend(x: Any, width: int) -> Any:
        return SpatialTransformer(heads, width // heads, fully_connected=fully)([x, inputs_context])

    x = PaddedConv2D(widths[0], kernel_size=3, padding=1)(latent)
    skips = [x]
    for level, width in enumerate(widths):
        for _ in range(2):
            x = ResBlock(width)([x, t])
            if level < 3:
                x = attend(x, width)
            skips.append(x)
        if level < 3:
            x = PaddedConv2D(width, 3, strides=2, padding=1)(x)
            skips.append(x)
    x = ResBlock(widths[3])([x, t])
    x = attend(x, widths[3])
    x = ResBlock(widths[3])([x, t])
    for level, width in reversed(list(enumerate(widths))):
        for _ in range(3):
            x = LAYERS.Concatenate()([x, skips.pop()])
            x = ResBlock(width)([x, t])
            if level < 3:
                x = attend(x, width)
        if level > 0:
            x = Upsample(width)(x)
    x = GroupNormalization(epsilon=1e-5)(x)
    x = PaddedConv2D(4, kernel_size=3, padding=1)(_swish()(x))
    return keras.Model([latent, inputs_time, inputs_context], x)


def small_text_encoder(
    version: int, vocabulary: int = SMALL_VOCABULARY, width: int = 48, depth: int = 3, heads: int = 2
) -> Any:
    tokens = LAYERS.Input((TEXT_LENGTH,), dtype="int32", name="tokens")
    positions = LAYERS.Input((TEXT_LENGTH,), dtype="int32", name="positions")
    activation = quick_gelu if version == 1 else keras.activations.gelu
    x = CLIPEmbedding(vocabulary, width, TEXT_LENGTH)([tokens, positions])
    for _ in range(depth):
        x = CLIPEncoderLayer(width, heads, activation=activation)(x)
    x = LAYERS.LayerNormalization(epsilon=1e-5)(x)
    return keras.Model([tokens, positions], x)


def small_vae_decoder(size: int = SIZE, widths: tuple[int, ...] = (32, 64, 96, 96)) -> Any:
    layers: list[Any] = [
        LAYERS.Input((size // 8, size // 8, 4)),
        LAYERS.Rescaling(1.0 / 0.18215),
        PaddedConv2D(4, 1),
        PaddedConv2D(widths[3], 3, padding=1),
        ResnetBlock(widths[3]),
        AttentionBlock(widths[3]),
        ResnetBlock(widths[3]),
    ]
    for level in (3, 2, 1, 0):
        layers += [ResnetBlock(widths[level]) for _ in range(3)]
        if level:
            layers += [LAYERS.UpSampling2D(2), PaddedConv2D(widths[level], 3, padding=1)]
    layers += [GroupNormalization(epsilon=1e-5), _swish(), PaddedConv2D(3, 3, padding=1)]
    return keras.Sequential(layers)


def small_vae_encoder(size: int = SIZE, widths: tuple[int, ...] = (32, 64, 96, 96)) -> Any:
    layers: list[Any] = [LAYERS.Input((size, size, 3)), PaddedConv2D(widths[0], 3, padding=1)]
    for level in range(4):
        layers += [ResnetBlock(widths[level]) for _ in range(2)]
        if level < 3:
            layers.append(PaddedConv2D(widths[level], 3, padding=((0, 1), (0, 1)), strides=2))
    layers += [
        ResnetBlock(widths[3]),
        AttentionBlock(widths[3]),
        ResnetBlock(widths[3]),
        GroupNormalization(epsilon=1e-5),
        _swish(),
        PaddedConv2D(8, 3, padding=1),
        PaddedConv2D(8, 1),
        LAYERS.Lambda(lambda x: x[..., :4] * 0.18215),
    ]
    return keras.Sequential(layers)


def full(part: str, version: int, size: int, vocabulary: int = 49408) -> Any:
    """KerasCV's own class. On Keras 3 its kernels start as zeros, which take less time than random numbers:
    `randomise` replaces all variables.
    """
    if KERAS3:

        def zeros(self: Any, shape: Any, dtype: Any = None) -> Any:
            return keras.ops.zeros(shape, dtype)

        keras.initializers.GlorotUniform.__call__ = zeros
    suffix = "V2" if version == 2 else ""
    if part == "unet":
        cls = _get("diffusion_model", "DiffusionModel" + suffix)
        return cls(size, size, TEXT_LENGTH, download_weights=False)
    if part == "text_encoder":
        cls = _get("text_encoder", "TextEncoder" + suffix)
        return cls(TEXT_LENGTH, vocabulary, download_weights=False)
    if part == "vae_decoder":
        return _get("decoder", "Decoder")(size, size, download_weights=False)
    return _get("image_encoder", "ImageEncoder")(download_weights=False)


def small(part: str, version: int, size: int = SIZE, vocabulary: int | None = None, depth: int = 3) -> Any:
    if part == "unet":
        return small_unet(version, size)
    if part == "text_encoder":
        return small_text_encoder(version, vocabulary or SMALL_VOCABULARY, depth=depth)
    return small_vae_decoder(size) if part == "vae_decoder" else small_vae_encoder(size)


@functools.cache
def _kept(dtype: str, *wanted: Any) -> Any:
    start_anew(dtype)
    return small(*wanted)


def build(
    part: str,
    version: int,
    kind: str = "small",
    size: int = SIZE,
    seed: int = 0,
    vocabulary: int | None = None,
    dtype: str = "float32",
) -> Any:
    """One part with every variable random, so that two swapped biases cannot pass unseen.

    A small one is the same object at each call, with the names of a fresh session.
    """
    if kind == "full":
        model = full(part, version, size, vocabulary or 49408)
    else:
        model = _kept(dtype, part, version, size, vocabulary)
    randomise(model, seed)
    return model


def randomise(model: Any, seed: int) -> None:
    """Kernels at the scale that keeps activations near one, gammas around one, biases small."""
    rng = np.random.default_rng(seed)
    for variable in model.weights:
        shape = tuple(variable.shape)
        values = rng.standard_normal(shape, dtype=np.float32)
        name = variable.name.split("/")[-1].split(":")[0]
        if name == "gamma":
            values = 1 + 0.1 * values
        elif name in ("bias", "beta"):
            values = 0.1 * values
        elif name == "embeddings":
            values = 0.3 * values
        else:
            values /= np.sqrt(np.prod(shape[:-1]))
        dtype = variable.dtype if isinstance(variable.dtype, str) else variable.dtype.name
        variable.assign(values.astype(tf.as_dtype(dtype).as_numpy_dtype))
