"""Write the four models of stable-diffusion-tensorflow, KerasCV's ancestor, at small widths.

    python make_ancestor.py OUT

OUT/PART.h5 has the weights of a part, OUT/PART.json the digests of what they must become. The models are
written for this test: their classes, attributes and the order of these are those of the ancestor. Each is one
layer of a functional model, as there, so a file holds one list of variables, in the order of the attributes.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import expected
import stack
import tensorflow as tf
from stack import LAYERS, PaddedConv2D, ResBlock, SpatialTransformer, keras

WIDTHS, CONTEXT, HEADS, SIDE = (32, 64, 96, 96), 48, 2, 8


class Downsample(LAYERS.Layer):
    def __init__(self, width: int) -> None:
        super().__init__()
        self.op = PaddedConv2D(width, 3, strides=2, padding=1)

    def call(self, x: Any) -> Any:
        return self.op(x)


class UNetModel(keras.Model):
    """Both Dense layers of the time embedding come before the first convolution."""

    def __init__(self) -> None:
        super().__init__()
        w0, w1, w2, w3 = WIDTHS
        self.time_embed = [LAYERS.Dense(4 * w0), keras.activations.swish, LAYERS.Dense(4 * w0)]
        self.input_blocks: list[list[Any]] = [[PaddedConv2D(w0, 3, padding=1)]]
        for width in (w0, w1, w2):
            self.input_blocks += [[ResBlock(width), self.attention(width)] for _ in range(2)]
            self.input_blocks += [[Downsample(width)]]
        self.input_blocks += [[ResBlock(w3)], [ResBlock(w3)]]
        self.middle_block = [ResBlock(w3), self.attention(w3), ResBlock(w3)]
        self.output_blocks: list[list[Any]] = [[ResBlock(w3)] for _ in range(3)]
        self.output_blocks[-1].append(stack.Upsample(w3))
        for width in (w2, w1, w0):
            self.output_blocks += [[ResBlock(width), self.attention(width)] for _ in range(3)]
            if width != w0:
                self.output_blocks[-1].append(stack.Upsample(width))
        self.out = [
            stack.GroupNormalization(epsilon=1e-5),
            keras.activations.swish,
            PaddedConv2D(4, 3, padding=1),
        ]

    def attention(self, width: int) -> Any:
        return SpatialTransformer(HEADS, width // HEADS)

    def call(self, inputs: Any) -> Any:
        x, t, context = inputs
        for layer in self.time_embed:
            t = layer(t)

        def apply(x: Any, block: list[Any]) -> Any:
            for layer in block:
                more = {"ResBlock": t, "SpatialTransformer": context}.get(type(layer).__name__)
                x = layer(x) if more is None else layer([x, more])
            return x

        kept = []
        for block in self.input_blocks:
            x = apply(x, block)
            kept.append(x)
        x = apply(x, self.middle_block)
        for block in self.output_blocks:
            x = apply(tf.concat([x, kept.pop()], axis=-1), block)
        for layer in self.out:
            x = layer(x)
        return x

    def plain(self) -> list[Any]:
        """The layers that KerasCV has as layers of its model."""
        blocks = [*self.time_embed, *self.out]
        for block in (*self.input_blocks, self.middle_block, *self.output_blocks):
            blocks += [layer.op if isinstance(layer, Downsample) else layer for layer in block]
        return blocks


class CLIPEncoder(LAYERS.Layer):
    def __init__(self) -> None:
        super().__init__()
        self.layers = [stack.CLIPEncoderLayer(CONTEXT, HEADS, activation=stack.quick_gelu) for _ in range(3)]

    def call(self, x: Any) -> Any:
        for layer in self.layers:
            x = layer(x)
        return x


class CLIPTextTransformer(keras.Model):
    def __init__(self) -> None:
        super().__init__()
        self.embeddings = stack.CLIPEmbedding(stack.SMALL_VOCABULARY, CONTEXT, stack.TEXT_LENGTH)
        self.encoder = CLIPEncoder()
        self.final_layer_norm = LAYERS.LayerNormalization(epsilon=1e-5)

    def call(self, inputs: Any) -> Any:
        return self.final_layer_norm(self.encoder(self.embeddings(inputs)))

    def plain(self) -> list[Any]:
        return [self.embeddings, *self.encoder.layers, self.final_layer_norm]


class Decoder(keras.Sequential):
    def __init__(self) -> None:
        super().__init__(stack.small_vae_decoder(8 * SIDE).layers)

    def plain(self) -> list[Any]:
        return list(self.layers)


class Encoder(keras.Sequential):
    def __init__(self) -> None:
        super().__init__(stack.small_vae_encoder(8 * SIDE).layers)

    def plain(self) -> list[Any]:
        return list(self.layers)


def main(arguments: list[str]) -> None:
    out = Path(arguments[0])
    latent = LAYERS.Input((SIDE, SIDE, 4))
    words = [LAYERS.Input((stack.TEXT_LENGTH,), dtype="int32") for _ in range(2)]
    inputs: dict[str, tuple[type[Any], Any]] = {
        "unet": (UNetModel, [latent, LAYERS.Input((WIDTHS[0],)), LAYERS.Input((stack.TEXT_LENGTH, CONTEXT))]),
        "text_encoder": (CLIPTextTransformer, words),
        "vae_decoder": (Decoder, latent),
        "vae_encoder": (Encoder, LAYERS.Input((8 * SIDE, 8 * SIDE, 3))),
    }
    for seed, (part, (cls, given)) in enumerate(inputs.items()):
        inner = cls()
        model = keras.Model(given, inner(given))
        stack.randomise(model, seed)
        model.save_weights(out / f"{part}.h5")
        digests = expected.digests(part, SimpleNamespace(layers=inner.plain()))
        (out / f"{part}.json").write_text(json.dumps(digests))
    (out / "kcv2diffusers.json").write_text(json.dumps(stack.HEADS))


if __name__ == "__main__":
    main(sys.argv[1:])
