"""CLIP's byte-pair tokenizer: prompts to token ids.

`kcv2diffusers.pipeline.tokenizer_files` reads and writes its files. The ids are those of OpenAI's tokenizer.
KerasCV's `SimpleTokenizer` and transformers' `CLIPTokenizer` give the same ids; neither is needed here.
"""

from __future__ import annotations

import html
import itertools
import unicodedata
from collections.abc import Iterator, Sequence
from pathlib import Path

from kcv2diffusers.errors import Error, is_unicode, plain
from kcv2diffusers.pipeline.tokenizer_files import BOS, EOS, TokenizerFiles

_SHOWN = 200  # characters of a text, in an error
CONTRACTIONS = ("'s", "'t", "'re", "'ve", "'m", "'ll", "'d")


class Tokenizer:
    """Text to token ids and back.

    `vocabulary` maps a token to its id; a token that ends a word carries `</w>`. `merges` are the pairs of
    tokens to join, highest priority first. `placeholders` (textual inversion) get the ids after the
    vocabulary.
    """

    def __init__(
        self,
        vocabulary: dict[str, int],
        merges: list[tuple[str, str]],
        placeholders: Sequence[str] = (),
    ) -> None:
        self.vocabulary, self.placeholders = vocabulary, tuple(placeholders)
        ids = vocabulary | {token: len(vocabulary) + n for n, token in enumerate(placeholders)}
        self.special = {token: ids[token] for token in (BOS, EOS, *placeholders)}
        self.texts = {index: token for token, index in ids.items()}
        self.ranks = {pair: rank for rank, pair in enumerate(merges)}
        self.start, self.end = vocabulary[BOS], vocabulary[EOS]

    @classmethod
    def of_files(cls, files: TokenizerFiles) -> Tokenizer:
        """A tokenizer from the files that `find_tokenizer` has read."""
        pairs = [tuple(merge.split(" ")) for merge in files.merges]
        return cls(files.vocab, [(first, second) for first, second in pairs], files.placeholder_tokens)

    @property
    def files(self) -> TokenizerFiles:
        """The tokenizer's files, as `write_tokenizer` takes them."""
        merges = [" ".join(pair) for pair in self.ranks]
        return TokenizerFiles(self.vocabulary, merges, self.placeholders, Path())

    @classmethod
    def of_words(cls, words: list[str]) -> Tokenizer:
        """A tokenizer for which each of `words` is one token; other words are split into several pieces.

        Ids are in the order of OpenAI's tokenizer: bytes, bytes that end a word, merges, start, end.
        """
        tokens = [*BYTES.values(), *(symbol + "</w>" for symbol in BYTES.values())]
        ranks: dict[tuple[str, str], int] = {}
        for word in words:
            # New merges rank below all earlier ones, so words that are already one token stay one token.
            pieces = _merge([*word[:-1], word[-1] + "</w>"], ranks)
            joined = pieces[0]
            for piece in pieces[1:]:
                ranks[joined, piece] = len(ranks)
                joined += piece
        tokens += dict.fromkeys(first + second for first, second in ranks)
        vocabulary = {token: index for index, token in enumerate([*tokens, BOS, EOS])}
        return cls(vocabulary, list(ranks))

    def encode(self, text: str, length: int | None = None) -> list[int]:
        """The ids of `text` between start and end token.

        With `length`, the ids are padded with the end token or cut to that many. Raises Error for text that
        is not valid Unicode.
        """
        if not is_unicode(text):
            raise Error(f"{plain(text)}: a prompt with bytes that are not UTF-8.\nWrite it in UTF-8.")
        ids = [self.start]
        for word in split(text, tuple(self.special)):
            ids += self._spell(word)
        ids.append(self.end)
        if length is not None:
            ids = ids[: length - 1] + [self.end] * max(1, length - len(ids) + 1)
        return ids[:length]

    def encode_within(self, text: str, most: int) -> list[int]:
        """`encode` for a text of at most `most` ids. Raises Error for a longer one."""
        ids = self.encode(text)
        if len(ids) > most:
            shown = text if len(text) <= _SHOWN else text[:_SHOWN] + "..."
            raise Error(f"the prompt has {len(ids)} tokens, at most {most} fit: {shown!r}\nShorten it.")
        return ids

    def decode(self, ids: list[int]) -> str:
        """The text of `ids`, without the start and end tokens."""
        symbols = "".join(self.texts[index] for index in ids if index not in (self.start, self.end))
        return symbols_to_text(symbols)

    def _spell(self, word: str) -> list[int]:
        if word in self.special:
            return [self.special[word]]
        pieces = [BYTES[byte] for byte in word.encode()]
        pieces[-1] += "</w>"
        return [self.vocabulary[piece] for piece in _merge(pieces, self.ranks)]


def _merge(pieces: list[str], ranks: dict[tuple[str, str], int]) -> list[str]:
    """Join the adjacent pair of highest priority, wherever it is, until no pair is in `ranks`."""
    while len(pieces) > 1:
        pairs = itertools.pairwise(pieces)
        rank, first, second = min((ranks.get(pair, len(ranks)), *pair) for pair in pairs)
        if rank == len(ranks):
            break
        pieces = list(_join(pieces, first, second))
    return pieces


def _join(pieces: list[str], first: str, second: str) -> Iterator[str]:
    """`pieces` with each `first` joined to a `second` that follows it."""
    index = 0
    while index < len(pieces):
        if pieces[index : index + 2] == [first, second]:
            yield first + second
            index += 2
        else:
            yield pieces[index]
            index += 1


def split(text: str, special_tokens: Sequence[str] = (BOS, EOS)) -> Iterator[str]:
    """Split `text` into words as CLIP does.

    Words are runs of letters, single digits, runs of anything else, English contractions and special tokens.
    """
    text = " ".join(html.unescape(html.unescape(text)).split()).lower()
    index = 0
    while index < len(text):
        special = next(
            (word for word in (*special_tokens, *CONTRACTIONS) if text.startswith(word, index)), None
        )
        kind = _kind(text[index])
        stop = index + len(special) if special else index + 1
        while not special and kind != "N" and stop < len(text) and _kind(text[stop]) == kind:
            stop += 1
        if kind != " ":
            yield text[index:stop]
        index = stop


def _kind(character: str) -> str:
    """The kind of a character: letter ("L"), number ("N"), space (" ") or "other"."""
    if character.isspace():
        return " "
    category = unicodedata.category(character)[0]
    return category if category in "LN" else "other"


def _byte_symbols() -> dict[int, str]:
    """A printable character for each byte: itself if it is printable, otherwise one from U+0100 on."""
    printable = [*range(0x21, 0x7F), *range(0xA1, 0xAD), *range(0xAE, 0x100)]
    others = [byte for byte in range(256) if byte not in printable]
    return {byte: chr(byte) for byte in printable} | {byte: chr(256 + i) for i, byte in enumerate(others)}


BYTES = _byte_symbols()


def symbols_to_text(symbols: str) -> str:
    """Decode byte symbols to text; `</w>` becomes a space."""
    bytes_of = {symbol: byte for byte, symbol in BYTES.items()}
    words = symbols.split("</w>")
    return " ".join(
        bytes(bytes_of[symbol] for symbol in word).decode(errors="replace") for word in words
    ).strip()
