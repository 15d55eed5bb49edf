"""Conversion of KerasCV checkpoints to a diffusers pipeline: gather the parts, check them together, write."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open

from kcv2diffusers.conversion.base import gather_with_base
from kcv2diffusers.conversion.component_config import config_for, scheduler_for, stated_dtype
from kcv2diffusers.conversion.embeddings import embedding_files
from kcv2diffusers.conversion.outline import SLACK, Moved, moved
from kcv2diffusers.conversion.result import Converted
from kcv2diffusers.conversion.to_single_file import check_format, to_single_file
from kcv2diffusers.conversion.tokenizers import plan_tokenizers
from kcv2diffusers.dtypes import ALIASES, DTYPES, full_name
from kcv2diffusers.errors import Error, no_choice
from kcv2diffusers.hub.address import shown, snapshots
from kcv2diffusers.json_text import write_json
from kcv2diffusers.maps.parts import families
from kcv2diffusers.maps.parts import parts as all_parts
from kcv2diffusers.maps.tables import Table, tables, tables_of
from kcv2diffusers.pipeline.configs import absent_arguments, model_index
from kcv2diffusers.pipeline.record import record
from kcv2diffusers.pipeline_files import (
    COMPONENT_CONFIG,
    CONVERSION_FILE,
    EMBEDDINGS_PATTERN,
    KOHYA_LORA_FILE,
    LORA_FILE,
    MODEL_INDEX,
    RUN_FILE,
    SAMPLES_FILE,
    SCHEDULER_FILE,
    VERIFICATION_FILE,
    with_variant,
)
from kcv2diffusers.progress import Progress, silent
from kcv2diffusers.sources.diffusers_pipeline import PREDICTION_TYPES
from kcv2diffusers.sources.gather import SourcePath, version_of
from kcv2diffusers.sources.locate import locate_all
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.system.output import check_free, check_target, new_folder
from kcv2diffusers.targets.lora_merge import Merge, check_merges, merged, read_merges
from kcv2diffusers.targets.safetensors import (
    Entry,
    common_dtype,
    diffusers_entries,
    write_safetensors,
    write_shards,
)
from kcv2diffusers.targets.stream import run_finite
from kcv2diffusers.targets.transfer import Job

# Files and folders that `convert` and `dreambooth --export` write in addition to the components.
_OUTPUT = (
    MODEL_INDEX,
    SCHEDULER_FILE.parent.name,
    CONVERSION_FILE,
    EMBEDDINGS_PATTERN,
    KOHYA_LORA_FILE,
    LORA_FILE,
    RUN_FILE,
    SAMPLES_FILE,
    VERIFICATION_FILE,
)

_HALVES = ("vae_decoder", "vae_encoder")


@dataclass(frozen=True)
class _Component:
    """A component to write: its tensors, their common dtype, and its config.json."""

    table: Table
    entries: list[Entry]
    dtype: np.dtype
    config: dict[str, Any]
    moved: list[Moved]
    restored: bool  # whether the dtype is the one that the pipeline had before `to_keras`

    @property
    def nbytes(self) -> int:
        return sum(math.prod(entry.shape) for entry in self.entries) * self.dtype.itemsize


def convert(
    *sources: SourcePath,
    out: SourcePath,
    base: SourcePath | Sequence[SourcePath] | Literal["none"] | None = None,
    tokenizer: SourcePath | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    with_sibling: bool = False,
    placeholder_tokens: Sequence[str] = (),
    image_size: int | None = None,
    gelu: Literal["exact", "tanh"] | None = None,
    prediction_type: str | None = None,
    vae: SourcePath | Literal["none"] | None = None,
    format: Literal["pipeline", "single-file"] | None = None,
    title: str | None = None,
    trigger_phrase: str | None = None,
    hashed: bool = True,
    lora: SourcePath | Sequence[SourcePath] = (),
    allow_pickle: bool = False,
    ema: bool = False,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
    **parts: SourcePath | None,
) -> Converted:
    """Write a diffusers pipeline into folder `out`, or a single file.

    `sources` are KerasCV checkpoints, folders of them, single `.safetensors` files in Stable Diffusion's
    original layout, or hf:// addresses. Their parts are detected from the contents. `parts` are the sources
    of single parts: `unet`, `text_encoder`, `vae_decoder`, `vae_encoder`. `vae` is the source of both halves
    of the VAE. `base` supplies missing parts: a diffusers pipeline folder, KerasCV parts, "tiny", or "none"
    to write only the given parts (default for SD1: the missing parts from the Hub). `with_sibling` takes the
    text encoder from the repository beside one that has none. `ema` selects the averaged UNet of single
    files. `lora` are LoRA files to merge, each a path or "PATH:STRENGTH". `allow_pickle` lets PyTorch's
    restricted unpickler open `.ckpt` files, which are never opened otherwise.

    `format` is "pipeline" or "single-file" (default: by the suffix of `out`). `dtype` is float32, float16 or
    bfloat16, or fp32, fp16 or bf16 (default: the dtype of a `variant` fp16, bf16 or fp32, else as stored).
    `placeholder_tokens` are the names of extra token embeddings, in order. A single file can also be made
    from a pipeline folder. It has no VAE if `vae` is "none". `title` (default: the file's name) and
    `trigger_phrase` are written into its metadata, and the SHA-256 of its tensors unless `hashed` is False.

    `image_size` is the pipeline's default height and width in pixels (default: 512). `gelu` is the activation
    of an SD2 text encoder (default: exact; see the documentation). `prediction_type` is "epsilon" or
    "v_prediction" (default: that of the UNet's pipeline, epsilon for KerasCV). The kcv2diffusers.json beside
    a checkpoint takes precedence over these defaults. The noise schedule comes with the UNet.

    A `dry_run` runs all checks except those of the values, writes nothing, and returns the plan. `progress`
    is called with the bytes done and in total. Raises Error with a message for the user; `out` is then
    unchanged.
    """
    started = time.monotonic()
    if unknown := parts.keys() - all_parts().keys():
        raise TypeError(f"convert() got an unexpected keyword argument {min(unknown)!r}")
    target, dtype = Path(out), _dtype(dtype, variant)
    merges = read_merges([lora] if isinstance(lora, (str, os.PathLike)) else lora)
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise no_choice("--prediction-type", prediction_type, PREDICTION_TYPES)
    if image_size is not None and (image_size < 64 or image_size % 64):
        raise Error(f"--image-size {image_size}: give a multiple of 64.")
    if vae is not None and vae != "none":
        parts = {**dict.fromkeys(_HALVES, vae), **{p: s for p, s in parts.items() if s is not None}}

    if check_format(target, format):
        if tokenizer is not None or placeholder_tokens:
            raise Error(
                "--tokenizer and --placeholder-token: a single file holds no tokenizer.\n"
                "Omit them, or write a pipeline."
            )
        return to_single_file(
            *sources,
            out=target,
            named=parts,
            unwanted=_HALVES if vae == "none" else (),
            base=base,
            dtype=dtype,
            variant=variant,
            with_sibling=with_sibling,
            image_size=image_size,
            gelu=gelu,
            prediction_type=prediction_type,
            title=title,
            trigger_phrase=trigger_phrase,
            hashed=hashed,
            merges=merges,
            allow_pickle=allow_pickle,
            ema=ema,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            dry_run=dry_run,
            progress=progress,
        )
    if vae == "none" or title is not None or trigger_phrase is not None or not hashed:
        raise Error(
            "--vae none, --title, --trigger-phrase and --no-hash are for single files.\n"
            "Give --out a name that ends in .safetensors, or omit them."
        )
    check_free(target, overwrite=overwrite, replaceable=is_output)
    notes: list[str] = []
    paths = [path for source in sources for path in locate_all(source)]
    gathered = gather_with_base(
        sources,
        paths,
        parts,
        base,
        variant=variant,
        with_sibling=with_sibling,
        notes=notes,
        allow_pickle=allow_pickle,
        ema=ema,
    )
    family, matches, filling = gathered.family, gathered.matches, gathered.base
    missing = [part for part in gathered.missing if part not in family.optional]
    complete = not missing and not gathered.only_given
    text = matches.get(family.tokenizer_part or "")
    check_merges(merges, matches.values())
    notes += [merge.text() for merge in merges]
    given = [*gathered.paths, *filling.paths, *snapshots(gathered.paths)]
    tokenizers = plan_tokenizers(family, matches, tokenizer, given, placeholder_tokens, gathered.only_given)
    scheduler, scheduler_origin = scheduler_for(
        family, matches.get(family.scheduler_part or ""), prediction_type
    )
    components = []
    for table in tables_of(family):
        if mine := [matches[part] for part in table.parts if part in matches]:
            vocabulary = next((t.files for t in tokenizers.values() if t.folder.part in table.parts), None)
            config = config_for(mine[0], filling, image_size, gelu, vocabulary)
            components.append(_component(table, mine, config, dtype, variant, merges))
    first = tokenizers.get(family.tokenizer_part or "")
    files = first.files if first else None
    earlier = files.placeholder_tokens if files and text and not text.of_pipeline else ()
    embeddings = embedding_files(text, [*earlier, *placeholder_tokens])
    notes += _remarks(components, complete and "safety_checker" in family.index, dtype)
    for match in matches.values():
        if match.source.path.resolve().is_relative_to(target.resolve()):
            raise Error(
                f"{match.source.path}: lies inside {target}, which would be replaced.\nChoose another --out."
            )
    needed = sum(component.nbytes for component in components)
    planned = Converted(
        out=target,
        version=version_of(matches),
        complete=complete,
        parts={part: f"{m.place} ({m.source.container})" for part, m in matches.items()},
        sources={part: match.source.path for part, match in matches.items() if not match.of_pipeline},
        base=filling.paths[0] if filling.components else None,
        dtypes={component.table.folder: component.dtype.name for component in components},
        missing=missing,
        bytes_read=sum(part.from_bytes for component in components for part in component.moved),
        bytes_written=needed,
        seconds=time.monotonic() - started,
        notes=notes,
        moved=[part for component in components for part in component.moved],
        scheduler=f"{scheduler['_class_name']}, {scheduler_origin}" if complete and scheduler else None,
        tokenizer=shown(first.origin) if first and first.origin else None,
        dry_run=dry_run,
        pipeline=family.index["_class_name"],
        absent=absent_arguments(family, matches) if complete else [],
    )
    if dry_run:
        check_target(target, overwrite=overwrite, replaceable=is_output, needed=needed + SLACK)
        return planned
    with new_folder(target, overwrite=overwrite, replaceable=is_output, needed=needed + SLACK) as folder:
        jobs = _lay_out(folder, components, embeddings, text, variant)
        total = run_finite(jobs, progress, allow_nonfinite=allow_nonfinite)
        for path in {job.target for job in jobs}:
            with safe_open(path, framework="numpy"):  # safetensors itself validates the header
                pass
        for planned_tokenizer in tokenizers.values():
            planned_tokenizer.write(folder)
        if complete:
            name = scheduler["_class_name"] if scheduler else None
            if scheduler:
                write_json(folder / SCHEDULER_FILE, scheduler)
            write_json(folder / MODEL_INDEX, model_index(family, name, matches))
            loras = [(merge.lora.path, merge.strength) for merge in merges]
            there = Path(os.path.abspath(target))  # noqa: PTH100
            write_json(folder / CONVERSION_FILE, record(matches, gathered.used, planned.dtypes, there, loras))
    return replace(planned, bytes_read=total, seconds=time.monotonic() - started)


def _component(
    table: Table,
    mine: Sequence[Match],
    config: dict[str, Any],
    dtype: str | None,
    variant: str | None,
    merges: Sequence[Merge],
) -> _Component:
    entries = [entry for match in mine for entry in diffusers_entries(merged(match, merges))]
    stated = None if dtype else stated_dtype(mine)
    name = dtype or stated
    kind = DTYPES[name] if name else common_dtype(t for match in mine for t in match.found.values())
    file = f"{table.folder}/{with_variant(table.weights, variant)}"
    return _Component(
        table, entries, kind, config, [moved(match, file, kind) for match in mine], stated is not None
    )


def _lay_out(
    folder: Path,
    components: Sequence[_Component],
    embeddings: Mapping[str, Entry],
    text: Match | None,
    variant: str | None,
) -> list[Job]:
    """Write each component's config, allocate its weight file, and return the jobs that fill the files."""
    jobs: list[Job] = []
    for component in components:
        table = component.table
        write_json(folder / table.folder / COMPONENT_CONFIG, component.config)
        path = folder / table.folder / with_variant(table.weights, variant)
        jobs += write_shards(path, component.entries, component.dtype)
        if text is not None and table is text.spec.table:
            for name, entry in embeddings.items():
                jobs += write_safetensors(folder / name, [entry], component.dtype)
    return jobs


def _remarks(components: Sequence[_Component], unchecked: bool, dtype: str | None) -> list[str]:
    """Return notes about properties of the result that the user may not expect.

    `unchecked` says that the pipeline could have a safety checker.
    """
    restored = [f"{c.table.folder} {c.dtype.name}" for c in components if c.restored]
    remarks = []
    if restored:
        remarks.append(
            f"As in the pipeline before to-keras: {', '.join(restored)}; --dtype float32 keeps every bit."
        )
    if unchecked:
        remarks.append("The safety checker is off: KerasCV has none.")
    return remarks


def _dtype(dtype: str | None, variant: str | None) -> str | None:
    """Return the full name of the requested dtype, from `dtype` or implied by `variant`; None if neither.

    Raises Error for an unknown dtype, or if the two contradict each other.
    """
    if dtype is not None and (dtype := full_name(dtype)) not in DTYPES:
        raise no_choice("--dtype", dtype, [*DTYPES, *ALIASES])
    implied = ALIASES.get(variant or "")
    if dtype and implied and dtype != implied:
        raise Error(
            f"--variant {variant} names files of {implied}, and --dtype is {dtype}.\n"
            "Omit one of the two, or give the variant another name."
        )
    return dtype or implied


def is_output(path: Path) -> bool:
    """Return whether a folder contains only files that `convert` writes, and may therefore be replaced."""
    tokenizers = (folder.name for family in families() for folder in family.tokenizers)
    names = [*_OUTPUT, *tokenizers, *(table.folder for table in tables().values())]
    return all(any(entry.match(name) for name in names) for entry in path.iterdir())
