"""The config files of a diffusers pipeline: config.json, scheduler, model_index.json."""

from __future__ import annotations

import json
from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

import numpy as np

from kcv2diffusers.diffusion import PIXELS_PER_LATENT
from kcv2diffusers.dtypes import DTYPES
from kcv2diffusers.errors import Error, SourceError
from kcv2diffusers.json_text import parse_object
from kcv2diffusers.maps.parts import Family, family_of
from kcv2diffusers.maps.sizes import Size, solved
from kcv2diffusers.maps.tables import REPEAT, Table, flag, tables_of
from kcv2diffusers.pipeline.modelspec import OWN, own_sections, prediction_in
from kcv2diffusers.pipeline.scheduler import SCHEDULER, read_scheduler, scheduler_of
from kcv2diffusers.pipeline_files import COMPONENT_CONFIG, CONFIG_FILE, SCHEDULER_FILE
from kcv2diffusers.sources.diffusers_pipeline import PREDICTION_TYPES, read_header, read_json
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.sources.source import Style
from kcv2diffusers.sources.tensor import values_of

# By default transformers loads a model in this dtype, whatever dtype is stored. diffusers loads in float32 by
# default, and a pipeline with two dtypes fails.
LOADED = {"torch_dtype": "float32"}

# Entries of a config.json that do not describe the model.
NOT_KEPT = {"_name_or_path", "_diffusers_version", "dtype", "torch_dtype", "transformers_version"}
_SAVE_AGAIN = "Correct it, or save the pipeline again with diffusers' save_pretrained."
# Sections of kcv2diffusers.json that `to_keras` writes in addition to those of the components: entries of
# config.json files that are in no table, by component; the scheduler's config; the dtypes of a pipeline.
_OTHERS, _SCHEDULER, _DTYPES = "others", "scheduler", "dtypes"


def model_index(family: Family, scheduler: str | None, held: Collection[str]) -> dict[str, Any]:
    """Return model_index.json for a pipeline with the parts `held`.

    `scheduler` is a diffusers class name (None: no scheduler).
    """
    components = {
        table.folder: table.diffusers.split(".") if set(table.parts) & set(held) else [None, None]
        for table in tables_of(family)
    } | {t.name: ["transformers", t.kind] if t.part in held else [None, None] for t in family.tokenizers}
    schedulers = {SCHEDULER_FILE.parent.name: ["diffusers", scheduler]} if scheduler else {}
    return {**family.index, **components, **schedulers}


def absent_arguments(family: Family, held: Collection[str]) -> list[str]:
    """Return the components that a pipeline with the parts `held` lacks.

    diffusers loads it only if they are given as None.
    """
    lacking = set(family.optional) - set(held)
    folders = [table.folder for table in tables_of(family) if lacking & set(table.parts)]
    return [*folders, *(t.name for t in family.tokenizers if t.part in lacking)]


