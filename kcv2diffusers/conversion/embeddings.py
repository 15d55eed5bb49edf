"""Textual inversion: rows of a token embedding, written as separate files."""

from __future__ import annotations

from collections.abc import Sequence

from kcv2diffusers.pipeline_files import EMBEDDINGS
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.sources.tensor import rows
from kcv2diffusers.targets.safetensors import Entry

_TABLE = "token_embedding.weight"  # suffix of the token embedding's name in diffusers


def embedding_files(text: Match | None, placeholder_tokens: Sequence[str]) -> dict[str, Entry]:
    """Return one file for each placeholder token, for `load_textual_inversion`: {token: (1, width)}.

    The tokens are the last rows of the text encoder's token embedding, in order. The result maps file names
    to entries.
    """
    if text is None or not placeholder_tokens:
        return {}
    table = next(tensor for slot, tensor in text.slots() if slot.target.endswith(_TABLE))
    last, width = table.shape
    count = len(placeholder_tokens)
    return {
        EMBEDDINGS.format("" if count == 1 else f"-{index}"): Entry(
            token, (1, width), rows(table, last - count + index, 1), None
        )
        for index, token in enumerate(placeholder_tokens)
    }
