"""Conversion of a diffusers pipeline to weight files for KerasCV, with the same weight maps in reverse."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from kcv2diffusers.conversion.base import Base
from kcv2diffusers.conversion.component_config import config_for
from kcv2diffusers.conversion.outline import PLAN, SLACK, Moved, moved, plan_text
from kcv2diffusers.errors import SourceError, no_choice
from kcv2diffusers.hub.address import shown
from kcv2diffusers.json_text import write_json
from kcv2diffusers.maps.parts import family_of
from kcv2diffusers.maps.parts import parts as all_parts
from kcv2diffusers.pipeline.configs import carried, scheduler_with
from kcv2diffusers.pipeline.scheduler import SCHEDULER, read_scheduler
from kcv2diffusers.pipeline.tokenizer_files import copy_tokenizer
from kcv2diffusers.pipeline_files import CONFIG_FILE, SCHEDULER_FILE, TOKENIZER
from kcv2diffusers.progress import Progress, silent
from kcv2diffusers.sources.diffusers_pipeline import Component, read_pipeline
from kcv2diffusers.sources.gather import check_together, gather
from kcv2diffusers.sources.locate import locate_all
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.system.output import check_target, new_folder
from kcv2diffusers.targets.keras_h5 import WRITERS
from kcv2diffusers.targets.safetensors import common_dtype
from kcv2diffusers.targets.stream import run_finite


@dataclass(frozen=True)
class ToKeras:
    """The result of `to_keras`, or the plan after a dry run.

    `files` is the file of each part, `models` the KerasCV class that loads it. Sizes are in bytes. `moved`,
    `scheduler` and `tokenizer` are as in `Converted`.
    """

    out: Path
    files: dict[str, str]
    models: dict[str, str]
    bytes_written: int
    seconds: float
    moved: list[Moved] = field(default_factory=list)
    scheduler: str | None = None
    tokenizer: str | None = None
    dry_run: bool = False

    def plan(self) -> str:
        """Return the plan of a dry run as human-readable text."""
        origins = {"scheduler": self.scheduler, "tokenizer": self.tokenizer}
        return plan_text(f"To write: weights for KerasCV, {self.out}", self.moved, origins)

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON. The fields of a plan are included only after a dry run."""
        shown = asdict(self) | {"out": str(self.out)}
        return {name: value for name, value in shown.items() if self.dry_run or name not in PLAN}


def to_keras(
    pipeline: str | PathLike[str],
    *,
    out: str | PathLike[str],
    format: Literal["weights.h5", "h5"] = "weights.h5",
    variant: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> ToKeras:
    """Write the parts of a diffusers pipeline as float32 files for KerasCV's `load_weights`.

    `pipeline` is a folder, a single `.safetensors` file, or hf://user/repo. `format` is "weights.h5" (Keras
    3) or "h5" (Keras 2 and 3). The pipeline's `tokenizer/` is copied. A kcv2diffusers.json with the config
    entries that cannot be inferred from the weights is added if needed, so that `convert` restores the same
    pipeline from the folder.

    A `dry_run` runs all checks except those of the values, writes nothing, and returns the plan. `progress`
    is called with the bytes done and in total. Raises Error with a message for the user; `out` is then
    unchanged.
    """
    started = time.monotonic()
    if format not in WRITERS:
        raise no_choice("--format", format, WRITERS)
    source = locate_all(pipeline, pipelines=True, variant=variant)[0]
    single = source.is_file()
    components = _of_single_file(source) if single else read_pipeline(source, variant=variant)
    parts = {p: m.require_complete() for component in components.values() for p, m in component.parts.items()}
    needed = sum(4 * math.prod(t.shape) for match in parts.values() for _, t in match.slots())
    ours = {CONFIG_FILE, TOKENIZER, *(f"{part}.{name}" for part in all_parts() for name in WRITERS)}
    scheduler = _scheduler_of(components) if single else read_scheduler(source)
    stated = _stated(components, scheduler)

    def is_output(path: Path) -> bool:
        return all(entry.name in ours for entry in path.iterdir())

    files = {part: f"{part}.{format}" for part in parts}
    models = {part: _keras_class(match) for part, match in parts.items()}
    planned = ToKeras(
        Path(out),
        files,
        models,
        needed,
        time.monotonic() - started,
        moved=[moved(match, files[part]) for part, match in parts.items()],
        scheduler=f"as {shown(source if single else source / SCHEDULER_FILE)} states"
        if "scheduler" in stated
        else None,
        tokenizer=shown(source / TOKENIZER) if (source / TOKENIZER).is_dir() else None,
        dry_run=dry_run,
    )
    if dry_run:
        check_target(Path(out), overwrite=overwrite, replaceable=is_output, needed=needed + SLACK)
        return planned
    with new_folder(Path(out), overwrite=overwrite, replaceable=is_output, needed=needed + SLACK) as folder:
        jobs = [job for part, match in parts.items() for job in WRITERS[format](folder / files[part], match)]
        if stated:
            write_json(folder / CONFIG_FILE, stated)
        copy_tokenizer(source / TOKENIZER, folder / TOKENIZER)
        run_finite(jobs, progress, allow_nonfinite=allow_nonfinite)
    return replace(planned, seconds=time.monotonic() - started)


def _keras_class(match: Match) -> str:
    """Return the KerasCV class, with the vocabulary size if that is not the default."""
    usual, words = (sizes.get("vocabulary") for sizes in (match.spec.nominal, match.dims))
    return match.spec.keras_class + (f" (vocab_size={words})" if words != usual else "")


def _of_single_file(path: Path) -> dict[str, Component]:
    """Return the components of a single file by folder name, with the config.json that `convert` writes."""
    parts = check_together(gather([path]))
    if any(match.keras for match in parts.values()):
        raise SourceError(path, "a Keras checkpoint already.", "Give a diffusers pipeline or a single file.")
    components: dict[str, Component] = {}
    for match in parts.values():
        folder = match.spec.table.folder
        if folder not in components:
            components[folder] = Component(path, config_for(match, Base(), None, None, None), {})
        components[folder].parts[match.part] = match
    return components


def _scheduler_of(components: Mapping[str, Component]) -> dict[str, Any]:
    """Return the scheduler config for the weights of a single file."""
    parts = {part: match for component in components.values() for part, match in component.parts.items()}
    trained = parts.get(family_of(parts).scheduler_part or "")
    return scheduler_with(trained)[0] if trained else SCHEDULER


def _stated(components: Mapping[str, Component], scheduler: Mapping[str, Any]) -> dict[str, Any]:
    """Return the kcv2diffusers.json to write: configs, and the dtypes of the pipeline other than float32."""
    held = {folder: list(component.parts.values()) for folder, component in components.items()}
    configs = {folder: (matches[0], components[folder].config) for folder, matches in held.items()}
    dtypes = {folder: _dtype(matches) for folder, matches in held.items()}
    halved = {folder: name for folder, name in dtypes.items() if name != "float32"}
    return carried(configs, scheduler) | ({"dtypes": halved} if halved else {})


def _dtype(matches: Sequence[Match]) -> str:
    return common_dtype(tensor for match in matches for tensor in match.found.values()).name
