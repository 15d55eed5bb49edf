"""The result of `convert`."""

from __future__ import annotations

from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kcv2diffusers.conversion.outline import PLAN, Moved, plan_text
from kcv2diffusers.maps.parts import label


@dataclass(frozen=True, kw_only=True)
class Converted:
    """The result of a conversion, or the plan after a dry run. Sizes are in bytes.

    `parts` is the source of each part. `sources` are the checkpoints among them, not pipelines. `base` is the
    pipeline folder that supplied the other parts. `moved` describes the transfer of each part to its file.
    `scheduler` and `tokenizer` are the origins of these (None: not written). `version` is "sd1", "sd2", or
    "any" if no part determines it. `metadata` are those of a single file, empty for a pipeline. `pipeline` is
    the class that loads the pipeline, and `absent` are the arguments that must be None for it.
    """

    out: Path
    version: str
    complete: bool
    parts: dict[str, str]
    sources: dict[str, Path]
    base: Path | None
    dtypes: dict[str, str]
    missing: list[str]
    bytes_read: int
    bytes_written: int
    seconds: float
    notes: list[str] = field(default_factory=list)
    moved: list[Moved] = field(default_factory=list)
    scheduler: str | None = None
    tokenizer: str | None = None
    dry_run: bool = False
    metadata: dict[str, str] = field(default_factory=dict)
    pipeline: str = ""
    absent: list[str] = field(default_factory=list)

    def plan(self) -> str:
        """Return the plan of a dry run as human-readable text."""
        what = "a pipeline" if self.complete else "the given parts"
        what = "a single file" if self.metadata else what
        origins = {"scheduler": self.scheduler, "tokenizer": self.tokenizer}
        notes = [*self.notes, *([] if self.complete else [self.needs()])]
        return plan_text(f"To write: {what}, {self.out}", self.moved, origins, notes)

    def needs(self) -> str:
        """Return a sentence about the parts that are missing for a full pipeline."""
        if not self.missing:
            return "Nothing is missing. Omit --base none to write a full pipeline."
        return f"A full pipeline still needs: {', '.join(map(label, self.missing))}."

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON, without `sources` and `base`, whose content is in `parts`."""
        left_out = {"sources", "base", *(() if self.dry_run else PLAN)}
        left_out |= set() if self.metadata else {"metadata"}
        shown = {name: value for name, value in asdict(self).items() if name not in left_out}
        return shown | {"out": str(self.out)}
