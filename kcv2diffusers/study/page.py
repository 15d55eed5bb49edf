"""The page of a study: one self-contained HTML file, with the pictures of each cell as one sheet.

What comes from files reaches the page as escaped text or as JSON, which its script only ever shows as text.
The policy of the page allows that one script, by its hash, and no request.
"""

from __future__ import annotations

import base64
import hashlib
import json
from collections.abc import Mapping, Sequence
from io import BytesIO
from pathlib import Path
from typing import Any

from jinja2 import Environment, PackageLoader, StrictUndefined, select_autoescape
from markupsafe import Markup
from PIL import Image

from kcv2diffusers.errors import plain
from kcv2diffusers.study.measures import MEASURES
from kcv2diffusers.study.one import run_folder
from kcv2diffusers.study.plan import Cell, Plan, picture_name
from kcv2diffusers.study.table import Row, draw_command, shown, train_command

_GAP = 2  # pixels between the pictures of a sheet
_SCRIPT = Path(__file__).with_name("page.js")


def page(plan: Plan, names: Sequence[str], rows: Sequence[Row], out: Path, failed: Mapping[str, str]) -> str:
    """The page as text. `names` are the measures, `failed` the reasons of runs by their id."""
    environment = Environment(
        loader=PackageLoader("kcv2diffusers.study", "."),
        autoescape=select_autoescape(default=True),
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    script = _SCRIPT.read_text(encoding="utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    models = sorted({f"{role}: {name}" for row in rows for role, name in row.models.items()})
    return environment.get_template("page.html").render(
        title=plain(plan.name),
        there=sum(not row.reason for row in rows),
        rows=rows,
        runs=plan.runs,
        sample=plan.sample,
        measures={name: MEASURES[name] for name in names},
        models=list(map(plain, models)),
        best=[MEASURES[name].label for name in plan.measure.best or names],
        failed=failed,
        data=Markup(_json(_data(plan, names, rows, out))),
        script=Markup(script),
        policy=f"default-src 'none'; img-src data:; style-src 'unsafe-inline'; script-src 'sha256-{digest}'",
    )


def _data(plan: Plan, names: Sequence[str], rows: Sequence[Row], out: Path) -> dict[str, Any]:
    """What the script shows."""
    settings = list(rows[0].settings)
    values = {
        name: list(dict.fromkeys(shown(row.settings[name]) for row in _ordered(rows, plan)))
        for name in settings
    }
    trained = {run.id: train_command(run) for run in plan.runs}
    return {
        "settings": [{"name": plain(name), "values": values[name]} for name in settings],
        "measures": [{"name": MEASURES[n].label, "more": MEASURES[n].more} for n in names],
        "prompts": [plain(prompt) for _, prompt in plan.sample.every_prompt()],
        "seeds": plan.sample.seeds,
        "train": trained,
        "cells": [
            {
                "id": row.cell.id,
                "run": row.cell.run.id,
                "score": row.score,
                "settings": [values[name].index(shown(row.settings[name])) for name in settings],
                "measures": [row.values.get(name) for name in names],
                "draw": draw_command(row.cell, plan.sample),
                "sheet": sheet(plan, row.cell, out),
            }
            for row in rows
            if not row.reason
        ],
    }


def _ordered(rows: Sequence[Row], plan: Plan) -> list[Row]:
    """The rows in the order of the file, in which the values of a setting are shown."""
    place = {cell.id: number for number, cell in enumerate(plan.cells)}
    return sorted(rows, key=lambda row: place[row.cell.id])


def sheet(plan: Plan, cell: Cell, out: Path) -> str:
    """The pictures of a cell as a data URI of WebP: a column for each prompt, a row for each seed."""
    prompts, seeds = plan.sample.every_prompt(), plan.sample.seeds
    folder = run_folder(out, cell.run.id) / "pictures"
    canvas: Image.Image | None = None
    for row, seed in enumerate(seeds):
        for column, (_, prompt) in enumerate(prompts):
            with Image.open(folder / f"{picture_name(cell.setting, prompt, seed)}.png") as opened:
                image = opened.convert("RGB")
            image.thumbnail((plan.page.picture, plan.page.picture), Image.Resampling.LANCZOS)
            width, height = image.size
            if canvas is None:
                size = len(prompts) * (width + _GAP) - _GAP, len(seeds) * (height + _GAP) - _GAP
                canvas = Image.new("RGB", size, "white")
            canvas.paste(image, (column * (width + _GAP), row * (height + _GAP)))
    assert canvas is not None
    buffer = BytesIO()
    canvas.save(buffer, format="webp", quality=plan.page.quality, method=6)
    return "data:image/webp;base64," + base64.b64encode(buffer.getvalue()).decode()


def _json(data: Any) -> str:
    """JSON that can stand in a script element: no `<` ends it."""
    text = json.dumps(data, separators=(",", ":"), allow_nan=False)
    return text.replace("<", "\\u003c").replace(">", "\\u003e").replace("&", "\\u0026")
