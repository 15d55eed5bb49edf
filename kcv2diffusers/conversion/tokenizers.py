"""The tokenizer folders of a pipeline: where each one comes from, and its writing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from kcv2diffusers.errors import Error
from kcv2diffusers.maps.parts import Family, TokenizerFolder
from kcv2diffusers.pipeline.tokenizer_files import (
    TokenizerFiles,
    copy_tokenizer,
    find_copied,
    find_tokenizer,
    write_tokenizer,
)
from kcv2diffusers.pipeline.vocabulary import check_rows, check_tokenizer, homes
from kcv2diffusers.sources.gather import SourcePath
from kcv2diffusers.sources.locate import locate
from kcv2diffusers.sources.recognise import Match


@dataclass(frozen=True)
class PlannedTokenizer:
    """A tokenizer folder to write: a vocabulary of CLIP in `files`, or a copy of the folder `copied`."""

    folder: TokenizerFolder
    length: int
    files: TokenizerFiles | None = None
    copied: Path | None = None
    placeholder_tokens: tuple[str, ...] = ()

    @property
    def origin(self) -> Path | None:
        """Where the tokenizer comes from."""
        return self.files.origin if self.files else self.copied

    def write(self, pipeline: Path) -> None:
        """Write the folder into a pipeline."""
        target = pipeline / self.folder.name
        if self.copied:
            copy_tokenizer(self.copied, target)
        elif self.files:
            write_tokenizer(self.files, target, self.placeholder_tokens, self.length, self.folder.pad)


def plan_tokenizers(
    family: Family,
    matches: Mapping[str, Match],
    named: SourcePath | None,
    given: Sequence[Path],
    placeholder_tokens: Sequence[str],
    only_given: bool,
) -> dict[str, PlannedTokenizer]:
    """Return the tokenizers to write by their part.

    `named` is the source of the vocabulary, else it is searched for in `given`. The `placeholder_tokens` go
    into the first tokenizer. Raises Error if a tokenizer does not match the rows of the token embedding, or
    is missing.
    """
    if placeholder_tokens and (family.tokenizer_part or "") not in matches:
        raise Error("--placeholder-token names rows of a text encoder, and none is given.")
    at = None if named is None else locate(named, parts=())
    planned = {}
    for number, folder in enumerate(family.tokenizers):
        text, tokens = matches.get(folder.part), () if number else tuple(placeholder_tokens)
        if text is None:
            continue
        places = [*homes(text), *given]
        length = text.dims.get("length", 0)
        if folder.copied:
            copied = find_copied(folder.name, places)
            if copied is None and not only_given:
                raise Error(
                    f"No {folder.name}/ found for the {text.label}.\n"
                    f"Give --base PIPELINE, a pipeline that has {folder.name}/."
                )
            planned[folder.part] = PlannedTokenizer(folder, length, copied=copied)
            continue
        if only_given and at is None and not tokens:
            if text.known:
                check_rows(text, text.spec.nominal["vocabulary"], ())
            continue
        files = find_tokenizer(at, places, (folder.name, *folder.also))
        check_tokenizer(text, files, tokens)
        planned[folder.part] = PlannedTokenizer(folder, length, files, placeholder_tokens=tokens)
    return planned
