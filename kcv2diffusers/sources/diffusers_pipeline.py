"""Read a diffusers pipeline folder as a source: its `.safetensors` files, fitted to the same tables."""

from __future__ import annotations

import json
import math
from collections import Counter
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from kcv2diffusers.dtypes import SAFETENSORS
from kcv2diffusers.errors import SourceError, plain, reading
from kcv2diffusers.json_text import parse_object
from kcv2diffusers.maps.parts import families, family_named
from kcv2diffusers.maps.tables import Table, specs, tables, tables_of
from kcv2diffusers.pipeline_files import (
    COMPONENT_CONFIG,
    MODEL_INDEX,
    SCHEDULER_FILE,
    index_name,
    weight_names,
)
from kcv2diffusers.sources.foreign import require_own
from kcv2diffusers.sources.recognise import Match, fit_diffusers
from kcv2diffusers.sources.source import Source, Style
from kcv2diffusers.sources.tensor import Tensor

_MAX_HEADER = 100 << 20
_MAX_INDEX = 16 << 20
PREDICTION_TYPES = ("epsilon", "v_prediction")
_FAMILIES_READ = "The pipelines of Stable Diffusion 1, 2 and 3 that draw from text are read."
_MERGE = (
    "Merge it first: pipe.fuse_lora(), pipe.unload_lora_weights(), then save_pretrained into another folder."
)
# Entries of config.json or model_index.json that identify other families, and the names of these in messages.
_FAMILIES = (
    ("in_channels", 9, "an inpainting model (9 input channels)"),
    ("in_channels", 8, "an InstructPix2Pix model (8 input channels)"),
    ("in_channels", 7, "an upscaling model (7 input channels)"),
    ("in_channels", 5, "a depth model (5 input channels)"),
    ("addition_embed_type", "text_time", "Stable Diffusion XL"),
    ("addition_embed_type", "image", "Kandinsky"),
    ("_class_name", "StableDiffusionXLPipeline", "Stable Diffusion XL"),
    ("_class_name", "FluxPipeline", "Flux"),
    ("_class_name", "FluxTransformer2DModel", "Flux"),
    ("_class_name", "UNetSpatioTemporalConditionModel", "Stable Video Diffusion"),
    ("_class_name", "UNet3DConditionModel", "a video model"),
    ("_class_name", "UNetMotionModel", "AnimateDiff"),
    ("_class_name", "ControlNetModel", "ControlNet"),
    ("time_cond_proj_dim", 256, "a latent consistency model"),
)
_RESAVE = "Save the pipeline again with diffusers' save_pretrained."


@dataclass(frozen=True)
class Component:
    """A component folder of a pipeline: its config.json, the parts in its weights, unmatched tensors."""

    path: Path
    config: dict[str, Any]
    parts: dict[str, Match]
    stray: list[Tensor] = field(default_factory=list)


def is_pipeline(path: Path) -> bool:
    """Whether `path` is a folder with model_index.json or with at least one diffusers component."""
    return (path / MODEL_INDEX).is_file() or any(
        (path / table.folder / COMPONENT_CONFIG).is_file() for table in tables().values()
    )


def read_pipeline(
    folder: Path, wanted: Collection[str] | None = None, variant: str | None = None, *, strict: bool = True
) -> dict[str, Component]:
    """The components of a diffusers pipeline by folder name: all, or those of `wanted` that exist.

    `variant` is the variant of the weight files. Raises SourceError if the folder is not a pipeline, if a
    file is damaged, if a component has only pickled weights, or, if `strict`, if a tensor belongs to no part.
    """
    if not folder.is_dir():
        raise SourceError(folder, "no such folder.", "Check the path.")
    index = _index(folder)
    if strict and (other := _other_family(index)):
        raise SourceError(folder, f"of {other}, which is not read here.", _FAMILIES_READ)
    candidates: dict[str, list[Table]] = {}
    for table in _tables(folder, index.get("_class_name")):
        candidates.setdefault(table.folder, []).append(table)
    found = {}
    for name, possible in candidates.items():
        component = folder / name
        with reading(component):
            if component.is_dir() and (wanted is None or name in wanted):
                found[name] = _component(component, possible, variant, strict)
    if not found and wanted is None:
        _refuse_family(folder)
        known = sorted({table.folder for table in tables().values()})
        raise SourceError(
            folder,
            f"not a diffusers pipeline folder (no {'/, '.join(known)}/ inside).",
            "Check the path.",
        )
    return found


