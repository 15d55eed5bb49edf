"""Inspection of checkpoints: their parts are detected from the contents."""

from __future__ import annotations

from collections.abc import Collection, Sequence
from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from kcv2diffusers.errors import plain
from kcv2diffusers.hub.address import shown
from kcv2diffusers.maps.parts import family_of, label
from kcv2diffusers.pipeline.modelspec import PREFIX
from kcv2diffusers.sources.diffusers_pipeline import is_pipeline, read_pipeline
from kcv2diffusers.sources.leftovers import summary
from kcv2diffusers.sources.locate import locate_all
from kcv2diffusers.sources.open import open_all
from kcv2diffusers.sources.recognise import Match, recognise_all

_LENGTH = 400  # characters kept of a metadata text
# The metadata entries to show: their names in modelspec, and their labels.
_METADATA = {
    f"{PREFIX}{name}": name.replace("_", " ")
    for name in (
        "title",
        "author",
        "date",
        "architecture",
        "prediction_type",
        "resolution",
        "trigger_phrase",
        "usage_hint",
        "tags",
        "license",
        "merged_from",
        "hash_sha256",
    )
}


@dataclass(frozen=True)
class Inspected:
    """One part of a checkpoint.

    `sizes` are the values of its weight map's symbols. `problems` is the report if the part is incomplete.
    `inside` is its location in the checkpoint ("" for the root). `left_out` counts, by kind, the tensors of
    the whole checkpoint that belong to no part, such as optimizer state. `metadata` are those of a single
    file, such as title, hash and trigger phrase. `missing` are the parts that the whole source lacks for a
    pipeline, optional ones included.
    """

    path: Path
    part: str
    version: str
    container: str
    keras_version: str | None
    dtypes: list[str]
    tensors: int
    parameters: int
    bytes: int
    sizes: dict[str, int]
    standard: bool
    problems: str | None
    inside: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    rest: str = ""
    metadata: dict[str, str] = field(default_factory=dict)
    missing: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return {k: v for k, v in asdict(self).items() if k != "rest"} | {"path": str(self.path)}

    def text(self) -> str:
        """Return a few human-readable lines."""
        version = "" if self.version == "any" else f" {self.version.upper()}"
        keras = f", Keras {plain(self.keras_version)}" if self.keras_version else ""
        lines = [
            shown(self.path) + (f" ({plain(self.inside)})" if self.inside else ""),
            f"  {label(self.part)}{version}{'' if self.standard else ' of unusual sizes'}",
            f"  {self.container}{keras}, {', '.join(self.dtypes)}",
            f"  {self.tensors} tensors, {self.parameters / 1e6:.1f} M parameters, {self.bytes / 1e9:.2f} GB",
            "  " + ", ".join(f"{name} {value}" for name, value in sorted(self.sizes.items())),
        ]
        for name, label_of in _METADATA.items():
            if text := self.metadata.get(name):
                lines.append(f"  {label_of}: {plain(' '.join(text.split()))}")
        lines += [f"  not a part: {self.rest}"] if self.rest else []
        return "\n".join([*lines, *([self.problems] if self.problems else [])])


def missing_text(found: Sequence[Inspected]) -> str:
    """Return a line that names the parts that sources lack together for a pipeline; "" if there are none."""
    missing = _missing({entry.part for entry in found})
    if not found or not missing:
        return ""
    optional = family_of(entry.part for entry in found).optional
    names = [f"{label(part)} (optional)" if part in optional else label(part) for part in missing]
    return f"Missing for a pipeline: {', '.join(names)}."


def _missing(held: Collection[str]) -> list[str]:
    return [part for part in family_of(held).parts if part not in held]


def _sizes(match: Match) -> dict[str, int]:
    """Return the sizes, and the number of blocks with each property that only some blocks have."""
    sizes = {name: value for name, value in match.dims.items() if name.isidentifier()}
    blocks = {
        f: sum(v for n, v in match.dims.items() if n.startswith(f"{f}.")) for f in match.spec.table.flags
    }
    return sizes | blocks


def inspect(source: str | PathLike[str], *, allow_pickle: bool = False) -> list[Inspected]:
    """Return one entry for each part at `source`, a diffusers pipeline or checkpoints.

    `allow_pickle` is as in `convert`. Raises SourceError if the source cannot be read.
    """
    paths = locate_all(source, pipelines=True)
    files = [path for path in paths if not is_pipeline(path)]
    matches = recognise_all(open_all(files, allow_pickle=allow_pickle))
    for path in filter(is_pipeline, paths):
        for component in read_pipeline(path, strict=False).values():
            matches += component.parts.values()
    missing = _missing({match.part for match in matches})
    found = []
    for match in matches:
        opened = match.source
        tensors = [tensor for _, tensor in match.slots()]
        found.append(
            Inspected(
                path=opened.path,
                part=match.part,
                version=match.version,
                container=opened.container,
                keras_version=opened.keras_version,
                dtypes=match.dtypes,
                tensors=len(tensors),
                parameters=sum(t.nbytes // t.dtype.itemsize for t in tensors),
                bytes=sum(t.nbytes for t in tensors),
                sizes=_sizes(match),
                standard=match.known,
                problems=match.report() if match.problems or match.strangers else None,
                inside=opened.inside,
                left_out={kind: len(tensors) for kind, tensors in match.leftovers.items()},
                rest=summary(match.leftovers),
                metadata={n: opened.metadata[n][:_LENGTH] for n in _METADATA if n in opened.metadata},
                missing=missing,
            )
        )
    return found
