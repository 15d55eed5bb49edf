"""Conversion of any source to one `.safetensors` file in the original layout, for ComfyUI and A1111."""

from __future__ import annotations

import time
import tomllib
from collections.abc import Collection, Mapping, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

from safetensors import safe_open

from kcv2diffusers.conversion.base import Base, bases_of, gather_with_base
from kcv2diffusers.conversion.component_config import config_for, scheduler_for, stated_dtype
from kcv2diffusers.conversion.outline import Moved, moved
from kcv2diffusers.conversion.result import Converted
from kcv2diffusers.diffusion import PIXELS_PER_LATENT
from kcv2diffusers.dtypes import DTYPES
from kcv2diffusers.errors import Error, no_choice
from kcv2diffusers.maps.original import namings
from kcv2diffusers.maps.parts import Family, label
from kcv2diffusers.maps.tables import Table, tables_of
from kcv2diffusers.pipeline.configs import carried
from kcv2diffusers.pipeline.modelspec import OWN, modelspec, own_entry
from kcv2diffusers.pipeline.scheduler import SCHEDULER
from kcv2diffusers.pipeline_files import RUN_FILE
from kcv2diffusers.progress import Progress
from kcv2diffusers.sources.diffusers_pipeline import is_pipeline, read_header
from kcv2diffusers.sources.gather import SourcePath, version_of
from kcv2diffusers.sources.locate import locate_all
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.sources.tensor import rows
from kcv2diffusers.system.output import check_folder, check_free_file, new_file
from kcv2diffusers.targets.lora_merge import Merge, check_merges, merged
from kcv2diffusers.targets.safetensors import Stored, common_dtype
from kcv2diffusers.targets.single_file import to_original, write_single_file

ENDING = ".safetensors"
FORMATS = ("pipeline", "single-file")
_SLACK = 1 << 20  # bytes for the header and the folder


def check_format(out: Path, form: str | None) -> bool:
    """Return whether `convert` writes a single file: from `form` if given, else from the suffix of `out`.

    Raises Error for an unknown form, and for a single file with a suffix other than `.safetensors`.
    """
    if form not in (None, *FORMATS):
        raise no_choice("--format", form, FORMATS)
    if form == "single-file" and out.suffix != ENDING:
        raise Error(f"{out}: a single file ends in {ENDING}.\nGive --out {out.name or 'model'}{ENDING}.")
    return form == "single-file" or (form is None and out.suffix == ENDING)


def to_single_file(
    *sources: SourcePath,
    out: Path,
    named: Mapping[str, SourcePath | None],
    unwanted: Collection[str],
    base: SourcePath | Sequence[SourcePath] | None,
    dtype: str | None,
    variant: str | None,
    with_sibling: bool,
    image_size: int | None,
    gelu: str | None,
    prediction_type: str | None,
    title: str | None,
    trigger_phrase: str | None,
    hashed: bool,
    merges: Sequence[Merge],
    allow_pickle: bool,
    ema: bool,
    overwrite: bool,
    allow_nonfinite: bool,
    dry_run: bool,
    progress: Progress,
) -> Converted:
    """Write one file. The arguments are those of `convert`, which has checked them.

    The sources may include a diffusers pipeline. The file does not contain the `unwanted` parts.
    """
    started = time.monotonic()
    check_free_file(out, overwrite=overwrite, replaceable=is_output)
    notes: list[str] = []
    paths = [path for source in sources for path in locate_all(source, pipelines=True, variant=variant)]
    folders = [path for path in paths if is_pipeline(path)]
    if folders:
        base = [*folders, *bases_of(base)]
        paths = [path for path in paths if path not in folders]
    gathered = gather_with_base(
        sources,
        paths,
        named,
        base,
        variant=variant,
        with_sibling=with_sibling,
        notes=notes,
        unwanted=unwanted,
        allow_pickle=allow_pickle,
        ema=ema,
    )
    family, matches, filling = gathered.family, gathered.matches, gathered.base
    _check(out, family, matches)
    if (text := family.tokenizer_part) in matches and text is not None:
        matches[text] = _own_vocabulary(matches[text], notes)
    scheduler, origin = scheduler_for(family, matches.get(family.scheduler_part or ""), prediction_type)
    check_merges(merges, matches.values())
    notes += [merge.text() for merge in merges]
    tensors, dtypes, outline = _plan(out, family, matches, dtype, merges)
    configs = _configs(family, matches, filling, image_size, gelu)
    size = _image_size(family, configs, image_size)
    metadata = modelspec(
        title=title or out.stem,
        family=family,
        version=version_of(matches),
        components=list(dtypes),
        prediction_type=(scheduler or SCHEDULER)["prediction_type"],
        image_size=(size, size),
        trigger_phrase=trigger_phrase or _trained_on(folders),
    ) | own_entry(carried(configs, scheduler or SCHEDULER))
    needed = sum(tensor.nbytes for tensor in tensors)
    planned = Converted(
        out=out,
        version=version_of(matches),
        complete=not gathered.missing,
        parts={part: f"{m.place} ({m.source.container})" for part, m in matches.items()},
        sources={part: match.source.path for part, match in matches.items() if not match.of_pipeline},
        base=filling.paths[0] if filling.components else None,
        dtypes=dtypes,
        missing=gathered.missing,
        bytes_read=sum(part.from_bytes for part in outline),
        bytes_written=needed,
        seconds=time.monotonic() - started,
        notes=notes,
        moved=outline,
        scheduler=f"{scheduler['prediction_type']}, {origin}" if scheduler else None,
        tokenizer=None,
        dry_run=dry_run,
        metadata=metadata,
    )
    if dry_run:
        check_folder(out.absolute().parent, needed + _SLACK)
        return planned
    with new_file(out, overwrite=overwrite, replaceable=is_output, needed=needed + _SLACK) as file:
        total = write_single_file(
            file, tensors, metadata, progress, allow_nonfinite=allow_nonfinite, hashed=hashed
        )
        with safe_open(file, framework="numpy") as opened:  # safetensors itself validates the header
            written = dict(opened.metadata())
    return replace(planned, bytes_read=total, metadata=written, seconds=time.monotonic() - started)


