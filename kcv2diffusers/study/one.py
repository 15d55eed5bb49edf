"""A training run of a study from start to end: trained, drawn with every setting, measured.

What is done is on the disk: a mark beside the pipeline, a file for each picture, the measures of each cell.
Each appears whole, so that a run which was killed at any moment goes on with what is missing.
"""

from __future__ import annotations

import json
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

from kcv2diffusers.dreambooth.config import Config, make_config
from kcv2diffusers.errors import Error, one_line, plain
from kcv2diffusers.hub.client import redact
from kcv2diffusers.json_text import parse_object
from kcv2diffusers.study.plan import Plan, Run, digest, last_names, picture_name
from kcv2diffusers.system.children import in_child, locked
from kcv2diffusers.system.output import whole_file

_GRACE = 8.0  # seconds for a training that is interrupted to save; it goes on saving after them
_LOCK_SECONDS = 600.0  # for the processes of a run that was killed to save and end
_CLASS_SECONDS = 24 * 3600.0  # for another run to draw the class
_SAID = 400  # characters of a reason
TRAINED, MEASURES, PIPELINE = "trained.json", "measures.json", "pipeline"


@dataclass(frozen=True)
class Order:
    """What to do for a run, as JSON values.

    `folder` is that of the study. `cells` are, by id, the key of their measures and the names of their
    pictures. `pictures` say how each is drawn, by name. `measure` are the settings of the measures.
    """

    folder: str
    run: str
    options: dict[str, Any]
    cells: dict[str, dict[str, Any]]
    pictures: dict[str, dict[str, Any]]
    measure: dict[str, Any]
    batch: int


@dataclass(frozen=True)
class Result:
    """How a run ended; `reason` says why it failed, "" if it did not.

    `trained` tells whether it was trained now, `drawn` and `measured` how many pictures and cells were done
    now. `seconds` are those of the training, now or earlier.
    """

    run: str
    reason: str = ""
    trained: bool = False
    drawn: int = 0
    measured: int = 0
    seconds: float = 0.0


def order(plan: Plan, run: Run, folder: Path) -> Order:
    """The order for a run of a study whose results are in `folder`."""
    cells, pictures = dict[str, dict[str, Any]](), dict[str, dict[str, Any]]()
    measure = asdict(plan.measure)
    del measure["best"]  # which changes no value
    for cell in plan.cells_of(run):
        drawn = []
        for kind, prompt in plan.sample.every_prompt():
            for seed in plan.sample.seeds:
                name = picture_name(cell.setting, prompt, seed)
                pictures[name] = {**asdict(cell.setting), "prompt": prompt, "seed": seed}
                drawn.append({"name": name, "kind": kind, "prompt": prompt, "seed": seed})
        cells[cell.id] = {"key": digest(measure, drawn), "pictures": drawn}
    return Order(
        str(folder.absolute()),
        run.id,
        dict(run.options),
        cells,
        pictures,
        measure,
        plan.sample.batch_size,
    )


def run_folder(folder: str | Path, run: str) -> Path:
    """The folder of a run."""
    return Path(folder) / "runs" / run


def config(folder: str | Path, run: str, options: Mapping[str, Any]) -> Config:
    """The options with which a run is trained. Runs with the same class share its pictures."""
    place = run_folder(folder, run)
    values = {**options, "out": str(place / "train"), "export": str(place / PIPELINE), "resume": True}
    made = make_config(values)
    if not made.class_prompt or made.class_images:
        return made
    same = ("base", "tokenizer", "class_prompt", "guidance_scale", "sample_steps", "seed", "prediction_type")
    name = digest({name: getattr(made, name) for name in same})
    return replace(made, class_images=str(Path(folder) / "class" / name))


def read_measures(folder: str | Path, run: str) -> dict[str, dict[str, Any]]:
    """The measures of a run by cell: their key and the values by name."""
    with suppress(OSError):
        found = parse_object((run_folder(folder, run) / MEASURES).read_bytes()) or {}
        return {id: entry for id, entry in found.items() if isinstance(entry, dict)}
    return {}


def undone(order: Order) -> dict[str, list[str]]:
    """The names of the pictures that are not drawn, and the ids of the cells that are not measured."""
    folder = run_folder(order.folder, order.run)
    measured = read_measures(order.folder, order.run)
    return {
        "pictures": [name for name in order.pictures if not (folder / "pictures" / f"{name}.png").exists()],
        "cells": [id for id, cell in order.cells.items() if measured.get(id, {}).get("key") != cell["key"]],
    }


