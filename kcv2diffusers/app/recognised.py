"""What `inspect` found, in words for the page, and what a pipeline would still need."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from kcv2diffusers.hub.address import cached, shown
from kcv2diffusers.maps.parts import Family, family_of, label


def summary(entries: Sequence[dict[str, Any]]) -> str:
    """One line for each part."""
    return "\n".join(map(_line, entries))


def _line(entry: dict[str, Any]) -> str:
    version = "" if entry["version"] == "any" else f" {entry['version'].upper()}"
    keras = f" of Keras {entry['keras_version']}" if entry["keras_version"] else ""
    words = [
        f"{label(entry['part'])}{version}",
        f"{entry['container']}{keras}",
        ", ".join(entry["dtypes"]),
        f"{entry['parameters'] / 1e6:.1f} M parameters",
    ]
    return "; ".join([*words, *_remarks(entry)])


def details(entry: dict[str, Any]) -> str:
    """A few lines about one part: where it is, its sizes, its metadata, and what does not fit."""
    inside = f" ({entry['inside']})" if entry["inside"] else ""
    lines = [f"{label(entry['part'])}: {_named(Path(entry['path']))}{inside}"]
    lines.append(f"  {entry['tensors']} tensors, {entry['bytes'] / 1e9:.2f} GB")
    lines.append("  " + ", ".join(f"{name} {value}" for name, value in sorted(entry["sizes"].items())))
    lines += [f"  {name.rpartition('.')[2]}: {value}" for name, value in entry["metadata"].items()]
    return "\n".join([*lines, *([entry["problems"]] if entry["problems"] else [])])


def _named(path: Path) -> str:
    """The name of a file that says nothing of the server: its address on the Hub, or its last component."""
    return shown(path) if cached(path) else path.name


def needs(entries: Sequence[dict[str, Any]], base: str | None) -> str:
    """Which parts of a pipeline are missing, and where they would come from.

    `base` is the source that the visitor names, None for the default one.
    """
    if not entries:
        return "Nothing was recognised."
    family, lacking, version = _lacking(entries)
    if not lacking:
        return f"None. All parts of a pipeline of {family.label} are there."
    names = ", ".join(map(label, lacking))
    if origin := base or family.bases.get(version):
        return f"{names}. They would come from {origin}."
    remark = family.no_base.get(version, "no version is known from these parts")
    return f"{names}. Name a base; there is no default one: {remark}."


def base_of(entries: Sequence[dict[str, Any]]) -> str | None:
    """The default base, if a part is missing and there is one."""
    family, lacking, version = _lacking(entries)
    return family.bases.get(version) if lacking else None


def _lacking(entries: Sequence[dict[str, Any]]) -> tuple[Family, list[str], str]:
    """The family of the parts, those of its parts that are missing, and the version."""
    held = {entry["part"] for entry in entries}
    family = family_of(held)
    versions = {entry["version"] for entry in entries} - {"any"}
    lacking = [part for part in family.parts if part not in held and part not in family.optional]
    return family, lacking, min(versions) if versions else "any"


def _remarks(entry: dict[str, Any]) -> list[str]:
    found = [] if entry["standard"] else ["of unusual sizes"]
    found += [f"{count} tensors of {kind} left out" for kind, count in entry["left_out"].items()]
    return found + (["incomplete"] if entry["problems"] else [])
