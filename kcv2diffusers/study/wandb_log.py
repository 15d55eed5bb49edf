"""A study at Weights & Biases: a table with a row for each cell, and the pictures."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path

from PIL import Image

from kcv2diffusers.study.one import run_folder
from kcv2diffusers.study.plan import Plan, picture_name
from kcv2diffusers.study.table import Row, shown


def log(plan: Plan, names: Sequence[str], rows: Sequence[Row], out: Path) -> None:
    """Log the cells that are done as one run of the project `kcv2diffusers-study`."""
    import wandb

    run = wandb.init(project="kcv2diffusers-study", name=plan.name, dir=str(out))
    settings = list(rows[0].settings)
    table = wandb.Table(columns=["cell", *settings, "score", *names, "picture"])
    prompt, seed = plan.sample.prompts[0], plan.sample.seeds[0]
    for row in rows:
        if row.reason:
            continue
        file = (
            run_folder(out, row.cell.run.id)
            / "pictures"
            / f"{picture_name(row.cell.setting, prompt, seed)}.png"
        )
        with Image.open(file) as image:
            picture = wandb.Image(image.convert("RGB"), caption=prompt)
        told = [shown(row.settings[name]) for name in settings]
        table.add_data(row.cell.id, *told, row.score, *(row.values.get(name) for name in names), picture)
    run.log({"cells": table})
    run.finish()
