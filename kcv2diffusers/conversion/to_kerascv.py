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
from kcv2diffusers.diffusion import PIXELS_PER_LATENT
from kcv2diffusers.errors import Error, SourceError, no_choice
from kcv2diffusers.hub.address import shown
from kcv2diffusers.json_text import write_json
from kcv2diffusers.maps.parts import Preset, families, family_of, label
from kcv2diffusers.maps.parts import parts as all_parts
from kcv2diffusers.maps.tables import tables
from kcv2diffusers.pipeline.configs import carried, config_of, scheduler_with
from kcv2diffusers.pipeline.preset import preset_config
from kcv2diffusers.pipeline.scheduler import SCHEDULER, read_scheduler
from kcv2diffusers.pipeline.tokenizer_files import copy_tokenizer
from kcv2diffusers.pipeline_files import COMPONENT_CONFIG, CONFIG_FILE, SCHEDULER_FILE, TOKENIZER
from kcv2diffusers.progress import Progress, silent
from kcv2diffusers.sources.diffusers_pipeline import Component, read_pipeline
from kcv2diffusers.sources.gather import check_together, gather
from kcv2diffusers.sources.locate import locate_all
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.system.output import check_target, new_folder
from kcv2diffusers.targets.keras_h5 import WRITERS, write_weights_h5
from kcv2diffusers.targets.safetensors import common_dtype
from kcv2diffusers.targets.stream import run_finite
from kcv2diffusers.targets.transfer import Job

PRESET = "preset"


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
    format: Literal["weights.h5", "h5", "preset"] = "weights.h5",
    variant: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> ToKeras:
    """Write the parts of a diffusers pipeline as float32 files for KerasCV's or KerasHub's `load_weights`.

    `pipeline` is a folder, a single `.safetensors` file, or hf://user/repo. `format` is "weights.h5" (Keras
    3), "h5" (Keras 2 and 3; KerasCV only) or "preset", the folder that KerasHub's `from_preset` reads,
    with one file for the whole model. The pipeline's tokenizers are copied. A kcv2diffusers.json with the
    config entries that cannot be inferred from the weights is added if needed, so that `convert` restores the
    same pipeline from the folder.

    A `dry_run` runs all checks except those of the values, writes nothing, and returns the plan. `progress`
    is called with the bytes done and in total. Raises Error with a message for the user; `out` is then
    unchanged.
    """
    started = time.monotonic()
    if format not in (*WRITERS, PRESET):
        raise no_choice("--format", format, [*WRITERS, PRESET])
    source = locate_all(pipeline, pipelines=True, variant=variant)[0]
    single = source.is_file()
    components = _of_single_file(source) if single else read_pipeline(source, variant=variant)
    parts = {p: m.require_complete() for component in components.values() for p, m in component.parts.items()}
    needed = sum(4 * math.prod(t.shape) for match in parts.values() for _, t in match.slots())
    _check_format(format, source, parts)
    stems = [*all_parts(), *tables()]
    presets = [name for f in families() if f.preset for name in (f.preset.weights, COMPONENT_CONFIG)]
    tokenizers = [folder.name for family in families() for folder in family.tokenizers]
    ours = {CONFIG_FILE, *presets, *tokenizers, *(f"{stem}.{name}" for stem in stems for name in WRITERS)}
    scheduler = _scheduler_of(components) if single else read_scheduler(source, family_of(parts).scheduler)
    stated = _stated(components, scheduler)

    def is_output(path: Path) -> bool:
        return all(entry.name in ours for entry in path.iterdir())

    family = family_of(parts)
    files = {part: _file(match, format, family.preset) for part, match in parts.items()}
    models = {part: _keras_class(match, format, family.preset) for part, match in parts.items()}
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
        jobs = _lay_out(folder, parts, files, format)
        if stated:
            write_json(folder / CONFIG_FILE, stated)
        if format == PRESET:
            write_json(folder / COMPONENT_CONFIG, preset_of(parts, components, scheduler))
        for tokenizer in family.tokenizers:
            copy_tokenizer(source / tokenizer.name, folder / tokenizer.name)
        run_finite(jobs, progress, allow_nonfinite=allow_nonfinite)
    return replace(planned, seconds=time.monotonic() - started)


def _check_format(format: str, source: Path, parts: Mapping[str, Match]) -> None:
    """Raise Error if the parts cannot be written in a format, SourceError if sizes are not determined."""
    family = family_of(parts)
    in_whole = [match for match in parts.values() if match.spec.place]
    if format == "h5" and in_whole:
        raise Error(f"--format h5 is for KerasCV.\nGive --format weights.h5 for {family.label}.")
    if format == PRESET:
        lacking = [part for part in family.parts if part not in parts and part not in family.optional]
        if family.preset is None or lacking:
            what = f"it lacks {', '.join(map(label, lacking))}" if lacking else "KerasCV reads none"
            raise Error(f"--format preset: {source}: {what}.\nGive --format weights.h5.")
    for match in parts.values():
        for slot, _ in match.slots():
            try:
                slot.whole_shape(match.dims)
            except ValueError as error:
                names = " and ".join(match.spec.table.stated.values())
                raise SourceError(
                    match.source.path.parent / COMPONENT_CONFIG, f"{error}.", f"State {names} in it."
                ) from None


def _file(match: Match, format: str, preset: Preset | None) -> str:
    """Return the name of the file for a part. Parts that one Keras model holds are in one file."""
    if format == PRESET and preset:
        return preset.weights
    return f"{match.spec.table.name if match.spec.place else match.part}.{format}"


def _lay_out(folder: Path, parts: Mapping[str, Match], files: Mapping[str, str], format: str) -> list[Job]:
    together: dict[str, list[Match]] = {}
    for part, match in parts.items():
        together.setdefault(files[part], []).append(match)
    if format == PRESET:
        return [
            job for name, m in together.items() for job in write_weights_h5(folder / name, *m, whole=True)
        ]
    return [job for name, held in together.items() for job in WRITERS[format](folder / name, *held)]


def preset_of(
    parts: Mapping[str, Match], components: Mapping[str, Component], scheduler: Mapping[str, Any]
) -> dict[str, Any]:
    """The config.json of the preset that holds the parts; their family has one."""
    family = family_of(parts)
    assert family.preset is not None
    configs: dict[str, Mapping[str, Any]] = {"scheduler": {**family.scheduler, **scheduler}}
    size = family.image_size
    for folder, component in components.items():
        match = next(iter(component.parts.values()))
        table = match.spec.table
        written = config_of(table, match.version, match.dims, image_size=family.image_size)
        configs[folder] = {**dict.fromkeys(table.known_entries), **written, **component.config}
        if match.part == family.scheduler_part:
            size = int(configs[folder].get("sample_size") or 0) * PIXELS_PER_LATENT or size
    return preset_config(family.preset.model, {part: m.dims for part, m in parts.items()}, configs, size)


def _keras_class(match: Match, format: str, preset: Preset | None) -> str:
    """Return the Keras class that reads the file, with the vocabulary size if that is not the default."""
    if format == PRESET and preset:
        return preset.kind
    usual, words = (sizes.get("vocabulary") for sizes in (match.spec.nominal, match.dims))
    return match.spec.keras_class + (f" (vocab_size={words})" if words not in (None, usual) else "")


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
