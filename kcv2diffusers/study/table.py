"""The cells of a study as rows, best first: for the terminal, as CSV, and for the page."""

from __future__ import annotations

import shlex
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from pathlib import Path
from typing import Any

from kcv2diffusers.csv_text import csv_text
from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.errors import plain
from kcv2diffusers.study.measures import MEASURES
from kcv2diffusers.study.one import config, read_measures
from kcv2diffusers.study.plan import Cell, Plan, Run, last_names
from kcv2diffusers.study.schedulers import KERASCV, SCHEDULERS
from kcv2diffusers.study.settings import Sample

_SHOWN = 12  # rows in the terminal
# Settings that training and sampling both have, as they are shown.
_TRAINED = {"steps": "training steps", "guidance_scale": "class guidance scale"}
_DRAWN = {"steps": "sampling steps"}


@dataclass(frozen=True)
class Row:
    """A cell with its measures by name. `score` is None if nothing was measured.

    `settings` are those that differ between the cells. `reason` says why it is missing, "" if it is there.
    """

    cell: Cell
    settings: Mapping[str, Any]
    values: Mapping[str, float]
    models: Mapping[str, str] = field(default_factory=dict)
    score: float | None = None
    reason: str = ""

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        return {
            "cell": self.cell.id,
            "run": self.cell.run.id,
            "settings": dict(self.settings),
            "score": self.score,
            "measures": dict(self.values),
            "models": dict(self.models),
            "reason": self.reason,
        }


def rows(plan: Plan, names: Sequence[str], out: Path, failed: Mapping[str, str]) -> list[Row]:
    """A row for each cell: the best first, those that are missing last."""
    found = []
    trained, drawn = plan.varied
    measures = {run.id: read_measures(out, run.id) for run in plan.runs}
    best = plan.measure.best or names
    for cell in plan.cells:
        entry = measures[cell.run.id].get(cell.id, {})
        settings = {
            **{_TRAINED.get(n, n.replace("_", " ")): cell.run.varied[n] for n in trained},
            **{_DRAWN.get(n, n.replace("_", " ")): getattr(cell.setting, n) for n in drawn},
        }
        reason = "" if entry else failed.get(cell.run.id, "not done")
        values = {name: entry["values"][name] for name in names if name in entry.get("values", {})}
        models = entry.get("models", {})
        found.append(Row(cell, settings, values, models, score_of(values, best), reason))
    return sorted(found, key=lambda row: (bool(row.reason), -(row.score or 0)))


def score_of(values: Mapping[str, float], names: Sequence[str]) -> float | None:
    """The mean of the measures `names`, of those of which less is better 1 - value; None without any."""
    found = [values[n] if MEASURES[n].more else 1 - values[n] for n in names if n in values]
    return round(sum(found) / len(found), 4) if found else None


def as_csv(plan: Plan, names: Sequence[str], rows: Sequence[Row]) -> str:
    """The table as CSV, with the commands of each cell."""
    settings = list(rows[0].settings)
    columns = ["place", "cell", "run", *settings, "score", *names, "models", "train", "draw", "reason"]
    lines = []
    for place, row in enumerate(rows, 1):
        values = [_cell(row.settings[name]) for name in settings]
        models = ", ".join(f"{role}: {name}" for role, name in row.models.items())
        measured = [row.values.get(name, "") for name in names]
        score = "" if row.score is None else row.score
        commands = [train_command(row.cell.run), draw_command(row.cell, plan.sample)]
        lines.append(
            [
                place,
                row.cell.id,
                row.cell.run.id,
                *values,
                score,
                *measured,
                plain(models),
                *commands,
                row.reason,
            ]
        )
    return csv_text(columns, lines)


def _cell(value: Any) -> str | float:
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, int | float):
        return value
    return plain(", ".join(value) if isinstance(value, list) else value)


def shown(value: Any) -> str:
    """A setting in words."""
    if isinstance(value, float):
        return f"{value:g}"
    return str(_cell(value)) or "none"


def as_text(rows: Sequence[Row], names: Sequence[str], failed: Mapping[str, str]) -> str:
    """The best cells as a table for the terminal, and the runs that failed."""
    settings = list(rows[0].settings)
    best = [row for row in rows if not row.reason][:_SHOWN]
    lines = [["", "score", *names, *settings]]
    for place, row in enumerate(best, 1):
        measured = [f"{row.values[name]:.3f}" if name in row.values else "" for name in names]
        score = "" if row.score is None else f"{row.score:.2f}"
        lines.append([str(place), score, *measured, *(shown(row.settings[name]) for name in settings)])
    widths = [max(len(line[at]) for line in lines) for at in range(len(lines[0]))]
    text = ["  ".join(f"{c:{w}}" for c, w in zip(line, widths, strict=True)).rstrip() for line in lines]
    there = sum(not row.reason for row in rows)
    runs = len({row.cell.run.id for row in rows})
    failures = [f"Run {run} failed: {reason}" for run, reason in failed.items()]
    return "\n".join([*text, *failures, f"{there} of {len(rows)} cells of {runs} runs"])


def train_command(run: Run, out: str = "run/", export: str = "pipeline/") -> str:
    """The command that trains a run by itself."""
    made, words = config("study", run.id, run.options), ["kcv2diffusers", "dreambooth"]
    usual = asdict(Config())
    values = {**asdict(made), "out": out, "export": export, "resume": False}
    if "class_images" not in run.options:
        values["class_images"] = ""
    for f in fields(Config):
        value, option = values[f.name], "--" + f.name.replace("_", "-")
        if value == usual[f.name] or not f.metadata["command"]:
            continue
        if isinstance(value, bool):
            words.append(option if value else f"--no-{option[2:]}")
        else:
            for each in value if isinstance(value, list) else [value]:
                words += [
                    option,
                    f"{each:g}" if isinstance(each, float) else _place(f.metadata["metavar"], each),
                ]
    return plain(shlex.join(words))


def _place(metavar: str | None, value: Any) -> str:
    """A value of a command, without the folders that a path is in."""
    return last_names(str(value)) if metavar in ("DIR", "FILE", "SRC", "SRC|tiny") else str(value)


def draw_command(cell: Cell, sample: Sample, pipeline: str = "pipeline/") -> str:
    """What draws the first picture of a cell: a command, or with a scheduler of diffusers a script."""
    how, prompt, seed = cell.setting, sample.prompts[0], sample.seeds[0]
    if how.scheduler == KERASCV:
        words = [
            "kcv2diffusers",
            "generate",
            "--base",
            pipeline,
            "--prompt",
            prompt,
            "--steps",
            str(how.steps),
        ]
        words += ["--guidance-scale", f"{how.guidance_scale:g}", "--seed", str(seed), "--out", "pictures/"]
        if how.negative_prompt:
            words += ["--negative-prompt", how.negative_prompt]
        return plain(shlex.join(words))
    name, changed = SCHEDULERS[how.scheduler]
    more = "".join(f", {key}={value!r}" for key, value in changed.items())
    negative = f"negative_prompt={how.negative_prompt!r}, " if how.negative_prompt else ""
    return "\n".join(
        [
            "import torch",
            f"from diffusers import {name}, StableDiffusionPipeline",
            "",
            f"pipe = StableDiffusionPipeline.from_pretrained({pipeline!r}, safety_checker=None)",
            f"pipe.scheduler = {name}.from_config(pipe.scheduler.config{more})",
            f"pipe({prompt!r}, {negative}num_inference_steps={how.steps}, "
            f"guidance_scale={how.guidance_scale:g}, "
            f'generator=torch.Generator("cpu").manual_seed({seed})).images[0].save("picture.png")',
        ]
    )