def _index(folder: Path) -> dict[str, Any]:
    """The entries of a pipeline's model_index.json; empty if it is not there or not JSON."""
    path = folder / MODEL_INDEX
    with reading(path):
        return (parse_object(path.read_bytes()[: 1 << 20]) if path.is_file() else None) or {}


def _tables(folder: Path, pipeline_class: object) -> list[Table]:
    """The tables of a pipeline's components: those of the family of the class in its model_index.json.

    Without one it is each family that has the most of the component folders, as a text_encoder/ may belong to
    several.
    """
    family = family_named(pipeline_class) if isinstance(pipeline_class, str) else None
    if family:
        return tables_of(family)
    possible = [tables_of(family) for family in families()]
    held = [len({table.folder for table in each if (folder / table.folder).is_dir()}) for each in possible]
    return [table for each, n in zip(possible, held, strict=True) if n == max(held) for table in each]


def _refuse_family(folder: Path) -> None:
    """Raise SourceError if `folder`, which has no known component, has a model_index.json."""
    if (folder / MODEL_INDEX).is_file():
        name = read_json(folder / MODEL_INDEX).get("_class_name")
        raise SourceError(folder, f"a pipeline of another family ({name}).", _FAMILIES_READ)


def prediction_of(folder: Path) -> str:
    """The prediction type in a pipeline's scheduler config: "epsilon" (the default) or "v_prediction".

    Raises SourceError for any other value.
    """
    path = folder / SCHEDULER_FILE
    stated = (
        read_json(path).get("prediction_type", PREDICTION_TYPES[0]) if path.exists() else PREDICTION_TYPES[0]
    )
    if stated not in PREDICTION_TYPES:
        raise SourceError(path, f"prediction_type {stated!r}: known are {' and '.join(PREDICTION_TYPES)}.")
    return str(stated)


def _component(folder: Path, candidates: Sequence[Table], variant: str | None, strict: bool) -> Component:
    """The component in a folder, by the table among `candidates` that explains it best."""
    weights = _weights(folder, candidates[0].weights, variant)
    tensors = _read_shards(weights) if weights.suffix == ".json" else read_safetensors(weights)
    source = Source(weights, "diffusers .safetensors", Style.FLAT, flat=tensors)
    config = read_json(folder / COMPONENT_CONFIG)
    fitted = {table.name: _parts(source, table, config) for table in candidates}

    def score(table: Table) -> tuple[int, int]:
        parts = fitted[table.name]
        return sum(len(match.found) - match.problems for match in parts.values()), len(parts) - len(
            table.parts
        )

    table = max(candidates, key=score)
    parts = fitted[table.name]
    claimed = {id(t) for match in parts.values() for t in match.stored}
    stray = [t for t in source.flat if id(t) not in claimed and table.rename(t.name)]
    if (
        strict
        and (not parts or any(match.problems for match in parts.values()))
        and (family := _other_family(config) or _other_class(config, candidates))
    ):
        raise SourceError(weights, f"of {family}, which is not read here.", _FAMILIES_READ)
    if strict and any(".base_layer." in t.name for t in source.flat):
        raise SourceError(weights, "holds a LoRA that is not merged (base_layer).", _MERGE)
    if not parts or (strict and stray):
        detail = f" ({stray[0].name}, ...)" if stray else ""
        problem = f"tensors that are not part of a Stable Diffusion {table.folder}{detail}."
        raise SourceError(weights, problem, _RESAVE)
    return Component(folder, config, parts, stray)


def _parts(source: Source, table: Table, config: Mapping[str, Any]) -> dict[str, Match]:
    """The parts of a table that are in a component's weights, each in the best version."""
    stated = {
        symbol: n for symbol, name in table.stated.items() if type(n := config.get(name)) is int and n > 0
    }
    parts = {}
    for part in table.parts:
        matches = [fit_diffusers(source, spec, stated) for spec in specs() if spec.part == part]
        best = max(matches, key=lambda m: (len(m.found) - m.problems, m.known, m.likeness))
        if best.found:
            parts[part] = best
    return parts


def _other_family(config: Mapping[str, Any]) -> str | None:
    """The other family that a config.json or model_index.json belongs to; None if it shows none."""
    for name, value, family in _FAMILIES:
        if config.get(name) == value:
            return family
    return None


