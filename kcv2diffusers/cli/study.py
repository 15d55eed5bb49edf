"""The command study."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kcv2diffusers.cli.app import print_json
from kcv2diffusers.cli.options import RESULT, Json, Quiet
from kcv2diffusers.cli.progress import note, say, tell
from kcv2diffusers.errors import Error, plain

if TYPE_CHECKING:
    from kcv2diffusers.study.one import Result
    from kcv2diffusers.study.run import Engine

CLUSTER = "Cluster"


def study(
    file: Annotated[Path, typer.Argument(metavar="STUDY.toml", help="The file of the study.")],
    out: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the runs, the table and the page (default: the name of the file).",
            rich_help_panel=RESULT,
        ),
    ] = None,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS|auto|local",
            help="Spread the runs over a Ray cluster: one at an address, the one that runs here, or one "
            "started here.",
            rich_help_panel=CLUSTER,
        ),
    ] = None,
    cpus: Annotated[
        float, typer.Option(metavar="N", help="CPUs of the cluster for each run.", rich_help_panel=CLUSTER)
    ] = 1,
    gpus: Annotated[
        float, typer.Option(metavar="N", help="GPUs of the cluster for each run.", rich_help_panel=CLUSTER)
    ] = 0,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print the runs and their commands. Write nothing.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Train and draw a grid of settings, and compare them.

    A study that was interrupted goes on where it was. A changed file keeps what is done.
    """
    from kcv2diffusers.backend import choose_backend
    from kcv2diffusers.study import run
    from kcv2diffusers.study.table import as_text, train_command

    if not cpus > 0 or gpus < 0:
        raise Error(f"--cpus {cpus:g} --gpus {gpus:g}: a run needs some CPUs.\nGive numbers above 0.")
    if ray is None and (cpus, gpus) != (1, 0):
        raise Error("--cpus and --gpus are for the runs on a Ray cluster.\nGive --ray, or omit them.")
    plan, names = run.prepare(file)
    counts = f"{len(plan.runs)} training runs, {len(plan.cells)} cells, {len(plan.pictures())} pictures"
    if dry_run:
        if as_json:
            return print_json(
                {
                    "runs": {each.id: train_command(each) for each in plan.runs},
                    "cells": [cell.id for cell in plan.cells],
                    "measures": names,
                }
            )
        return say("\n".join([*(train_command(each) for each in plan.runs), counts]))
    choose_backend(note)
    note(counts)

    def line(done: int, total: int, result: Result) -> None:
        how = result.reason or (
            f"{'trained' if result.trained else 'had been trained'} in {result.seconds:.0f} s, "
            f"{result.drawn} pictures drawn, {result.measured} cells measured"
        )
        note(plain(f"[{done}/{total}] {result.run}: {how}"))

    with _engine(ray, cpus, gpus) as engine:
        outcome = run.study(file, out or Path(file.stem), engine=engine, tell=line)
    if as_json:
        print_json(outcome.to_dict())
    else:
        say(as_text(outcome.rows, names, outcome.failed))
        tell(f"Page and table: {', '.join(map(str, outcome.files))}")
    if outcome.failed:
        raise Error(f"{len(outcome.failed)} runs failed.\nRun the same command to try them again.")


@contextmanager
def _engine(ray: str | None, cpus: float, gpus: float) -> Iterator[Engine]:
    if ray is None:
        from kcv2diffusers.study.run import in_order

        yield in_order
        return
    from kcv2diffusers.study.ray_run import on_ray

    with on_ray(ray, cpus=cpus, gpus=gpus) as engine:
        yield engine
