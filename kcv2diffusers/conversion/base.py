"""The base of a conversion: the source of the parts that are not given."""

from __future__ import annotations

from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from os import PathLike
from pathlib import Path

from kcv2diffusers.errors import Error
from kcv2diffusers.hub.address import SCHEME
from kcv2diffusers.maps.parts import Family, family_of, label
from kcv2diffusers.maps.tables import table_of
from kcv2diffusers.sources.diffusers_pipeline import Component, is_pipeline, read_pipeline
from kcv2diffusers.sources.gather import SourcePath, check_together, gather, left_out, version_of
from kcv2diffusers.sources.locate import locate_all
from kcv2diffusers.sources.recognise import Match


@dataclass(frozen=True)
class Base:
    """Components of a diffusers pipeline, or KerasCV parts, and their paths."""

    paths: Sequence[Path] = ()
    components: Mapping[str, Component] = field(default_factory=dict)
    parts: Mapping[str, Match] = field(default_factory=dict)


def bases_of(base: SourcePath | Sequence[SourcePath] | None) -> list[SourcePath]:
    """Return the given base or bases as a list."""
    return [] if base is None else [base] if isinstance(base, (str, PathLike)) else list(base)


@dataclass(frozen=True)
class Gathered:
    """The parts of a conversion, from the sources and from the base.

    - `family`: the kind of pipeline
    - `matches`: the parts by name, complete and of one model, in the family's order
    - `missing`: the names of the family's parts that are not there
    - `base`, `only_given`: as `find_base` returns them
    - `paths`: the paths of the sources, with that of a sibling
    - `used`: the paths of the base, if parts come from there
    """

    family: Family
    matches: dict[str, Match]
    missing: list[str]
    base: Base
    only_given: bool
    paths: list[Path]
    used: list[Path]


def gather_with_base(
    sources: Sequence[SourcePath],
    paths: Sequence[Path],
    named: Mapping[str, SourcePath | None],
    base: SourcePath | Sequence[SourcePath] | None,
    *,
    variant: str | None,
    with_sibling: bool,
    notes: list[str],
    unwanted: Collection[str] = (),
    allow_pickle: bool = False,
    ema: bool = False,
) -> Gathered:
    """Gather the parts of `sources`, which lie at `paths`, and those of `named`.

    The base supplies the rest. The result has none of the `unwanted` parts. Remarks for the user are appended
    to `notes`. Raises Error if parts are missing, incomplete or of different models.
    """
    held = gather(paths, named, allow_pickle=allow_pickle, ema=ema)
    notes += left_out(held)
    beside = find_sibling([*sources, *named.values()], held, with_sibling, notes)
    if beside:
        held |= gather(beside)
    filling, only_given = find_base(base, held, variant, notes, unwanted)
    used = [path for path in filling.paths if filling.parts.keys() - held.keys()]
    held = {part: match for part, match in {**filling.parts, **held}.items() if part not in unwanted}
    family = family_of(held)
    missing = [part for part in family.parts if part not in held]
    lacking = [part for part in missing if part not in unwanted and part not in family.optional]
    check_family(family, held)
    check_missing(family, held, lacking, only_given, notes)
    matches = check_together({p: held[p].require_complete() for p in family.parts if p in held})
    return Gathered(family, matches, missing, filling, only_given, [*paths, *beside], used)


def find_base(
    base: SourcePath | Sequence[SourcePath] | None,
    parts: Mapping[str, Match],
    variant: str | None,
    notes: list[str],
    unwanted: Collection[str] = (),
) -> tuple[Base, bool]:
    """Return the base for the given `parts`, and whether only these are to be written (`base` is "none").

    The base does not supply `unwanted` parts. If `base` is None and parts are missing, the default base of
    the parts' version is used, if it has one; a line about this is added to `notes`. Raises Error for an
    invalid combination of bases.
    """
    bases = bases_of(base)
    if "none" in map(str, bases):
        if len(bases) > 1:
            raise Error("--base none cannot be combined with another --base.")
        return Base(), True
    family = family_of(parts)
    missing = [part for part in family.parts if part not in parts and part not in unwanted]
    unusual = [match.part for match in parts.values() if not match.known]
    paths: list[Path] = []
    if bases:
        needed = [*missing, *unusual]
        paths = [path for b in bases for path in locate_all(b, pipelines=True, parts=needed, variant=variant)]
    elif missing and not unusual and (default := family.bases.get(version_of(parts))):
        from kcv2diffusers.hub.download import default_base

        for match in parts.values():
            match.require_complete()
        paths = [default_base(default, missing, variant)]
        notes.append(f"{', '.join(map(label, missing))}: from the default --base, {default}.")
    folders = [path for path in paths if is_pipeline(path)]
    if not folders:
        return Base(paths, parts=gather(paths)), False
    if len(paths) > 1:
        raise Error("Give one pipeline folder as --base, or KerasCV files, not both.")
    wanted = {table_of(part).folder for part in (*missing, *unusual)}
    components = read_pipeline(folders[0], wanted, variant)
    found = {part: match for component in components.values() for part, match in component.parts.items()}
    return Base(paths, components, found), False


def find_sibling(
    sources: Sequence[SourcePath | None], parts: Mapping[str, Match], wanted: bool, notes: list[str]
) -> list[Path]:
    """Return the text encoder's checkpoint from the repository beside an hf:// source that has none.

    If it is not `wanted`, the result is empty and the checkpoint is only proposed in `notes`. Raises Error if
    it is wanted and there is none.
    """
    text = family_of(parts).tokenizer_part
    if text is None or text in parts:
        return []
    for source in sources:
        if isinstance(source, str) and source.startswith(SCHEME):
            from kcv2diffusers.hub.download import sibling

            if (found := sibling(source, certain=wanted)) and wanted:
                return locate_all(found, parts={text})
            if found:
                notes.append(f"{found} exists: --with-sibling takes the {label(text)} from there.")
    if wanted:
        raise Error(f"--with-sibling: no hf:// source has a {label(text)} in a repository beside it.")
    return []


def check_family(family: Family, parts: Mapping[str, Match]) -> None:
    """Raise Error if a part belongs to another kind of pipeline than most of them."""
    strange = next((match for part, match in parts.items() if part not in family.parts), None)
    if strange is not None:
        own = next(match for part, match in parts.items() if part in family.parts)
        raise Error(
            f"{strange.place} ({strange.label}) and {own.place} ({own.label}) do not belong together.\n"
            f"One is of {family_of([strange.part]).label}, the other of {family.label}: give parts of one."
        )


def check_missing(
    family: Family, parts: Mapping[str, Match], missing: Sequence[str], only_given: bool, notes: Sequence[str]
) -> None:
    """Raise Error if parts of the pipeline are missing, or, if `only_given`, parts of a given component."""
    if not parts:
        raise Error("Nothing to convert: give checkpoint files or folders.")
    if missing and not only_given:
        remark = family.no_base.get(version_of(parts))
        raise Error(
            f"A pipeline still needs: {', '.join(map(label, missing))}.\n"
            + "".join(f"{note}\n" for note in notes)
            + f"Give {_options(missing)}, or --base PIPELINE{f' ({remark})' if remark else ''} to take them "
            "from there; --base none writes only the rest."
        )
    for part in missing:
        table = table_of(part)
        if not parts.keys().isdisjoint(table.parts):
            both = " and ".join(map(label, table.parts))
            raise Error(
                f"{table.folder}/ needs {both}, and the {label(part)} is missing.\nGive {_options([part])}."
            )


def _options(parts: Sequence[str]) -> str:
    return " ".join(f"--{part.replace('_', '-')} SRC" for part in parts)
