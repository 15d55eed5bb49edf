"""What stands around the weights in a diffusers pipeline: configs, scheduler, model_index.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kcv2diffusers.diffusion import PIXELS_PER_LATENT
from kcv2diffusers.dtypes import DTYPES
from kcv2diffusers.errors import Error, SourceError
from kcv2diffusers.json_text import parse_object
from kcv2diffusers.maps.parts import Family, family_of
from kcv2diffusers.maps.tables import Size, Table, tables_of
from kcv2diffusers.pipeline.modelspec import OWN, own_sections, prediction_in
from kcv2diffusers.pipeline.scheduler import SCHEDULER, read_scheduler, scheduler_of
from kcv2diffusers.pipeline_files import CONFIG_FILE, SCHEDULER_FILE
from kcv2diffusers.sources.diffusers_pipeline import PREDICTION_TYPES, read_header
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.sources.source import Style
from kcv2diffusers.sources.tensor import values_of

# What transformers loads in where the user asks for nothing, whatever the weights are stored in. diffusers
# takes float32 then, and a pipeline of two dtypes fails.
LOADED = {"torch_dtype": "float32"}

# Entries of a config.json that say nothing about the model.
NOT_KEPT = {"_name_or_path", "_diffusers_version", "dtype", "torch_dtype", "transformers_version"}
_SAVE_AGAIN = "Correct it, or save the pipeline again with diffusers' save_pretrained."
# Sections of kcv2diffusers.json beside those of the components, as `to_keras` writes them: entries of
# config.json files that no table has, by component; the scheduler's config; the dtypes of a pipeline.
_OTHERS, _SCHEDULER, _DTYPES = "others", "scheduler", "dtypes"


def model_index(family: Family, scheduler: str | None) -> dict[str, Any]:
    """model_index.json of a family's pipeline with a scheduler of this class of diffusers (None: without)."""
    components = {table.folder: table.diffusers.split(".") for table in tables_of(family)}
    schedulers = {SCHEDULER_FILE.parent.name: ["diffusers", scheduler]} if scheduler else {}
    return {**family.index, **components, **schedulers}