def _other_class(config: Mapping[str, Any], candidates: Sequence[Table]) -> str | None:
    """The diffusers class that a component's config.json states, if it is none of the candidates'."""
    stated = config.get("_class_name")
    known = [table.diffusers.rpartition(".")[2] for table in candidates]
    return plain(stated) if isinstance(stated, str) and stated not in known else None


def _weights(folder: Path, name: str, variant: str | None) -> Path:
    there = [] if variant else [path.name for path in folder.iterdir()]
    for file in weight_names(name, variant, there):
        for found in (folder / file, folder / index_name(file)):
            if found.is_file():
                return found
    if list(folder.glob("*.bin")):
        raise SourceError(
            folder,
            "only pickled weights (.bin), which can run code and are never opened.",
            "Save the pipeline again with diffusers: save_pretrained(..., safe_serialization=True).",
        )
    raise SourceError(folder, f"no {name} in this folder.", _RESAVE)


def read_json(path: Path, if_absent: str = "Copy or download it again.") -> dict[str, Any]:
    """Read a JSON object of at most 1 MiB.

    Raises SourceError; `if_absent` is the remedy in the message for a missing file.
    """
    try:
        data = parse_object(path.read_bytes()[: 1 << 20])
    except FileNotFoundError:
        raise SourceError(path, "no such file.", if_absent) from None
    if data is None:
        require_own(path)
        raise SourceError(path, "not a JSON object, the file is damaged.")
    return data


def _read_shards(index: Path) -> list[Tensor]:
    """The tensors of a sharded weight file, from its index and the files that this names.

    Raises SourceError for an invalid index, a missing file, and a tensor that is not where the index says.
    """
    if index.stat().st_size > _MAX_INDEX or (data := parse_object(index.read_bytes())) is None:
        raise SourceError(index, "not a JSON object, the file is damaged.")
    places = data.get("weight_map")
    if not isinstance(places, dict) or not all(map(_is_file_name, places.values())):
        raise SourceError(
            index, "not the index of sharded weights (no weight_map of files beside it).", _RESAVE
        )
    found: dict[str, Tensor] = {}
    for name in dict.fromkeys(places.values()):
        shard = index.with_name(name)
        if not shard.is_file():
            raise SourceError(index, f"its file {plain(name)} is missing.", "Put all files beside it.")
        found |= {t.name: t for t in read_safetensors(shard) if places.get(t.name) == name}
    if lost := sorted(places.keys() - found.keys()):
        raise SourceError(index, f"{plain(lost[0])} is not in the file that it names.", _RESAVE)
    return list(found.values())


def _is_file_name(name: object) -> bool:
    return isinstance(name, str) and Path(name).name == name and name.endswith(".safetensors")


def read_safetensors(path: Path) -> list[Tensor]:
    """The tensors of a `.safetensors` file; see `read_header`."""
    return read_header(path)[0]


def read_header(path: Path) -> tuple[list[Tensor], dict[str, str]]:
    """The tensors of a `.safetensors` file and its metadata (`__metadata__`).

    The safetensors library checks the header first: its size, shapes and offsets. Raises SourceError for a
    damaged file, for two tensors with the same name, and for an unsupported dtype.
    """
    try:
        with safe_open(path, framework="numpy"):
            pass
        with path.open("rb") as file:
            length = int.from_bytes(file.read(8), "little")
            header = json.loads(file.read(min(length, _MAX_HEADER)), object_pairs_hook=_once)
        metadata = header.pop("__metadata__", None) or {}
        tensors = []
        for name, entry in header.items():
            dtype, shape = SAFETENSORS.get(entry["dtype"]), tuple(entry["shape"])
            if dtype is None:
                raise SourceError(path, f"{name}: dtype {entry['dtype']} is not read here.", _RESAVE)
            start, end = entry["data_offsets"]
            if end - start != math.prod(shape) * dtype.itemsize:
                raise SourceError(path, f"{name}: size and shape disagree, the file is damaged.")
            tensors.append(Tensor(name, shape, dtype, path, 8 + length + start))
        return tensors, {str(name): str(text) for name, text in metadata.items()}
    except (SafetensorError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        require_own(path)
        raise SourceError(path, f"damaged .safetensors file ({error}).") from error


def _once(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
    """Build a JSON object from its pairs. Raises ValueError if a name occurs twice."""
    found = dict(pairs)
    if len(found) < len(pairs):
        twice = next(name for name, count in Counter(name for name, _ in pairs).items() if count > 1)
        raise ValueError(f"{twice[:80]} is there twice")
    return found
