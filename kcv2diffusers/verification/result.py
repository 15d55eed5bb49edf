"""The result of a verification: figures, verdict and reasons."""

from __future__ import annotations

import math
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kcv2diffusers.maps.parts import family_of, label
from kcv2diffusers.verification.images import Images
from kcv2diffusers.verification.modules import Part, kind_label
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.weights import Weights


@dataclass
class Input:
    """A file that was read: its size in bytes and, if a report is written, its SHA-256."""

    path: Path
    bytes: int
    sha256: str | None = None


@dataclass
class Verified:
    """The figures of each level that was checked; None for levels that were not."""

    request: Request
    sources: dict[str, str]
    weights: Weights
    settings: list[str]
    modules: list[Part] | None = None
    images: Images | None = None
    notes: list[str] = field(default_factory=list)
    versions: dict[str, str] = field(default_factory=dict)
    inputs: list[Input] = field(default_factory=list)
    seconds: dict[str, float] = field(default_factory=dict)
    report: Path | None = None

    def failures(self) -> dict[str, list[str]]:
        """What exceeds a tolerance, by level; an empty list for a level that passed."""
        found = {"weights": self.weights.failures() + self.settings}
        if self.modules is not None:
            found["modules"] = [failure for part in self.modules for failure in part.failures()]
        if self.images is not None:
            found["images"] = self.images.failures()
        return found

    @property
    def library(self) -> str:
        """The Keras library of the parts."""
        return family_of(self.weights.tensors).library

    @property
    def passed(self) -> bool:
        """Whether everything is within the tolerances."""
        return not any(self.failures().values())

    @property
    def reason(self) -> str:
        """The verdict in one line: the first failure of each level, and the number of further failures."""
        said = []
        for level, failures in self.failures().items():
            if failures:
                more = f" (and {len(failures) - 1} more)" if len(failures) > 1 else ""
                said.append(f"{level}: {failures[0]}{more}")
        levels = list(self.failures())
        return "not verified: " + "; ".join(said) if said else f"verified: {', '.join(levels)}"

    def to_dict(self) -> dict[str, Any]:
        """All fields for JSON; an infinite number becomes the text "infinite"."""
        data = {
            "passed": self.passed,
            "reason": self.reason,
            "failures": self.failures(),
            "command": self.request.command(),
            **asdict(self),
        }
        for part, found in zip(data["modules"] or [], self.modules or [], strict=True):
            part |= {"stock": found.stock, "attributed": found.attributed}
        result: dict[str, Any] = _plain(data)
        return result

    def text(self) -> str:
        """A summary of a few lines for the user."""
        lines = []
        for part, count in self.weights.tensors.items():
            differ = len(self.weights.problems[part])
            state = f"{differ} tensors differ" if differ else "equal"
            lines.append(f"  {label(part)}: {count} tensors, {self.weights.dtypes[part]}: {state}")
        for setting in self.settings:
            lines.append(f"  {setting}")
        for found in self.modules or []:
            how = kind_label(list(found.errors)[-1], found.part)
            attributed = f", with {how} {found.attributed:.1e}" if len(found.errors) > 1 else ""
            lines.append(f"  {found.name}: error {found.stock:.1e}{attributed}")
        if self.images is not None and self.images.runs:
            stock, attributed = (getattr(self.images.worst(s), s) for s in ("stock", "attributed"))
            lines.append(f"  pictures: PSNR {stock.psnr:.1f} dB, SSIM {stock.ssim:.5f}")
            alike = f"PSNR {attributed.psnr:.1f} dB, SSIM {attributed.ssim:.5f}"
            lines.append(f"  with {self.library}'s GELU and epsilon: {alike}")
        lines += self.notes
        if self.report:
            lines.append(f"Report: {self.report}")
        if self.passed:
            lines.append(self.reason.capitalize())
        return "\n".join(lines)


def _plain(value: Any) -> Any:
    """Nested data converted to types that JSON supports."""
    if isinstance(value, dict):
        return {str(key): _plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return [_plain(item) for item in value]
    if isinstance(value, set):
        return sorted(value)
    if isinstance(value, Path):
        return str(value)
    if isinstance(value, float) and not math.isfinite(value):
        return "infinite" if value > 0 else "-infinite" if value < 0 else "not a number"
    return value
