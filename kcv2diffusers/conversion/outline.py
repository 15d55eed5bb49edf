"""Human-readable outline of a conversion: source, target, size and dtype of each part."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from kcv2diffusers.dtypes import DTYPES
from kcv2diffusers.maps.parts import label
from kcv2diffusers.sources.recognise import Match

SLACK = 32 << 20
"""Bytes on disk reserved for everything that is not weights."""
# Fields of a result that are in the JSON of a dry run only.
PLAN = ("moved", "scheduler", "tokenizer", "dry_run")


@dataclass(frozen=True)
class Moved:
    """The transfer of a part's tensors.

    `source` is a file or folder, with the location of the part inside. `target` is a file in the output
    folder. Sizes are in bytes. `from_dtypes` are the stored dtypes.
    """

    part: str
    source: str
    container: str
    target: str
    tensors: int
    from_bytes: int
    to_bytes: int
    from_dtypes: list[str]
    to_dtype: str

    def text(self) -> str:
        """Return two human-readable lines."""
        return (
            f"  {label(self.part)}: {self.source} ({self.container}) -> {self.target}\n"
            f"    {self.tensors} tensors, {_megabytes(self.from_bytes)} {', '.join(self.from_dtypes)} -> "
            f"{_megabytes(self.to_bytes)} {self.to_dtype}"
        )


def moved(match: Match, target: str, dtype: np.dtype = DTYPES["float32"]) -> Moved:
    """Return the outline of a part that is written as `dtype`."""
    tensors = [tensor for _, tensor in match.slots()]
    return Moved(
        part=match.part,
        source=match.place,
        container=match.source.container,
        target=target,
        tensors=len(tensors),
        from_bytes=sum(tensor.nbytes for tensor in tensors),
        to_bytes=sum(tensor.nbytes // tensor.dtype.itemsize for tensor in tensors) * dtype.itemsize,
        from_dtypes=match.dtypes,
        to_dtype=dtype.name,
    )


def plan_text(
    title: str, parts: Iterable[Moved], files: dict[str, str | None], notes: Collection[str] = ()
) -> str:
    """Return the plan of a dry run: the parts, the origin of other files (None: not written), and notes."""
    told = [f"  {name}: {origin}" for name, origin in files.items() if origin is not None]
    lines = [title, *(part.text() for part in parts), *told, *notes]
    return "\n".join([*lines, "Nothing was written (--dry-run)."])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
