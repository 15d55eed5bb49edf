"""The folder of a training: its command, its losses, its pictures, its checkpoints."""

from __future__ import annotations

import csv
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

RUN, PHOTOS, PIPELINE = "run", "photos", "pipeline"
_SAMPLES = 5  # times that pictures are drawn in a run
_LINE = re.compile(r"Training (\d+)/(\d+) loss (\S+)\s+(\S+) steps/s")
_STEP = re.compile(r"step-(\d+)")


@dataclass(frozen=True)
class Progress:
    """The last line that a training said: steps done and in all, loss, steps in a second."""

    step: int
    steps: int
    loss: float
    rate: float


@dataclass
class Training:
    """A run in `folder`. `options` are those of `dreambooth` by name, without `steps`."""

    folder: Path
    options: dict[str, Any]
    steps: int

    def words(
        self, *, steps: int | None = None, resume: bool = False, export: bool = False, verify: bool = False
    ) -> list[str]:
        """The arguments of the command."""
        count = steps or self.steps
        values = {**self.options, "steps": count, "out": RUN}
        if values.get("sample_prompt"):
            values["sample_every"] = max(1, self.steps // _SAMPLES)
        ends = [*(["--resume"] if resume else []), *(["--export", PIPELINE] if export else [])]
        ends += ["--verify"] if verify else []
        return ["dreambooth", *options(values), *ends, "--json"]

    @property
    def step(self) -> int:
        """The step of the newest checkpoint; 0 if there is none."""
        found = (_STEP.fullmatch(path.name) for path in (self.folder / RUN / "checkpoints").glob("step-*"))
        return max((int(match[1]) for match in found if match), default=0)

    def losses(self, lines: Sequence[str] = ()) -> list[tuple[int, float]]:
        """Step and loss: of the log, and after its end what the running command has said in `lines`."""
        rows = _log(self.folder / RUN / "log.csv")
        last = rows[-1][0] if rows else 0
        said = [(found.step, found.loss) for found in map(progress, lines) if found and found.step > last]
        return rows + said

    def samples(self) -> list[tuple[Path, str]]:
        """The pictures drawn so far, with the step."""
        paths = sorted((self.folder / RUN / "samples").glob("step-*.png"))
        return [(path, f"Step {int(path.stem.rpartition('-')[2])}") for path in paths]


def progress(line: str) -> Progress | None:
    """What a line of the command says; None for a line about something else."""
    if found := _LINE.match(line):
        with suppress(ValueError):
            return Progress(int(found[1]), int(found[2]), float(found[3]), float(found[4]))
    return None


def options(values: Mapping[str, Any]) -> list[str]:
    """Options for the command line. A text goes behind `=`, so that none that begins with - is an option."""
    words = []
    for name, value in values.items():
        option = f"--{name.replace('_', '-')}"
        if value is True:
            words.append(option)
        elif isinstance(value, list):
            words += [f"{option}={each}" for each in value]
        elif value is not None and value is not False and value != "":
            words.append(f"{option}={value}")
    return words


def _log(path: Path) -> list[tuple[int, float]]:
    with suppress(OSError, ValueError, IndexError, csv.Error):
        rows = list(csv.reader(path.read_text(encoding="utf-8").splitlines()))
        return [(int(row[0]), float(row[1])) for row in rows[1:]]
    return []
