"""The whole study: each run that is not done goes to the engine; the table, the CSV and the page follow."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from kcv2diffusers.errors import Error, MissingExtra
from kcv2diffusers.study import table
from kcv2diffusers.study.measures import measured
from kcv2diffusers.study.one import TRAINED, Order, Result, carry_out, order, run_folder, undone
from kcv2diffusers.study.plan import Plan, read_plan
from kcv2diffusers.study.schedulers import KERASCV
from kcv2diffusers.system.children import locked
from kcv2diffusers.system.interruption import keeps
from kcv2diffusers.system.output import check_folder, whole_file

_LOCK, _LOCK_SECONDS = ".study.lock", 10.0
PAGE, CSV = "study.html", "study.csv"

Engine = Callable[[Iterable[Order]], Iterator[Result]]
"""Carries out orders, and yields the results in any order."""
Tell = Callable[[int, int, Result], None]
"""Called with the number of runs done, their total, and the last result."""


@dataclass(frozen=True)
class Outcome:
    """The rows of the table, best first, why runs failed, and the files that were written."""

    rows: list[table.Row]
    failed: dict[str, str]
    files: list[Path]

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        return {
            "cells": [row.to_dict() for row in self.rows],
            "failed": self.failed,
            "files": list(map(str, self.files)),
        }


def silent(done: int, total: int, result: Result) -> None:
    """Report nothing."""


def in_order(orders: Iterable[Order]) -> Iterator[Result]:
    """The engine of one machine: one run after the other."""
    return map(carry_out, orders)


def prepare(file: Path) -> tuple[Plan, list[str]]:
    """The plan in a file and the names of its measures.

    Raises Error for anything that the file must not say, and for a package that is not installed.
    """
    plan = read_plan(file)
    names = measured(plan.measure, plan.sample)
    needed = {"keras": "keras", "PIL": "keras", "jinja2": "verify"}
    if set(plan.sample.scheduler) != {KERASCV}:
        needed |= {"torch": "diffusers", "diffusers": "diffusers", "transformers": "diffusers"}
    if plan.measure.dino or plan.measure.clip:
        needed |= {"torch": "diffusers", "transformers": "diffusers"}
    for package, extra in needed.items():
        if find_spec(package) is None:
            raise MissingExtra(package, extra)
    if plan.wandb and find_spec("wandb") is None:
        raise Error("wandb = true needs a package.\npip install wandb")
    return plan, names


def study(
    file: Path,
    out: Path,
    *,
    engine: Engine = in_order,
    tell: Tell = silent,
) -> Outcome:
    """Do what is missing of the study in `file`, in the folder `out`, and write its table and page.

    A run that fails is listed with its reason, and the others go on. The next call tries it again. Raises
    Error for a file that must not be run.
    """
    plan, names = prepare(file)
    check_folder(out)
    out.mkdir(parents=True, exist_ok=True)
    taken = f"{out}: another study works there.\nWait for its end, or give another --out."
    with locked(out / _LOCK, _LOCK_SECONDS, taken):
        keeps("the same command goes on")
        failed: dict[str, str] = {}
        waiting, done = [], 0
        for run in plan.runs:
            wanted = order(plan, run, out)
            trained = (run_folder(out, run.id) / TRAINED).exists()
            if trained and not any(undone(wanted).values()):
                done += 1
            else:
                waiting.append(wanted)
        for result in engine(waiting):
            done += 1
            if result.reason:
                failed[result.run] = result.reason
            tell(done, len(plan.runs), result)
        return finish(plan, names, out, failed)


def finish(plan: Plan, names: list[str], out: Path, failed: dict[str, str]) -> Outcome:
    """Write the CSV and the page of what is done, and send it to Weights & Biases if the plan says so."""
    from kcv2diffusers.study.page import page

    rows = table.rows(plan, names, out, failed)
    for name, text in (
        (CSV, table.as_csv(plan, names, rows)),
        (PAGE, page(plan, names, rows, out, failed)),
    ):
        with whole_file(out / name) as part:
            part.write_text(text, encoding="utf-8", newline="")
    if plan.wandb:
        from kcv2diffusers.study.wandb_log import log

        log(plan, names, rows, out)
    return Outcome(rows, failed, [out / PAGE, out / CSV])
