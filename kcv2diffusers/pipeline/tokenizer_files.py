"""The `tokenizer/` folder of a pipeline, which gives prompts the token ids that KerasCV trained with.

KerasCV's `SimpleTokenizer` pads with `<|endoftext|>` for Stable Diffusion 1 and 2. It gives placeholder
tokens the ids that follow the vocabulary. The folder written here does the same, whatever the source
tokenizer does (Stable Diffusion 2's own tokenizer pads with "!").

Ids were compared with keras_cv 0.9.0 for transformers 5.23 `CLIPTokenizer`, 4.57 `CLIPTokenizerFast` and
4.57 `CLIPTokenizer`. They are equal for ordinary prompts: ASCII, composed accents, digits, punctuation,
contractions, Cyrillic, Greek, Arabic, Devanagari, Thai, Hangul, kana, Han and emoji (in 5.23 each of the
78,004 assigned NFC characters below U+20000 was tested within a prompt). They differ for

* HTML entities: KerasCV unescapes twice ("&amp;" is "&"), transformers does not;
* text that Unicode normalisation (NFC) changes, such as "e" + U+0301: only transformers composes it;
* a capital sigma that ends a word, and U+017F after an apostrophe (not in 4.57 `CLIPTokenizer`);
* a placeholder or `<|endoftext|>` directly after punctuation: in "(<my-cat>)" only transformers matches it;
  and a placeholder made of letters within a word ("sks" in "asks"): only transformers matches it. Put spaces
  around placeholders.
* 4.57 `CLIPTokenizer` (not Fast) only: it does not match a placeholder typed in capitals. Without ftfy it
  splits Han text into single characters and drops control and zero-width characters, including those that
  join emoji. With ftfy it straightens curly quotes and expands ligatures and full-width letters.

No setting in the folder changes this: transformers takes its text rules from the class, not from the files.
"""

from __future__ import annotations

import codecs
import gzip
import html
import importlib.util
import io
import json
import os
import zlib
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from kcv2diffusers.errors import Error, SourceError, TargetError
from kcv2diffusers.json_text import parse_object
from kcv2diffusers.pipeline_files import KERAS_VOCABULARY, TOKENIZER, TOKENIZER_FILES

BOS, EOS = "<|startoftext|>", "<|endoftext|>"
BPE_NAME = "bpe_simple_vocab_16e6.txt.gz"
MERGES = 49152 - 256 - 2  # CLIP's file lists 262,144 merges. CLIP and KerasCV use the first `MERGES`.
LIMIT = 16 << 20  # The largest genuine file has about 4 MB. A small .gz file can unpack to any size.


@dataclass(frozen=True)
class TokenizerFiles:
    """A CLIP vocabulary, its merges ("a b"), and the placeholder tokens whose ids follow the vocabulary."""

    vocab: dict[str, int]
    merges: list[str]
    placeholder_tokens: tuple[str, ...]
    origin: Path


def find_tokenizer(
    source: Path | None = None, folders: Iterable[Path] = (), names: Sequence[str] = (TOKENIZER,)
) -> TokenizerFiles:
    """Read the tokenizer at `source`, else the first one found.

    Searched are the folders `names` in each of `folders` (or beside it, if it is a file), then KerasCV's
    cache, then an installed open_clip or clip. Raises Error if none is found, SourceError for an invalid one.
    """
    if source is not None:
        return _open(source)
    for path in _candidates(folders, names):
        if path.is_file() or path.is_dir():
            return _open(path)
    raise Error(
        "no CLIP vocabulary found for the pipeline's tokenizer; provide one with\n"
        f"  --tokenizer FOLDER|{BPE_NAME}, or\n"
        "  --base PIPELINE (its tokenizer/ folder is used), or\n"
        "  pip install --no-deps open_clip_torch (it ships the file)"
    )


def write_tokenizer(
    files: TokenizerFiles,
    folder: Path,
    placeholder_tokens: Sequence[str] = (),
    model_max_length: int = 77,
    pad: str | None = None,
) -> None:
    """Write a `CLIPTokenizer` folder. `placeholder_tokens` get the ids after those that `files` already has.

    `pad` is the padding token (None: the end-of-text token). transformers then gives its id to that text in a
    prompt too.

    Raises Error for an invalid placeholder token, TargetError if the folder cannot be written.
    """
    placeholders = [*files.placeholder_tokens, *placeholder_tokens]
    check_placeholders(placeholders, files.vocab)
    added = {token: len(files.vocab) + n for n, token in enumerate(placeholders)}
    special = {"bos_token": BOS, "eos_token": EOS, "unk_token": EOS, "pad_token": pad or EOS}
    # "normalized": transformers searches for the token in the lower-cased prompt, as KerasCV does.
    flags = {"lstrip": False, "normalized": True, "rstrip": False, "single_word": False}
    ids = {token: files.vocab[token] for token in dict.fromkeys(special.values())} | added
    config = {
        "added_tokens_decoder": {
            str(ids[token]): {"content": token, **flags, "special": token not in added} for token in ids
        },
        **special,
        "add_prefix_space": False,
        "clean_up_tokenization_spaces": True,
        "do_lower_case": True,
        "errors": "replace",
        "model_max_length": model_max_length,
        "tokenizer_class": "CLIPTokenizer",
    }
    texts = {
        "vocab.json": json.dumps(
            dict(sorted(files.vocab.items(), key=lambda item: item[1])), ensure_ascii=False
        ),
        "merges.txt": "\n".join(["#version: 0.2", *files.merges, ""]),
        "special_tokens_map.json": json.dumps(special, indent=2) + "\n",
        "tokenizer_config.json": json.dumps(config, indent=2) + "\n",
    }
    if added:  # Read only by transformers before 4.34.
        texts["added_tokens.json"] = json.dumps(added, indent=2) + "\n"
    try:
        folder.mkdir(parents=True, exist_ok=True)
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8", newline="\n")
    except OSError as error:
        raise TargetError(f"{folder}: cannot be written: {error.strerror or error}") from error