def _check(out: Path, family: Family, matches: Mapping[str, Match]) -> None:
    """Raise Error if the file would replace a source, or if a part has no names in the original layout."""
    for part, match in matches.items():
        if match.source.path.resolve() == out.resolve():
            raise Error(f"{out}: is read from, and would be replaced.\nChoose another --out.")
        if match.spec.table.name not in namings() or not family.modelspec:
            raise Error(
                f"--out {out.name}: no single file has a place for the {label(part)}.\n"
                "Write a pipeline folder."
            )


def _plan(
    out: Path, family: Family, matches: Mapping[str, Match], dtype: str | None, merges: Sequence[Merge]
) -> tuple[list[Stored], dict[str, str], list[Moved]]:
    """Return the tensors to write, the dtype of each component, and the outline.

    The dtype is the requested one, else that before `to_keras`, else the stored one.
    """
    tensors: list[Stored] = []
    dtypes: dict[str, str] = {}
    outline: list[Moved] = []
    for table, mine in _by_table(family, matches):
        kept = dtype or stated_dtype(mine)
        kind = DTYPES[kept] if kept else common_dtype(t for match in mine for t in match.found.values())
        dtypes[table.folder] = kind.name
        for match in mine:
            tensors += to_original(merged(match, merges), kind)
            outline.append(moved(match, out.name, kind))
    return tensors, dtypes, outline


def _configs(
    family: Family, matches: Mapping[str, Match], base: Base, image_size: int | None, gelu: str | None
) -> dict[str, tuple[Match, dict[str, Any]]]:
    """Return one part and the config.json of each component folder."""
    return {
        table.folder: (mine[0], config_for(mine[0], base, image_size, gelu, None))
        for table, mine in _by_table(family, matches)
    }


def _by_table(family: Family, matches: Mapping[str, Match]) -> list[tuple[Table, list[Match]]]:
    held = [
        (table, [matches[part] for part in table.parts if part in matches]) for table in tables_of(family)
    ]
    return [(table, mine) for table, mine in held if mine]


def _image_size(
    family: Family, configs: Mapping[str, tuple[Match, dict[str, Any]]], given: int | None
) -> int:
    """Return the width and height in pixels that the model was trained for, or that `given` states."""
    latents = configs["unet"][1].get("sample_size") if "unet" in configs else None
    return given or (PIXELS_PER_LATENT * latents if type(latents) is int else family.image_size)


def _trained_on(folders: Sequence[Path]) -> str | None:
    """Return the instance prompt of a pipeline that `dreambooth` exported, None if there is none."""
    for folder in folders:
        try:
            stated = tomllib.loads((folder / RUN_FILE).read_text(encoding="utf-8"))
        except (OSError, ValueError):
            continue
        if isinstance(prompt := stated.get("instance_prompt"), str):
            return prompt
    return None


def _own_vocabulary(text: Match, notes: list[str]) -> Match:
    """Return the text encoder without the rows of placeholder tokens, which other programs do not support."""
    usual = text.spec.nominal["vocabulary"]
    extra = text.dims["vocabulary"] - usual
    if extra <= 0:
        return text
    notes.append(
        f"Left out: {extra} token embedding{'s' if extra > 1 else ''} beyond the vocabulary's {usual} "
        "(textual inversion). Convert to a pipeline with --placeholder-token to have embedding files."
    )
    found = {
        slot: rows(tensor, 0, usual) if slot.target.endswith("token_embedding.weight") else tensor
        for slot, tensor in text.found.items()
    }
    return replace(text, found=found, dims={**text.dims, "vocabulary": usual})


def is_output(path: Path) -> bool:
    """Return whether `convert` wrote a file, which may therefore be replaced."""
    try:
        return path.is_file() and OWN in read_header(path)[1]
    except Error:
        return False