def config_of(
    table: Table,
    version: str,
    dims: Mapping[str, int],
    *,
    image_size: int,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """config.json of a component from its table's entries, sizes filled in.

    `dims` are the table's symbols; "words" among them is the vocabulary without placeholder tokens, "bos" and
    "eos" the ids of its special tokens (default: its last two).
    `image_size` is in pixels; `overrides` replace entries.
    """
    words = dims.get("words", dims.get("vocabulary", 0))
    sizes = {
        **dims,
        "image_size": image_size,
        "sample_size": image_size // PIXELS_PER_LATENT,
        "bos": dims.get("bos", words - 2),
        "eos": dims.get("eos", words - 1),
    }
    module, name = table.diffusers.split(".")
    own = {"_class_name": name} if module == "diffusers" else LOADED
    entries = {**table.config, **table.versions[version].config, **(overrides or {})}
    return own | {key: _value(value, sizes) for key, value in entries.items()}


def untold(table: Table, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a component's config.json that its weights do not tell."""
    return {name: value for name, value in config.items() if name in table.untold}


def check_sizes(path: Path, match: Match, config: Mapping[str, Any], remedy: str = _SAVE_AGAIN) -> None:
    """Raise SourceError unless a model built from the config at `path` has the tensors that are there.

    What the shapes of a model follow from are its entries that have sizes in the table, and those of its
    structure; an entry that is left out has Stable Diffusion's own value.
    """
    table = match.spec.table
    wanted = config_of(table, match.version, match.dims, image_size=family_of([match.part]).image_size)
    for name in {**table.config, **table.versions[match.version].config}:
        shapes = _follows(table, name)
        if not (shapes or name in table.entries.structure):
            continue
        if name not in config and (match.known or not shapes):
            continue
        if (has := config.get(name)) != wanted[name]:
            raise SourceError(path, f"{name} is {has}, the weights have {wanted[name]}.", remedy)


def require_heads(match: Match, overrides: Mapping[str, Any]) -> None:
    """Raise Error for a model of unusual widths whose number of heads nobody states, or states wrongly."""
    folder, entries = match.spec.table.folder, match.spec.table.entries
    heads = entries.heads
    if not heads or (match.known and heads not in overrides):
        return
    if heads not in overrides:
        raise Error(
            f"{match.source.path}: a {match.label} of unusual widths, whose number of heads cannot be "
            f"read off the weights.\nPut {{{json.dumps(folder)}: {{{json.dumps(heads)}: N}}}} into "
            f"{_beside(match.source.path) / CONFIG_FILE}, or give a --base pipeline of the same shape."
        )
    widths = [match.dims[name] for name in entries.head_widths]
    stated = overrides[heads]
    numbers = stated if isinstance(stated, list) else [stated] * len(widths)
    if len(numbers) != len(widths) or not all(
        type(number) is int and number > 0 and width % number == 0
        for number, width in zip(numbers, widths, strict=True)
    ):
        raise Error(
            f"{match.source.path}: {heads} {stated} does not divide widths {', '.join(map(str, widths))}.\n"
            f"Correct it in {_beside(match.source.path) / CONFIG_FILE}."
        )


def _value(value: Any, dims: Mapping[str, int]) -> Any:
    if isinstance(value, list):
        return [_value(item, dims) for item in value]
    if isinstance(value, str) and value.startswith("$"):
        return Size.parse(value[1:]).value(dims)
    return value


def _beside(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def user_config(path: Path, table: Table) -> dict[str, Any]:
    """The entries for this component in the `kcv2diffusers.json` beside a checkpoint, if there is one.

    The file maps a component folder to entries of its config.json. Raises SourceError for anything else.
    """
    file, entries = _section(path, table.folder)
    known = table.known_entries
    if unknown := sorted(entries.keys() - known):
        problem = f"{table.folder}: unknown entries {', '.join(unknown)}."
        raise SourceError(file, problem, f"Known are {', '.join(sorted(known))}.")
    others = _section(path, _OTHERS)[1].get(table.folder, {})
    if not isinstance(others, dict):
        raise SourceError(file, f"{_OTHERS}: {table.folder} is not a JSON object.", "Correct it.")
    return {k: v for k, v in others.items() if _is_entry(k) and k not in known} | entries


def user_scheduler(path: Path) -> dict[str, Any]:
    """The scheduler's config that goes with a checkpoint: as the `kcv2diffusers.json` beside it states it,
    where that has no class with Stable Diffusion's own entries for the rest. Raises SourceError for a config
    that makes no sense.
    """
    file, stated = _section(path, _SCHEDULER)
    config = stated if "_class_name" in stated else SCHEDULER | stated
    scheduler_of(config, file)
    return config


def scheduler_with(unet: Match) -> tuple[dict[str, Any], Path]:
    """The config of the scheduler to write beside a UNet, which was trained with its noise schedule, and the
    file that states it: beside a checkpoint, or in the pipeline that it is from.
    """
    if unet.source.style is Style.NAMED:
        config = user_scheduler(unet.source.path)
        if _SCHEDULER not in (own_sections(unet.source.metadata) or {}):
            config = config | {"prediction_type": _prediction(unet)}
        return config, unet.source.path
    if unet.keras:
        return user_scheduler(unet.source.path), _beside(unet.source.path) / CONFIG_FILE
    file = unet.source.path.parent.parent / SCHEDULER_FILE
    return scheduler_of(read_scheduler(file.parent.parent), file), file


# What tells the two kinds of Stable Diffusion 2 apart in files that do not say: in the last layer of the UNet
# the biases of the first norm spread further where it was trained to predict v. ComfyUI decides by it too.
_V_TENSOR = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
_V_SPREAD = 0.09


def _prediction(unet: Match) -> str:
    """What the UNet of a single file predicts: as its metadata state, else as its weights tell for SD2."""
    if stated := prediction_in(unet.source.metadata):
        return stated
    tensor = unet.source.named.get(_V_TENSOR)
    if unet.version != "sd2" or not unet.known or tensor is None:
        return PREDICTION_TYPES[0]
    spread = float(values_of(tensor).astype(np.float64).std())
    return PREDICTION_TYPES[spread > _V_SPREAD]


def user_dtype(path: Path, table: Table) -> str | None:
    """The dtype of this component in the pipeline that `to_keras` made a checkpoint of, where it says so."""
    file, stated = _section(path, _DTYPES)
    name = stated.get(table.folder)
    if name is not None and (not isinstance(name, str) or name not in DTYPES):
        problem = f"{_DTYPES}: {str(name)[:40]!r} is none of {', '.join(DTYPES)}."
        raise SourceError(file, problem, "Correct it.")
    return name


def carried(
    components: Mapping[str, tuple[Match, Mapping[str, Any]]], scheduler: Mapping[str, Any]
) -> dict[str, Any]:
    """The `kcv2diffusers.json` with which `convert` finds back: what it would not write by itself into the
    config.json of each component, given with one of its parts, and into the scheduler's.
    """
    stated: dict[str, dict[str, Any]] = {_OTHERS: {}}
    for folder, (match, config) in components.items():
        table = match.spec.table
        size = family_of([match.part]).image_size
        written = config_of(table, match.version, match.dims, image_size=size)
        kept = {name: value for name, value in config.items() if _is_entry(name)}
        own = {k: v for k, v in kept.items() if k in written and v != written[k] and not _follows(table, k)}
        stated[folder] = ({} if match.known else untold(table, config)) | own
        stated[_OTHERS][folder] = {k: v for k, v in kept.items() if k not in written}
    stated[_OTHERS] = {folder: entries for folder, entries in stated[_OTHERS].items() if entries}
    kept = {name: value for name, value in scheduler.items() if name not in NOT_KEPT}
    stated[_SCHEDULER] = {} if kept == SCHEDULER else kept
    return {name: entries for name, entries in stated.items() if entries}


def _is_entry(name: str) -> bool:
    return not name.startswith("_") and name not in NOT_KEPT


def _follows(table: Table, name: str) -> bool:
    """Whether an entry of config.json follows from the shapes of the weights."""
    return "$" in str(table.config.get(name)) and name not in table.entries.choices


def _section(path: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """The file that states something of a checkpoint, and a section of it, empty where there is none.

    A single file that `convert` wrote states it itself; for others it is the `kcv2diffusers.json` beside.
    """
    folder = _beside(path)
    if path.suffix == ".safetensors" and path.is_file() and OWN in (metadata := read_header(path)[1]):
        own = own_sections(metadata)
        held = None if own is None else own.get(name, {})
        if not isinstance(held, dict):
            raise SourceError(path, "its metadata of kcv2diffusers are not what convert writes.")
        return path, held
    file = next((f for f in (folder / CONFIG_FILE, folder.parent / CONFIG_FILE) if f.is_file()), None)
    if file is None or (file.parent != folder and not path.is_dir()):
        return folder / CONFIG_FILE, {}
    data = parse_object(file.read_bytes()[: 1 << 20])
    section = None if data is None else data.get(name, {})
    if not isinstance(section, dict):
        example = '{"text_encoder": {"num_attention_heads": 12}}'
        problem = "not a JSON object of component names and their config entries."
        raise SourceError(file, problem, f"Correct it; for example: {example}")
    return file, section