def copy_tokenizer(source: Path, folder: Path) -> None:
    """Copy the files of a tokenizer folder, without byte-order marks. Does nothing if there are none.

    Raises SourceError for a file over 16 MiB.
    """
    found = [path for name in TOKENIZER_FILES if (path := source / name).is_file()]
    if found:
        folder.mkdir()
    for path in found:
        if path.stat().st_size > LIMIT:
            raise SourceError(path, "is too large for a tokenizer (over 16 MiB)")
        (folder / path.name).write_bytes(path.read_bytes().removeprefix(codecs.BOM_UTF8))


def find_copied(name: str, folders: Iterable[Path]) -> Path | None:
    """Return the tokenizer folder `name` that is in one of `folders`, or beside it if it is a file."""
    found = ((folder.parent if folder.is_file() else folder) / name for folder in folders)
    return next((folder for folder in found if folder.is_dir()), None)


def _candidates(folders: Iterable[Path], names: Sequence[str]) -> Iterator[Path]:
    """Yield the paths where a tokenizer may be, best first."""
    for folder in folders:
        yield from ((folder.parent if folder.is_file() else folder) / name for name in names)
    if home := os.environ.get("KERAS_HOME"):
        yield Path(home, "datasets", BPE_NAME)
    with suppress(RuntimeError):  # A user without a home folder.
        yield Path.home() / ".keras" / "datasets" / BPE_NAME
    for package in ("open_clip", "clip"):
        with suppress(ValueError):  # A partially imported module has no spec.
            spec = importlib.util.find_spec(package)
            for location in (spec and spec.submodule_search_locations) or ():
                yield Path(location, BPE_NAME)


def _open(path: Path) -> TokenizerFiles:
    """Read a tokenizer file or folder of any supported kind."""
    if path.is_file():
        return _from_tokenizer_json(path) if path.name == "tokenizer.json" else _from_bpe(path)
    for folder in (path, path / "tokenizer"):
        for name in ("vocab.json", KERAS_VOCABULARY):
            if (folder / name).is_file() and (folder / "merges.txt").is_file():
                return _from_folder(folder, name)
        if (folder / "tokenizer.json").is_file():  # The only vocabulary file that transformers 5 saves.
            return _from_tokenizer_json(folder / "tokenizer.json")
    problem = "holds no vocab.json with merges.txt" if path.is_dir() else "no such file or folder"
    raise SourceError(path, problem, f"Give a tokenizer folder, a pipeline folder or {BPE_NAME}.")


def _from_bpe(path: Path) -> TokenizerFiles:
    """Read CLIP's list of merges, which defines the vocabulary.

    The vocabulary is, in this order: bytes, bytes at the end of a word, merges, special tokens.
    """
    header, *merges = _lines(path)[: MERGES + 1]
    if "#version" not in header:
        raise SourceError(
            path, f"is not CLIP's {BPE_NAME}", "A folder with vocab.json and merges.txt works too."
        )
    # Printable bytes map to themselves and come first. The others map to characters from U+0100 on.
    printing = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    letters = [chr(code) for code in [*printing, *range(0x100, 0x200 - len(printing))]]
    tokens = [*letters, *(letter + "</w>" for letter in letters)]
    tokens += [*(merge.replace(" ", "") for merge in merges), BOS, EOS]
    return _checked(path, {token: n for n, token in enumerate(tokens)}, merges, [])


def _from_folder(folder: Path, name: str) -> TokenizerFiles:
    """Read a folder written by `CLIPTokenizer.save_pretrained` of transformers 4, or by KerasHub."""
    merges = [line for line in _lines(folder / "merges.txt") if line and not line.startswith("#version")]
    added: list[tuple[object, object]] = []
    with suppress(FileNotFoundError):
        added += [(n, token) for token, n in _object(folder / "added_tokens.json").items()]
    with suppress(FileNotFoundError):
        decoder = _object(folder / "tokenizer_config.json").get("added_tokens_decoder")
        entries = decoder.items() if isinstance(decoder, dict) else ()
        added += [(n, _get(entry, "content")) for n, entry in entries]
    return _checked(folder, _object(folder / name), merges, added)


