"""A conversion for a person, before or after it is done: what of which part goes from where to where."""

from __future__ import annotations

from collections.abc import Collection, Iterable
from dataclasses import dataclass

import numpy as np

from kcv2diffusers.dtypes import DTYPES
from kcv2diffusers.maps.parts import label
from kcv2diffusers.sources.recognise import Match

SLACK = 32 << 20
"""Bytes that a conversion may need on disk for everything that is not weights."""
# Entries of a result that only a dry run has in its JSON.
PLAN = ("moved", "scheduler", "tokenizer", "dry_run")


@dataclass(frozen=True)
class Moved:
    """The tensors of a part on their way: `source` is a file or folder, and where in it the part is; `target`
    a file of the output folder. Sizes are in bytes, `from_dtypes` are as stored.
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
        """Two lines."""
        return (
            f"  {label(self.part)}: {self.source} ({self.container}) -> {self.target}\n"
            f"    {self.tensors} tensors, {_megabytes(self.from_bytes)} {', '.join(self.from_dtypes)} -> "
            f"{_megabytes(self.to_bytes)} {self.to_dtype}"
        )


def moved(match: Match, target: str, dtype: np.dtype = DTYPES["float32"]) -> Moved:
    """What becomes of a part that is written as `dtype`."""
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
    """The plan of a dry run: the parts, where other files come from (None: not written), and remarks."""
    told = [f"  {name}: {origin}" for name, origin in files.items() if origin is not None]
    lines = [title, *(part.text() for part in parts), *told, *notes]
    return "\n".join([*lines, "Nothing was written (--dry-run)."])


def _megabytes(size: int) -> str:
    return f"{size / 1e6:.1f} MB"
