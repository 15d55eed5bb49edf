"""CLIP's text encoder as in Stable Diffusion 1 and 2, weight-compatible with KerasCV's."""

from __future__ import annotations

from typing import Any

import keras
from keras import ops

from kcv2diffusers.diffusion import Array
from kcv2diffusers.models.config import TextEncoderConfig
from kcv2diffusers.models.layers import (
    ACTIVATIONS,
    Block,
    Composite,
    Tensor,
    attention,
    dense,
    dtype_policy,
    layer_norm,
)


class CLIPEmbedding(keras.layers.Layer):  # type: ignore[misc]
    """Sum of token and position embeddings: (batch, length) integers to (batch, length, width).

    `added` are embeddings of further tokens, whose ids follow those of the vocabulary.
    """

    def __init__(self, vocabulary: int, width: int, max_length: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.token_embedding = keras.layers.Embedding(vocabulary, width)
        self.position_embedding = keras.layers.Embedding(max_length, width)
        self.added: keras.Variable | None = None

    def call(self, inputs: list[Tensor]) -> Tensor:
        tokens, positions = inputs
        embedded = self.token_embedding(tokens) if self.added is None else self._with_added(tokens)
        return embedded + self.position_embedding(positions)

    def add_tokens(self, rows: Array) -> None:
        """Add a trainable embedding for each of `rows` (tokens, width) float32, its first value.

        The other embeddings are frozen.
        """
        self.trainable = True
        self.token_embedding.trainable = self.position_embedding.trainable = False
        self._tracker.unlock()
        self.added = self.add_weight(name="embeddings", shape=rows.shape, dtype="float32")
        self._tracker.lock()
        self.added.assign(rows)

    def _with_added(self, tokens: Tensor) -> Tensor:
        first = self.token_embedding.input_dim
        own = self.token_embedding(ops.minimum(tokens, first - 1))
        added = ops.take(ops.convert_to_tensor(self.added), ops.maximum(tokens - first, 0), axis=0)
        return ops.where((tokens >= first)[..., None], ops.cast(added, own.dtype), own)


class CLIPEncoderLayer(Block):
    """Causal self-attention and a feed-forward layer, each pre-normalised and with a residual connection."""

    def __init__(self, width: int, heads: int, activation: str, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.layer_norm1 = layer_norm()
        self.clip_attn = CLIPAttention(width, heads)
        self.layer_norm2 = layer_norm()
        self.fc1 = dense(4 * width)
        self.fc2 = dense(width)
        self.activation = ACTIVATIONS[activation]

    def compute(self, inputs: Tensor) -> Tensor:
        x = inputs + self.clip_attn(self.layer_norm1(inputs))
        return x + self.fc2(self.activation(self.fc1(self.layer_norm2(x))))


class CLIPAttention(Composite):
    """Causal multi-head self-attention: each token attends to itself and to the tokens before it."""

    def __init__(self, width: int, heads: int, **kwargs: Any) -> None:
        super().__init__(**kwargs)
        self.heads = heads
        self.q_proj = dense(width)
        self.k_proj = dense(width)
        self.v_proj = dense(width)
        self.out_proj = dense(width)

    def call(self, inputs: Tensor) -> Tensor:
        query, key, value = self.q_proj(inputs), self.k_proj(inputs), self.v_proj(inputs)
        return self.out_proj(attention(query, key, value, self.heads, causal=True))


def build_text_encoder(config: TextEncoderConfig, dtype: str | None = None) -> keras.Model:
    """The text encoder as a Keras model with random weights.

    Inputs, by name: `tokens` and `positions`, both (batch, length) int32, length up to `config.max_length`.
    Output: (batch, length, `config.width`). `dtype` is a Keras dtype policy; default: the global one.
    """
    with dtype_policy(dtype):
        tokens = keras.Input((None,), dtype="int32", name="tokens")
        positions = keras.Input((None,), dtype="int32", name="positions")
        x = CLIPEmbedding(config.vocabulary, config.width, config.max_length)([tokens, positions])
        for _ in range(config.layers):
            x = CLIPEncoderLayer(config.width, config.heads, config.activation)(x)
        return keras.Model([tokens, positions], layer_norm()(x), name="text_encoder")
