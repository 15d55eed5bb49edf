"""What stands around the weights in a diffusers pipeline: configs, scheduler, model_index.json."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from kcv2diffusers.errors import Error, SourceError
from kcv2diffusers.recognise import NAMES, Match
from kcv2diffusers.tables import Size, Table

CONFIG_FILE = "kcv2diffusers.json"
# What transformers loads in where the user asks for nothing, whatever the weights are stored in. diffusers
# takes float32 then, and a pipeline of two dtypes fails.
LOADED = {"torch_dtype": "float32"}
IMAGE_SIZE = 512  # height and width in pixels where nobody states another
# What cannot be read off the shapes of a model of unusual widths, by component folder.
HEADS = {"unet": "attention_head_dim", "text_encoder": "num_attention_heads"}

# KerasCV's sampler visits integer timesteps of its own choosing. This scheduler, given those as
# `timesteps=`, replays it; DDIM cannot, because it derives the previous timestep by itself. Without
# `timesteps=` the offset counts, and diffusers warns of any but 1.
SCHEDULER = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
_MODEL_INDEX: dict[str, Any] = {
    "_class_name": "StableDiffusionPipeline",
    "feature_extractor": [None, None],
    "image_encoder": [None, None],
    "requires_safety_checker": False,
    "safety_checker": [None, None],
    "scheduler": ["diffusers", SCHEDULER["_class_name"]],
    "tokenizer": ["transformers", "CLIPTokenizer"],
}


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8")


def model_index(tables: Mapping[str, Table]) -> dict[str, Any]:
    """model_index.json of a pipeline of these components."""
    return _MODEL_INDEX | {name: table.diffusers.split(".") for name, table in tables.items()}


def config_of(
    table: Table,
    version: str,
    dims: Mapping[str, int],
    *,
    image_size: int,
    overrides: Mapping[str, Any] | None = None,
) -> dict[str, Any]:
    """config.json of a component from its table's entries, sizes filled in.

    `dims` are the table's symbols; "words" among them is the vocabulary without placeholder tokens.
    `image_size` is in pixels; `overrides` replace entries.
    """
    words = dims.get("words", dims.get("vocabulary", 0))
    sizes = {
        **dims,
        "image_size": image_size,
        "sample_size": image_size // 8,
        "bos": words - 2,
        "eos": words - 1,
    }
    module, name = table.diffusers.split(".")
    own = {"_class_name": name} if module == "diffusers" else LOADED
    entries = {**table.config, **table.versions[version].config, **(overrides or {})}
    return own | {key: _value(value, sizes) for key, value in entries.items()}


def untold(table: Table, config: Mapping[str, Any]) -> dict[str, Any]:
    """The entries of a component's config.json that its weights do not tell."""
    names = {"norm_num_groups", *(name for version in table.versions.values() for name in version.config)}
    return {name: value for name, value in config.items() if name in names}


def require_heads(match: Match, overrides: Mapping[str, Any]) -> None:
    """Raise Error for a model of unusual widths whose number of heads nobody states, or states wrongly."""
    folder = match.spec.table.folder
    heads = HEADS.get(folder)
    if not heads or (match.known and heads not in overrides):
        return
    if heads not in overrides:
        raise Error(
            f"{match.source.path}: a {NAMES[match.part]} of unusual widths, whose number of heads cannot be "
            f"read off the weights.\nPut {{{json.dumps(folder)}: {{{json.dumps(heads)}: N}}}} into "
            f"{_beside(match.source.path) / CONFIG_FILE}, or give a --base pipeline of the same shape."
        )
    widths = [match.dims[name] for name in ("width", "c0", "c1", "c2", "c3") if name in match.dims]
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
    folder = _beside(path)
    file = next((f for f in (folder / CONFIG_FILE, folder.parent / CONFIG_FILE) if f.is_file()), None)
    if file is None or (file.parent != folder and not path.is_dir()):
        return {}
    try:
        data = json.loads(file.read_bytes()[: 1 << 20])
        entries = data.get(table.folder, {})
        known = {*table.config, *(k for v in table.versions.values() for k in v.config)}
        unknown = sorted(entries.keys() - known)
    except (ValueError, AttributeError, TypeError, RecursionError):
        example = '{"text_encoder": {"num_attention_heads": 12}}'
        problem = "not a JSON object of component names and their config entries."
        raise SourceError(file, problem, f"Correct it; for example: {example}") from None
    if unknown:
        problem = f"{table.folder}: unknown entries {', '.join(unknown)}."
        raise SourceError(file, problem, f"Known are {', '.join(sorted(known))}.")
    return dict(entries)