def carry_out(order: Order) -> Result:
    """Do what is missing for a run. Whatever happens to it is a result, not an exception."""
    place = run_folder(order.folder, order.run)
    result = Result(order.run)
    try:
        place.mkdir(parents=True, exist_ok=True)
        with locked(place / ".lock", _LOCK_SECONDS, f"{place}: another process works there.") as lock:
            if not (place / TRAINED).exists():
                _train(order, place, lock)
                result = replace(result, trained=True)
            seconds = float((parse_object((place / TRAINED).read_bytes()) or {}).get("seconds", 0))
            result = replace(result, seconds=seconds)
            left = undone(order)
            if left["pictures"] or left["cells"]:
                _draw(order, place, left, lock)
                result = replace(result, drawn=len(left["pictures"]), measured=len(left["cells"]))
    except Error as error:
        return replace(result, reason=_public(one_line(error), order))
    except OSError as error:
        return replace(result, reason=_public(f"{error.filename or place}: {error.strerror or error}", order))
    return result


def _public(reason: str, order: Order) -> str:
    """A reason without full paths, which the page would show to others."""
    given = [v for value in order.options.values() for v in (value if isinstance(value, list) else [value])]
    for path in sorted((str(v) for v in (*given, order.folder)), key=len, reverse=True):
        if Path(path).is_absolute():
            reason = reason.replace(path, last_names(path))
    return plain(reason)[:_SAID]


def _train(order: Order, place: Path, lock: int | None) -> None:
    """Train in a process of its own, or go on with it, up to the exported pipeline."""
    made, started = config(order.folder, order.run, order.options), time.monotonic()
    with whole_file(place / "config.toml") as part:
        part.write_text(made.toml(), encoding="utf-8")
    with _class_lock(made) as meanwhile:
        ended = in_child(
            "kcv2diffusers.study.child",
            *("dreambooth", "--config", str(place / "config.toml"), "--quiet"),
            lock=lock,
            grace=_GRACE,
            meanwhile=meanwhile,
        )
    (place / "train.log").write_text(redact(ended.err), encoding="utf-8")
    if ended.code or not (place / PIPELINE / "model_index.json").exists():
        raise Error(_said(ended.err) or ended.why(redact))
    with whole_file(place / TRAINED) as part:
        part.write_text(json.dumps({"seconds": round(time.monotonic() - started, 1)}) + "\n")
    for name in ("resume", "checkpoints"):  # the pipeline has the weights
        shutil.rmtree(place / "train" / name, ignore_errors=True)


@contextmanager
def _class_lock(config: Config) -> Iterator[Callable[[], None] | None]:
    """A lock on a folder of class pictures: runs that share it draw them once.

    Yields what gives the lock back as soon as the pictures are complete; None if nothing is to be waited for.
    """
    folder = Path(config.class_images)

    def complete() -> bool:
        return len([*folder.glob("class-*.png")]) >= config.num_class_images

    if not config.class_images or folder.parent.name != "class" or complete():
        yield None
        return
    folder.mkdir(parents=True, exist_ok=True)
    with ExitStack() as held:
        held.enter_context(
            locked(folder / ".lock", _CLASS_SECONDS, f"{folder}: another process works there.")
        )
        yield lambda: held.close() if complete() else None


def _draw(order: Order, place: Path, left: Mapping[str, list[str]], lock: int | None) -> None:
    """Draw and measure in a process of its own."""
    line = json.dumps({"order": asdict(order), "left": left}).encode() + b"\n"
    ended = in_child("kcv2diffusers.study.draw", order=line, lock=lock)
    (place / "draw.log").write_text(redact(ended.err), encoding="utf-8")
    if ended.code:
        raise Error(_said(ended.err) or ended.why(redact))


def _said(err: str) -> str:
    """The message of an Error that a process of this package ended with, "" if it ended otherwise."""
    head = "kcv2diffusers: "
    at = err.rfind(f"\n{head}") + 1 if not err.startswith(head) or f"\n{head}" in err else 0
    return redact(err[at + len(head) :].strip()) if err[at:].startswith(head) else ""
