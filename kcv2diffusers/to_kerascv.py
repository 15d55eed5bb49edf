"""A diffusers pipeline -> weight files for KerasCV: the same tables, run backwards."""

from __future__ import annotations

import math
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from os import PathLike
from pathlib import Path
from typing import Any, Literal

from kcv2diffusers.errors import Error
from kcv2diffusers.keras_files import WRITERS
from kcv2diffusers.output import new_folder
from kcv2diffusers.pipeline import CONFIG_FILE, carried, write_json
from kcv2diffusers.plan import common_dtype
from kcv2diffusers.recognise import NAMES, Match
from kcv2diffusers.scheduler import read_scheduler
from kcv2diffusers.sources.locate import locate_all
from kcv2diffusers.sources.pipeline import Component, read_pipeline
from kcv2diffusers.stream import Progress, run_finite
from kcv2diffusers.tokenizer import copy_tokenizer

_SLACK = 32 << 20


@dataclass(frozen=True)
class ToKeras:
    """What was written: a file for each part, and the KerasCV class that loads it. Sizes in bytes."""

    out: Path
    files: dict[str, str]
    models: dict[str, str]
    bytes_written: int
    seconds: float

    def to_dict(self) -> dict[str, Any]:
        return asdict(self) | {"out": str(self.out)}


def to_keras(
    pipeline: str | PathLike[str],
    *,
    out: str | PathLike[str],
    format: Literal["weights.h5", "h5"] = "weights.h5",
    variant: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress = lambda done, total: None,
) -> ToKeras:
    """Write the parts of a diffusers pipeline as float32 files that KerasCV's `load_weights` takes.

    `pipeline` is a folder or hf://user/repo. `format` is "weights.h5" (Keras 3) or "h5" (Keras 2 and 3).
    Beside them stand the pipeline's `tokenizer/` and, for what `convert` could not know otherwise, a
    kcv2diffusers.json, so that it makes the same pipeline of the folder again. Raises Error with a message
    for the user; `out` is then as it was.
    """
    started = time.monotonic()
    if format not in WRITERS:
        raise Error(f"--format {format}: choose one of {', '.join(WRITERS)}.")
    source = locate_all(pipeline, pipelines=True, variant=variant)[0]
    components = read_pipeline(source, variant=variant)
    parts = {p: m.require_complete() for component in components.values() for p, m in component.parts.items()}
    needed = sum(4 * math.prod(t.shape) for match in parts.values() for _, t in match.slots())
    ours = {CONFIG_FILE, "tokenizer", *(f"{part}.{name}" for part in NAMES for name in WRITERS)}
    stated = _stated(source, components)
    with new_folder(
        Path(out),
        overwrite=overwrite,
        replaceable=lambda path: all(entry.name in ours for entry in path.iterdir()),
        needed=needed + _SLACK,
    ) as folder:
        files = {part: f"{part}.{format}" for part in parts}
        jobs = [job for part, match in parts.items() for job in WRITERS[format](folder / files[part], match)]
        if stated:
            write_json(folder / CONFIG_FILE, stated)
        copy_tokenizer(source / "tokenizer", folder / "tokenizer")
        run_finite(jobs, progress, allow_nonfinite=allow_nonfinite)
    models = {
        part: match.spec.keras_class
        + (
            f" (vocab_size={match.dims['vocabulary']})"
            if match.dims.get("vocabulary", 49408) != 49408
            else ""
        )
        for part, match in parts.items()
    }
    return ToKeras(Path(out), files, models, needed, time.monotonic() - started)


def _stated(source: Path, components: Mapping[str, Component]) -> dict[str, Any]:
    """The kcv2diffusers.json to write: configs, and the dtypes that are not those of the files here."""
    held = {folder: list(component.parts.values()) for folder, component in components.items()}
    configs = {folder: (matches[0], components[folder].config) for folder, matches in held.items()}
    dtypes = {folder: _dtype(matches) for folder, matches in held.items()}
    halved = {folder: name for folder, name in dtypes.items() if name != "float32"}
    return carried(configs, read_scheduler(source)) | ({"dtypes": halved} if halved else {})


def _dtype(matches: Sequence[Match]) -> str:
    return common_dtype(tensor for match in matches for tensor in match.found.values()).name
