"""The file of a study, checked and expanded to training runs and cells.

The id of a run is a hash of its options as the file states them, that of a cell a hash of the run and its
sampling settings. An edited file therefore finds what was done for the settings that it still has.
"""

from __future__ import annotations

import hashlib
import itertools
import json
import tomllib
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass, fields
from pathlib import Path
from typing import Any, get_type_hints

from kcv2diffusers.dreambooth.config import Config, checked_options, make_config
from kcv2diffusers.errors import Error, meant, plain
from kcv2diffusers.study.settings import Measure, Page, Sample, read_table

# Options that the study sets itself, or that make no sense for many runs.
_NOT_HERE = {
    "out": "--out of study holds every run.",
    "export": "Every run is exported to its folder.",
    "resume": "A study always goes on where it was.",
    "subjects": "A study is about one subject.",
    "verify": "Verify the pipeline that you choose.",
    "push_to_hub": "Publish the pipeline that you choose, by push.",
    "license": "Publish the pipeline that you choose, by push.",
    "private": "Publish the pipeline that you choose, by push.",
}
_TOP = ("name", "wandb", "train", "sample", "measure", "page")
_DEFAULTS = asdict(Config())


@dataclass(frozen=True)
class Run:
    """A training run. `options` are those of dreambooth, with paths that hold in every folder.

    `varied` are the options that differ between the runs of the study, as the file states them.
    """

    id: str
    options: Mapping[str, Any]
    varied: Mapping[str, Any]


@dataclass(frozen=True)
class Setting:
    """How a picture is drawn."""

    scheduler: str
    steps: int
    guidance_scale: float
    negative_prompt: str


@dataclass(frozen=True)
class Cell:
    """A run drawn with a setting: a picture of each prompt from each seed."""

    id: str
    run: Run
    setting: Setting


@dataclass(frozen=True)
class Plan:
    """Everything that a study does, in order. `varied` are the names of what differs between cells."""

    name: str
    runs: list[Run]
    cells: list[Cell]
    sample: Sample
    measure: Measure
    page: Page
    wandb: bool
    varied: tuple[list[str], list[str]]

    def cells_of(self, run: Run) -> list[Cell]:
        """The cells of a run."""
        return [cell for cell in self.cells if cell.run.id == run.id]

    def pictures(self) -> list[tuple[Cell, str, int]]:
        """Every picture: its cell, prompt and seed."""
        prompts = [prompt for _, prompt in self.sample.every_prompt()]
        return [
            (cell, prompt, seed) for cell in self.cells for prompt in prompts for seed in self.sample.seeds
        ]