def config_of(
    table: Table,
    version: str,
    dims: Mapping[str, int],
    *,
    image_size: int,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """Return config.json of a component: the entries of its table with sizes filled in.

    `dims` are the values of the table's symbols and flags. A flag without a block number becomes the list of
    the blocks that have it. "words" is the vocabulary size without placeholder tokens;
    "bos" and "eos" are the ids of its special tokens (default: its last two). `image_size` is in pixels.
    `overrides` replace entries.
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
    stated = overrides or {}
    sizes |= {
        symbol: stated[entry] for symbol, entry in table.stated.items() if type(stated.get(entry)) is int
    }
    sizes = solved(sizes, table.equal)
    blocks = {
        f"${name}": [i for i in range(sizes.get(REPEAT, 0)) if sizes.get(flag(name, i))]
        for name in table.flags
    }
    entries = {**table.config, **table.versions[version].config, **stated}
    return own | {name: _value(value, sizes, blocks) for name, value in entries.items()}


def untold(table: Table, config: Mapping[str, Any]) -> dict[str, Any]:
    """Return the entries of a component's config.json that cannot be inferred from its weights."""
    return {name: value for name, value in config.items() if name in table.untold}


def check_sizes(path: Path, match: Match, config: Mapping[str, Any], remedy: str = _SAVE_AGAIN) -> None:
    """Raise SourceError if the config at `path` describes a model with other tensor shapes than `match`.

    Only entries that determine shapes are compared: those with a size in the table, and the structural ones.
    A missing entry defaults to the value of Stable Diffusion.
    """
    table = match.spec.table
    wanted = config_of(table, match.version, match.dims, image_size=family_of([match.part]).image_size)
    for name in {**table.config, **table.versions[match.version].config}:
        shapes = _follows(table, name)
        if not (shapes or name in table.entries.structure):
            continue
        if name not in config and (match.known or not shapes):
            continue
        if shapes and wanted[name] is None:  # of another part of the component
            continue
        if (has := config.get(name)) != wanted[name]:
            raise SourceError(path, f"{name} is {has}, the weights have {wanted[name]}.", remedy)


def require_heads(match: Match, overrides: Mapping[str, Any]) -> None:
    """Raise Error for a model of non-standard widths if its number of heads is missing or invalid."""
    folder, entries = match.spec.table.folder, match.spec.table.entries
    heads = entries.heads
    told = next((symbol for symbol, entry in match.spec.table.stated.items() if entry == heads), None)
    if not heads or ((match.known or told in match.dims) and heads not in overrides):
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


def _value(value: Any, dims: Mapping[str, int], blocks: Mapping[str, list[int]]) -> Any:
    if isinstance(value, list):
        return [_value(item, dims, blocks) for item in value]
    if isinstance(value, str) and value.startswith("$"):
        return blocks[value] if value in blocks else Size.parse(value[1:]).value(dims)
    return value


def _beside(path: Path) -> Path:
    return path if path.is_dir() else path.parent


def user_config(path: Path, table: Table) -> dict[str, Any]:
    """Return the entries for this component in the `kcv2diffusers.json` beside a checkpoint.

    The result is {} if there is no such file. The file maps component folders to entries of their
    config.json. Raises SourceError for any other content.
    """
    file, entries = _section(path, table.folder)
    known = table.known_entries
    if unknown := sorted(entries.keys() - known):
        problem = f"{table.folder}: unknown entries {', '.join(unknown)}."
        raise SourceError(file, problem, f"Known are {', '.join(sorted(known))}.")
    others = _section(path, _OTHERS)[1].get(table.folder, {})
    if not isinstance(others, dict):
        raise SourceError(file, f"{_OTHERS}: {table.folder} is not a JSON object.", "Correct it.")
    added = {k: v for k, v in others.items() if _is_entry(k) and k not in known}
    return _of_preset(path, table) | added | entries


def _of_preset(path: Path, table: Table) -> dict[str, Any]:
    """Return the entries that the config.json of a KerasHub preset beside a checkpoint states.

    It is a serialized Keras model. Only whole numbers are read; nothing is deserialized.
    """
    file = _beside(path) / COMPONENT_CONFIG
    data = parse_object(file.read_bytes()[: 1 << 20]) if table.preset and file.is_file() else None
    held = (data or {}).get("config")
    stated = held if isinstance(held, dict) else {}
    return {name: n for name, key in table.preset.items() if type(n := stated.get(key)) is int}


def user_scheduler(path: Path) -> dict[str, Any]:
    """Return the scheduler config of a checkpoint, from the `kcv2diffusers.json` beside it.

    If the stated config names no class, its missing entries are those of Stable Diffusion. Raises SourceError
    for an invalid config.
    """
    file, stated = _section(path, _SCHEDULER)
    config = stated if "_class_name" in stated else SCHEDULER | stated
    scheduler_of(config, file)
    return config


def scheduler_with(unet: Match) -> tuple[dict[str, Any], Path]:
    """Return the scheduler config to write for a UNet, and the file that it comes from.

    The config holds the noise schedule with which the UNet was trained. The file is beside the checkpoint, or
    in the pipeline of the UNet.
    """
    fixed = family_of([unet.part]).scheduler
    if fixed:
        return _fixed_scheduler(unet, fixed)
    if unet.source.style is Style.NAMED:
        config = user_scheduler(unet.source.path)
        if _SCHEDULER not in (own_sections(unet.source.metadata) or {}):
            config = config | {"prediction_type": _prediction(unet)}
        return config, unet.source.path
    if unet.keras:
        return user_scheduler(unet.source.path), _beside(unet.source.path) / CONFIG_FILE
    file = unet.source.path.parent.parent / SCHEDULER_FILE
    return scheduler_of(read_scheduler(file.parent.parent), file), file


def _fixed_scheduler(trained: Match, config: Mapping[str, Any]) -> tuple[dict[str, Any], Path]:
    """Return the scheduler config of a part of a family that has one for all models; see `scheduler_with`.

    Entries that the pipeline of the part, or the kcv2diffusers.json beside it, states are kept. Raises
    SourceError if it states another class.
    """
    if trained.keras:
        file, stated = _section(trained.source.path, _SCHEDULER)
    else:
        file = trained.source.path.parent.parent / SCHEDULER_FILE
        stated = read_json(file) if file.is_file() else {}
    if (name := stated.get("_class_name", config["_class_name"])) != config["_class_name"]:
        raise SourceError(
            file, f"_class_name is {str(name)[:40]!r}, not {config['_class_name']}.", "Correct it."
        )
    return {**config, **{key: value for key, value in stated.items() if key not in NOT_KEPT}}, file


# These detect the prediction type of Stable Diffusion 2 in files that do not state it: in the UNet's last
# transformer block, the biases of the first norm have a larger standard deviation if the UNet was trained for
# v prediction. ComfyUI uses the same test.
_V_TENSOR = "up_blocks.3.attentions.2.transformer_blocks.0.norm1.bias"
_V_SPREAD = 0.09


def _prediction(unet: Match) -> str:
    """Return the prediction type of a single file's UNet, from its metadata, else (SD2) from its weights."""
    if stated := prediction_in(unet.source.metadata):
        return stated
    tensor = unet.source.named.get(_V_TENSOR)
    if unet.version != "sd2" or not unet.known or tensor is None:
        return PREDICTION_TYPES[0]
    spread = float(values_of(tensor).astype(np.float64).std())
    return PREDICTION_TYPES[spread > _V_SPREAD]


def user_dtype(path: Path, table: Table) -> str | None:
    """Return this component's dtype in the pipeline that `to_keras` converted to the checkpoint.

    None if the checkpoint's kcv2diffusers.json does not state it. Raises SourceError for an unknown dtype.
    """
    file, stated = _section(path, _DTYPES)
    name = stated.get(table.folder)
    if name is not None and (not isinstance(name, str) or name not in DTYPES):
        problem = f"{_DTYPES}: {str(name)[:40]!r} is none of {', '.join(DTYPES)}."
        raise SourceError(file, problem, "Correct it.")
    return name


def carried(
    components: Mapping[str, tuple[Match, Mapping[str, Any]]], scheduler: Mapping[str, Any]
) -> dict[str, Any]:
    """Return the `kcv2diffusers.json` with which `convert` restores the original configs.

    It contains only what `convert` would not write by default into each component's config.json and into the
    scheduler's. `components` maps a folder to one of its parts and its config.json.
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
    usual = family_of(match.part for match, _ in components.values()).scheduler or SCHEDULER
    stated[_SCHEDULER] = {} if kept == usual else kept
    return {name: entries for name, entries in stated.items() if entries}


def _is_entry(name: str) -> bool:
    return not name.startswith("_") and name not in NOT_KEPT


def _follows(table: Table, name: str) -> bool:
    """Return whether an entry of config.json can be inferred from the shapes of the weights."""
    return "$" in str(table.config.get(name)) and name not in table.entries.choices


def _section(path: Path, name: str) -> tuple[Path, dict[str, Any]]:
    """Return the file with the config of a checkpoint, and section `name` of it, {} if there is none.

    A single file that `convert` wrote has the config in its own metadata. For all other checkpoints it is in
    the `kcv2diffusers.json` beside them.
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
