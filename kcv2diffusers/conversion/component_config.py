"""The config.json of a component: from its table, and from the base what the weights do not determine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from kcv2diffusers.conversion.base import Base
from kcv2diffusers.errors import Error
from kcv2diffusers.hub.address import shown
from kcv2diffusers.maps.parts import Family, family_of
from kcv2diffusers.pipeline.configs import (
    LOADED,
    NOT_KEPT,
    check_sizes,
    config_of,
    require_heads,
    scheduler_with,
    untold,
    user_dtype,
)
from kcv2diffusers.pipeline.scheduler import SCHEDULER
from kcv2diffusers.pipeline.shapes import same_shape, stated_beside
from kcv2diffusers.pipeline.tokenizer_files import BOS, EOS, TokenizerFiles
from kcv2diffusers.pipeline.vocabulary import check_ids
from kcv2diffusers.pipeline_files import COMPONENT_CONFIG
from kcv2diffusers.sources.diffusers_pipeline import Component
from kcv2diffusers.sources.recognise import Match

_GELU = {"exact": "gelu", "tanh": "gelu_pytorch_tanh"}


def config_for(
    match: Match, base: Base, image_size: int | None, gelu: str | None, files: TokenizerFiles | None
) -> dict[str, Any]:
    """Return the config.json of the component that a part belongs to.

    `image_size` is in pixels (None: as stated beside the checkpoint, else the family's). `gelu` is "exact" or
    "tanh"; it applies to a text encoder whose table has a GELU for the version. `files` is the tokenizer.
    Raises Error if the number of heads is unknown, SourceError for entries that contradict the weights.
    """
    table = match.spec.table
    if match.of_pipeline:  # the component comes from the base, and so does its config
        kept = _of_component(match, base.components[table.folder])
        return kept if "_class_name" in kept else kept | LOADED
    overrides = stated_beside(match, _of_base(match, base))
    if gelu and table.versions[match.version].config.get("hidden_act") in _GELU.values():
        overrides["hidden_act"] = _GELU[gelu]
    if image_size is not None:
        overrides.pop("sample_size", None)
    require_heads(match, overrides)
    rows = match.dims.get("vocabulary", 0)
    sizes = {"words": min(table.nominal.get("vocabulary", 0), rows)}
    if files:
        sizes = {"words": len(files.vocab), "bos": files.vocab[BOS], "eos": files.vocab[EOS]}
    config = config_of(
        table,
        match.version,
        match.dims | sizes,
        image_size=image_size or family_of([match.part]).image_size,
        overrides=overrides,
    )
    check_ids(match.source.path, config, rows)
    return config


def _of_component(match: Match, component: Component) -> dict[str, Any]:
    path = component.path / COMPONENT_CONFIG
    check_sizes(path, match, component.config)
    check_ids(path, component.config, match.dims.get("vocabulary", 0))
    return {k: v for k, v in component.config.items() if k not in NOT_KEPT}


def _of_base(match: Match, base: Base) -> dict[str, Any]:
    """Return the entries that a base of the same shape states for a model of non-standard widths."""
    table = match.spec.table
    component = base.components.get(table.folder)
    other = next(iter(component.parts.values())) if component else base.parts.get(match.part)
    if match.known or other is None or not same_shape(match, other):
        return {}
    return untold(table, component.config) if component else stated_beside(other)


def scheduler_for(
    family: Family, trained: Match | None, prediction_type: str | None
) -> tuple[dict[str, Any] | None, str]:
    """Return the scheduler config for the part `trained`, and its origin as text.

    The config is the one that the part was trained with; a given `prediction_type` overrides its entry. The
    config is None if `trained` is None. Raises Error for a `prediction_type` that the family does not have.
    """
    if trained is None:
        return None, ""
    if family.scheduler and prediction_type:
        raise Error(f"--prediction-type: {family.label} has only one.\nOmit the option.")
    config, file = scheduler_with(trained)
    stated = file.is_file() and config != (family.scheduler or SCHEDULER)
    origin = f"as {shown(file)} states" if stated else f"as {family.label} has it"
    return config | ({"prediction_type": prediction_type} if prediction_type else {}), origin


def stated_dtype(matches: Sequence[Match]) -> str | None:
    """Return the dtype that the component had in the pipeline before `to_keras`, None if unknown."""
    table = matches[0].spec.table
    stated = {user_dtype(match.source.path, table) if match.keras else None for match in matches}
    return stated.pop() if len(stated) == 1 else None