def read_plan(file: Path) -> Plan:
    """Read the file of a study. Raises Error for what it must not hold, before anything is run."""
    try:
        data = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise Error(f"{file}: cannot be read: {error.strerror}.\nCheck the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError, RecursionError) as error:
        raise Error(f"{file}: not a TOML file: {plain(error)}.\nSee the guide of study for one.") from error
    data = {_name(name): value for name, value in data.items()}
    for name in data.keys() - set(_TOP):
        raise Error(f"{file}: unknown table {plain(name)}.{meant(name, _TOP)}\nKnown are {', '.join(_TOP)}.")
    title, wandb = data.get("name", file.stem), data.get("wandb", False)
    if not isinstance(title, str) or not isinstance(wandb, bool):
        raise Error(f"{file}: name is a text, and wandb is true or false.")
    tables = data.get("train", {})
    tables = tables if isinstance(tables, list) else [tables]
    if not tables or not all(isinstance(table, dict) and table for table in tables):
        raise Error(f"{file}: no [train] table.\nIt holds options of dreambooth, such as base.")
    sample = read_table(Sample, data.get("sample", {}), f"{file}: [sample]")
    measure = read_table(Measure, data.get("measure", {}), f"{file}: [measure]")
    page = read_table(Page, data.get("page", {}), f"{file}: [page]")
    runs = _runs(tables, file)
    cells = [
        Cell(digest(run.id, asdict(setting)), run, setting) for run in runs for setting in settings(sample)
    ]
    varied = [name for name in runs[0].varied], sample.varied()
    return Plan(
        title, runs, cells, sample, measure.located(file.parent, runs[0].options), page, wandb, varied
    )


def settings(sample: Sample) -> Iterator[Setting]:
    """Every combination of the sampling settings, in the order of the file."""
    for values in itertools.product(
        sample.scheduler, sample.steps, sample.guidance_scale, sample.negative_prompt
    ):
        yield Setting(*values)


def _runs(tables: list[dict[str, Any]], file: Path) -> list[Run]:
    """The runs of every [train] table; two tables with a run in common have it once."""
    found: dict[str, dict[str, Any]] = {}
    for number, table in enumerate(tables, 1):
        where = f"{file}: [train]" if len(tables) == 1 else f"{file}: [[train]] number {number}"
        for options in _combinations(table, where):
            found.setdefault(digest(_told(options)), options)
    told = [options | {} for options in found.values()]
    names = [f.name for f in fields(Config) if any(f.name in options for options in told)]
    varied = [n for n in names if len({_text(options.get(n, _DEFAULTS[n])) for options in told}) > 1]
    return [
        Run(id, _absolute(options, file.parent), {n: options.get(n, _DEFAULTS[n]) for n in varied})
        for id, options in found.items()
    ]


def _combinations(table: Mapping[str, Any], where: str) -> Iterator[dict[str, Any]]:
    """Every combination of the options of a [train] table, each checked as dreambooth checks its options."""
    kinds = get_type_hints(Config)
    dimensions: dict[str, list[Any]] = {}
    for given, value in table.items():
        name = _name(given)
        if name in _NOT_HERE:
            raise Error(f"{where}: {plain(given)} cannot be set in a study.\n{_NOT_HERE[name]}")
        if name not in kinds:
            raise Error(
                f"{where}: unknown option {plain(given)}.{meant(name, kinds)}\n"
                "It holds options of dreambooth, as in its --config file."
            )
        # An option that is itself a list is a dimension only as a list of lists.
        listed = isinstance(value, list) and (
            kinds[name] != list[str] or any(isinstance(item, list) for item in value)
        )
        if listed and not value:
            raise Error(f"{where}: {plain(given)} is an empty list.\nGive at least one value.")
        dimensions[name] = value if listed else [value]
    for values in itertools.product(*dimensions.values()):
        options = checked_options(dict(zip(dimensions, values, strict=True)), where)
        try:
            make_config({**options, "out": "out", "export": "export"})
        except Error as error:
            raise Error(f"{where}: {error}") from None
        yield options


def _told(options: Mapping[str, Any]) -> dict[str, Any]:
    """What the id of a run is made of: the options that differ from their defaults."""
    return {name: value for name, value in options.items() if value != _DEFAULTS[name]}


def _absolute(options: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """The options with the paths that are relative to the file's folder made absolute."""
    metavars = {f.name: f.metadata["metavar"] for f in fields(Config)}

    def path(name: str, text: str) -> str:
        there = (folder / text).absolute()
        known = there.exists() if metavars[name] != "DIR" else bool(text)
        return str(there) if known and text != "tiny" else text

    found = dict(options)
    for name, value in options.items():
        if metavars[name] in ("DIR", "FILE", "SRC", "SRC|tiny"):
            found[name] = [path(name, v) for v in value] if isinstance(value, list) else path(name, value)
    return found


def _name(name: str) -> str:
    return name.replace("-", "_")


def _text(value: Any) -> str:
    return json.dumps(value, sort_keys=True)


def picture_name(setting: Setting, prompt: str, seed: int) -> str:
    """The name of a picture in the folder of its run."""
    return digest(asdict(setting), prompt, seed)


def last_names(path: str) -> str:
    """The last two names of an absolute path, which reveal less of this machine than the path."""
    return "/".join(Path(path).parts[-2:]) if Path(path).is_absolute() else path


def digest(*what: Any) -> str:
    """A short hash of JSON values, the same in every process and version."""
    return hashlib.sha256(_text(what).encode()).hexdigest()[:10]
