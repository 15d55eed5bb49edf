"""Checks that a text encoder and a tokenizer match: the token embedding has one row for each token."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kcv2diffusers.errors import Error, SourceError
from kcv2diffusers.pipeline.tokenizer_files import TokenizerFiles
from kcv2diffusers.sources.recognise import Match

_IDS = ("bos_token_id", "eos_token_id", "pad_token_id")


def homes(text: Match) -> list[Path]:
    """Return the folders that may contain the tokenizer of a text encoder, best first."""
    path = text.source.path
    if text.of_pipeline:
        return [path.parent.parent]
    return [path, path.parent] if path.is_dir() else [path.parent]


def check_enough_rows(text: Match, files: TokenizerFiles) -> int:
    """Return the number of tokens of `files`. Raises Error if the text encoder has fewer rows."""
    rows, tokens = text.dims["vocabulary"], len(files.vocab) + len(files.placeholder_tokens)
    if tokens > rows:
        raise Error(
            f"{text.source.path}: {rows} token embeddings, fewer than the {tokens} tokens of "
            f"{files.origin}.\n"
            "Give the text encoder's own tokenizer: --tokenizer FOLDER, or put it into a folder tokenizer/ "
            "beside it."
        )
    return tokens


def check_tokenizer(text: Match, files: TokenizerFiles, placeholder_tokens: Sequence[str] = ()) -> None:
    """Raise Error unless each token (of `files`, then `placeholder_tokens`) has one row and vice versa."""
    check_rows(text, check_enough_rows(text, files), placeholder_tokens)


def check_rows(text: Match, tokens: int, placeholder_tokens: Sequence[str]) -> None:
    """Raise Error unless there is one placeholder token for each row beyond the first `tokens`."""
    extra, given = max(0, text.dims["vocabulary"] - tokens), len(placeholder_tokens)
    if extra == given:
        return
    if given:
        raise Error(
            f"{text.source.path}: {extra} extra token embeddings and {given} --placeholder-token.\n"
            f"Give {extra} of them."
        )
    raise Error(
        f"{text.source.path}: {extra} token embedding{'s' if extra > 1 else ''} beyond the vocabulary's "
        f"{tokens} (textual inversion).\nName {'them' if extra > 1 else 'it'} with "
        f"{extra} time{'s' if extra > 1 else ''} --placeholder-token TOKEN, in order."
    )


def check_ids(path: Path, config: Mapping[str, Any], rows: int) -> None:
    """Raise SourceError if a special token id in a text encoder's config is not one of its `rows` tokens."""
    for name in _IDS:
        value = config.get(name)
        if value is not None and not (type(value) is int and 0 <= value < rows):
            raise SourceError(
                path, f"{name} is {repr(value)[:40]}, the text encoder has {rows} tokens.", "Correct it."
            )
