"""What a checkpoint holds, found from its contents."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from os import PathLike
from pathlib import Path
from typing import Any

from kcv2diffusers.errors import plain
from kcv2diffusers.hub.address import shown
from kcv2diffusers.maps.parts import label
from kcv2diffusers.pipeline.modelspec import PREFIX
from kcv2diffusers.sources.leftovers import summary
from kcv2diffusers.sources.locate import locate_all
from kcv2diffusers.sources.open import open_all
from kcv2diffusers.sources.recognise import recognise_all

_LENGTH = 400  # characters of a text from a file's metadata
# The metadata that are shown, by their names in modelspec.
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
    """One part: `sizes` are the symbols of its weight map, `problems` the report if it is incomplete.

    `inside` is where in the checkpoint it is ("" for the root). `left_out` says of the whole checkpoint how
    many tensors of which kind are of no part, such as optimizer state. `metadata` are what a single file says
    of itself: title, hash, trigger phrase and the like.
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

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        return {k: v for k, v in asdict(self).items() if k != "rest"} | {"path": str(self.path)}

    def text(self) -> str:
        """A few lines for a person."""
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


def inspect(source: str | PathLike[str], *, allow_pickle: bool = False) -> list[Inspected]:
    """What is at `source`: one entry for each part. Raises SourceError for what cannot be read.

    `allow_pickle` is as in `convert`.
    """
    found = []
    for match in recognise_all(open_all(locate_all(source), allow_pickle=allow_pickle)):
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
                sizes=match.dims,
                standard=match.known,
                problems=match.report() if match.problems or match.strangers else None,
                inside=opened.inside,
                left_out={kind: len(tensors) for kind, tensors in match.leftovers.items()},
                rest=summary(match.leftovers),
                metadata={n: opened.metadata[n][:_LENGTH] for n in _METADATA if n in opened.metadata},
            )
        )
    return found