def _from_tokenizer_json(path: Path) -> TokenizerFiles:
    """Read a file written by `CLIPTokenizer.save_pretrained` of transformers 5."""
    data = _object(path)
    vocab, merges = (_get(data.get("model"), key) for key in ("vocab", "merges"))
    if not isinstance(vocab, dict) or not isinstance(merges, list):
        raise SourceError(path, "is not a CLIP tokenizer: it has no vocabulary with merges")
    pairs = [" ".join(map(str, merge)) if isinstance(merge, list) else str(merge) for merge in merges]
    entries = data.get("added_tokens")
    entries = entries if isinstance(entries, list) else []
    added = [(_get(entry, "id"), _get(entry, "content")) for entry in entries]
    return _checked(path, vocab, pairs, added)


def _checked(
    path: Path, vocab: dict[str, Any], merges: list[str], added: Iterable[tuple[object, object]]
) -> TokenizerFiles:
    """Raise SourceError for an invalid vocabulary, and for ids that the model has no embeddings for."""
    ids = list(vocab.values())
    if any(type(n) is not int for n in ids) or sorted(ids) != list(range(len(ids))):
        raise SourceError(path, "is not a vocabulary: its ids are not 0, 1, 2, ... each once")
    if missing := [token for token in (BOS, EOS) if token not in vocab]:
        raise SourceError(path, f"is not a CLIP vocabulary: it has no {' and no '.join(missing)}")
    try:
        "".join(vocab).encode()
    except UnicodeEncodeError:
        raise SourceError(path, "is not a vocabulary: a token is not valid Unicode") from None
    for n, merge in enumerate(merges, 1):
        parts = merge.split(" ")
        if len(parts) != 2 or not all(part and part in vocab for part in [*parts, "".join(parts)]):
            raise SourceError(path, f"merge {n}, {merge[:40]!r}, is not two tokens that make a third")
    placeholders: dict[int, str] = {}
    for key, token in added:
        digits = str(key)[:9]  # More digits than any id has, and few enough for int().
        if not isinstance(token, str) or not digits.isdecimal():
            raise SourceError(path, "has an added token without a text or a number")
        if vocab.get(token) != int(digits):
            placeholders[int(digits)] = token
    if sorted(placeholders) != list(range(len(vocab), len(vocab) + len(placeholders))):
        raise SourceError(path, "the ids of its added tokens do not follow the vocabulary's")
    return TokenizerFiles(vocab, merges, tuple(placeholders[n] for n in sorted(placeholders)), path)


def check_placeholders(tokens: Sequence[str], vocab: Mapping[str, int]) -> None:
    """Raise Error for a placeholder that KerasCV's `SimpleTokenizer` would not encode as its single id."""
    earlier = [BOS, EOS]  # KerasCV tries its special tokens in this order and uses the first match.
    for token in tokens:
        shadow = next((other for other in earlier if token.startswith(other)), None)
        problem = None
        if not token or any(character.isspace() for character in token):
            problem = "is empty or has white space in it"
        elif token in earlier[2:]:
            problem = "is given twice"
        elif token in vocab:
            problem = f"is already in the vocabulary, with id {vocab[token]}"
        elif not (token.isascii() and token.isprintable()):
            problem = "is not plain ASCII, which KerasCV never matches"
        elif token != token.lower():
            problem = (
                f"has capitals, which KerasCV never matches: it lower-cases prompts. Use {token.lower()!r}"
            )
        elif token != html.unescape(html.unescape(token)):
            problem = "has an HTML entity in it, which KerasCV replaces before it looks for the token"
        elif shadow:
            problem = f"starts with {shadow!r}, which comes before it and which KerasCV would match instead"
        if problem:
            raise Error(f"placeholder token {token!r} {problem}")
        earlier.append(token)


def _read(path: Path) -> bytes:
    """Return the bytes of a file of at most `LIMIT` bytes, decompressed if it is gzip."""
    try:
        with path.open("rb") as raw:
            stream: io.BufferedIOBase = gzip.GzipFile(fileobj=raw) if raw.peek(2)[:2] == b"\x1f\x8b" else raw
            data = stream.read(LIMIT + 1)
        if len(data) > LIMIT:
            raise SourceError(path, "is too large for a CLIP vocabulary (over 16 MiB)")
        return data
    except FileNotFoundError:
        raise
    except (OSError, EOFError, zlib.error) as error:
        raise SourceError(path, f"cannot be read: {error}") from error


def _lines(path: Path) -> list[str]:
    try:
        text = _read(path).decode("utf-8-sig")
    except UnicodeDecodeError:
        raise SourceError(path, "is not a text file") from None
    return text.replace("\r\n", "\n").split("\n")  # Not splitlines, which also splits at U+0085 and others.


def _object(path: Path) -> dict[str, Any]:
    data = parse_object(_read(path))
    if data is None:
        raise SourceError(path, "is not a JSON object")
    return data


def _get(data: object, key: str) -> Any:
    return data.get(key) if isinstance(data, dict) else None
