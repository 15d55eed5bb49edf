"""Collect the parts of a model from several sources: one source a part, and all parts of the same model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace
from os import PathLike
from pathlib import Path

from kcv2diffusers.errors import Error
from kcv2diffusers.hub.address import shown
from kcv2diffusers.maps.parts import family_of, label
from kcv2diffusers.maps.tables import spec
from kcv2diffusers.sources.diffusers_pipeline import is_pipeline, read_pipeline
from kcv2diffusers.sources.leftovers import summary
from kcv2diffusers.sources.locate import locate_all
from kcv2diffusers.sources.open import open_all
from kcv2diffusers.sources.recognise import Match, recognise_all
from kcv2diffusers.sources.source import Style

SourcePath = str | PathLike[str]


def gather(
    paths: Sequence[Path],
    named: Mapping[str, SourcePath | None] | None = None,
    *,
    allow_pickle: bool = False,
    ema: bool = False,
) -> dict[str, Match]:
    """The matches by part, from the checkpoints at `paths` and from `named`, which maps a part to its source.

    A named source replaces the same part of a single file. `allow_pickle` and `ema` are as in
    `open_sources`. Raises Error if two sources hold the same part, or if a named source lacks its part.
    """
    parts: dict[str, Match] = {}
    for match in recognise_all(open_all(paths, allow_pickle=allow_pickle, ema=ema)):
        add_part(parts, match)
    for part, given in (named or {}).items():
        if given is None:
            continue
        located = locate_all(given, parts={part})
        matches = recognise_all(open_all(located, allow_pickle=allow_pickle, ema=ema))
        fitting = [match for match in matches if match.part == part]
        if not fitting:
            held = " and a ".join(match.label for match in matches)
            raise Error(
                f"{given}: holds a {held}, not a {label(part)}.\n"
                f"Omit --{part.replace('_', '-')}: parts are detected from the file."
            )
        for match in fitting:
            if part in parts and parts[part].source.style is Style.NAMED:
                del parts[part]  # it came from a single file
            add_part(parts, match)
    return parts


def parts_of(source: SourcePath, components: Sequence[str] | None = None) -> dict[str, Match]:
    """The matches by part at one source: a diffusers pipeline, or checkpoints.

    Of a pipeline only those of the folders `components` (None: all) are read. Raises Error as `gather`.
    """
    paths = locate_all(source, pipelines=True)
    found = gather([path for path in paths if not is_pipeline(path)])
    for path in filter(is_pipeline, paths):
        for component in read_pipeline(path, components).values():
            found |= component.parts
    return found


def add_part(parts: dict[str, Match], match: Match) -> None:
    """Add `match` to `parts`. Raises Error if `parts` already has a source for its part."""
    if match.part in parts:
        first = parts[match.part]
        remedy = "Give only one of them."
        if first.source.path == match.source.path:
            remedy = "Save the one that is wanted in a file of its own (save_weights of that model)."
        raise Error(f"Two {match.label}s: {first.place} and {match.place}.\n{remedy}")
    parts[match.part] = match


def check_together(parts: Mapping[str, Match]) -> dict[str, Match]:
    """Check that the parts belong to one model and return them.

    A part whose version its sizes do not determine gets the version of another part, which its family names.
    Raises Error for parts of different models.
    """
    family = family_of(parts)
    for same in family.agreements:
        one, other = parts.get(same.part), parts.get(same.other)
        if one and other and one.dims[same.size] != other.dims[same.other_size]:
            raise Error(
                f"{_sized(one, same.size)} and {_sized(other, same.other_size)} do not belong together.\n"
                f"Give a {one.label} and a {other.label} of the same model."
            )
    checked = dict(parts)
    for part, telling in family.version_of.items():
        if part in parts and telling in parts and not parts[part].known:
            checked[part] = replace(parts[part], spec=spec(part, parts[telling].version))
    return checked


def _sized(match: Match, size: str) -> str:
    version = "" if match.version == "any" else f" {match.version.upper()}"
    return f"{match.source.path} ({match.label}{version}, {size} {match.dims[size]})"


def left_out(parts: Mapping[str, Match]) -> list[str]:
    """A message line for each checkpoint that has tensors outside of all parts."""
    found = {m.source.path: m.leftovers for m in parts.values() if m.leftovers}
    return [f"Left out of {shown(path)}: {summary(leftovers)}." for path, leftovers in found.items()]


def version_of(parts: Mapping[str, Match]) -> str:
    """The version of the parts: "sd1", "sd2", or "any" if none determines it."""
    return next((match.version for match in parts.values() if match.version != "any"), "any")
