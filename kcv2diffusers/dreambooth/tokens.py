"""Textual inversion: new tokens, whose embeddings are all that is trained.

Gal et al. 2022, arXiv:2208.01618.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from dataclasses import replace

import keras
import numpy as np

from kcv2diffusers.diffusion import Array
from kcv2diffusers.dreambooth.snapshots import current
from kcv2diffusers.errors import Error
from kcv2diffusers.models.base import BaseFiles
from kcv2diffusers.models.text_encoder import CLIPEmbedding
from kcv2diffusers.models.tokenizer import Tokenizer
from kcv2diffusers.pipeline.tokenizer_files import check_placeholders
from kcv2diffusers.sources.recognise import Match

TABLE = "token_embedding.weight"  # suffix of the token embedding's name in diffusers


def name_tokens(files: BaseFiles, tokens: Sequence[str], prompts: Iterable[str]) -> None:
    """Add `tokens` to the tokenizer of a base that is not loaded yet.

    Raises Error for a token that is invalid or in none of the `prompts`, and for a base with embeddings that
    belong to no token.
    """
    own = files.tokenizer.files
    given, known = [*own.placeholder_tokens, *tokens], len(own.vocab) + len(own.placeholder_tokens)
    check_placeholders(given, own.vocab)
    if (rows := files.config.text_encoder.vocabulary) != known:
        raise Error(
            f"--train-token: the base has {rows} token embeddings and its tokenizer {known} tokens.\n"
            "Give its own tokenizer with --tokenizer."
        )
    files.tokenizer = Tokenizer.of_files(replace(own, placeholder_tokens=tuple(given)))
    encoded = [files.tokenizer.encode(prompt) for prompt in prompts]
    for token in tokens:
        if not any(files.tokenizer.special[token] in ids for ids in encoded):
            raise Error(
                f"--train-token {token}: no photo's prompt has this token.\n"
                "Write it into --instance-prompt, with spaces around it."
            )


def add_tokens(text_encoder: keras.Model, tokenizer: Tokenizer, tokens: Sequence[str], start: str) -> None:
    """Freeze `text_encoder` and add a trainable embedding for each of the last `tokens` of its tokenizer.

    It starts as the mean of the embeddings of the words of `start`, or else of the token's own letters.
    """
    text_encoder.trainable = False
    embedding = _embedding(text_encoder)
    assert embedding is not None, "not a text encoder"
    table = current(embedding.token_embedding.embeddings)
    plain = Tokenizer.of_files(replace(tokenizer.files, placeholder_tokens=()))
    ids = [plain.encode(start or token)[1:-1] for token in tokens]
    embedding.add_tokens(np.stack([table[each].mean(0) for each in ids]))
    text_encoder.predict_function = None  # a function compiled before would lack the tokens


def added_tokens(model: keras.Model) -> keras.Variable | None:
    """The embeddings that `add_tokens` has added to a model, if it has."""
    layer = _embedding(model)
    return None if layer is None else layer.added


def with_rows(match: Match, count: int) -> Match:
    """A text encoder with `count` more token embeddings, to lay out a file; their values are not in it."""
    found = {
        slot: replace(tensor, shape=(tensor.shape[0] + count, *tensor.shape[1:]))
        if slot.target.endswith(TABLE)
        else tensor
        for slot, tensor in match.slots()
    }
    dims = {**match.dims, "vocabulary": match.dims["vocabulary"] + count}
    return replace(match, found=found, dims=dims)


def with_added(table: Array, rows: Array) -> Array:
    """The table of token embeddings, and the `rows` that were added."""
    return np.concatenate([table, np.asarray(rows, table.dtype)])


def _embedding(model: keras.Model) -> CLIPEmbedding | None:
    return next((layer for layer in model.layers if isinstance(layer, CLIPEmbedding)), None)
