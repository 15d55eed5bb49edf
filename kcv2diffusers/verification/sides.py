"""Pair each part of the pipeline with the source it was made of."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from kcv2diffusers.conversion.base import Base, find_base
from kcv2diffusers.conversion.component_config import config_for
from kcv2diffusers.diffusion import Schedule
from kcv2diffusers.errors import Error
from kcv2diffusers.maps.parts import family_of
from kcv2diffusers.maps.tables import table_of
from kcv2diffusers.pipeline.configs import scheduler_with
from kcv2diffusers.pipeline.scheduler import (
    prediction_in,
    read_scheduler,
    schedule_of,
    scheduler_of,
)
from kcv2diffusers.pipeline_files import SCHEDULER_FILE
from kcv2diffusers.sources.diffusers_pipeline import Component, read_pipeline
from kcv2diffusers.sources.gather import check_together, gather
from kcv2diffusers.sources.locate import locate_all
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.verification.request import Gelu, Request


@dataclass(frozen=True)
class Side:
    """A part of the pipeline with its source.

    `source` is the checkpoint that the part was made of, or the pipeline's own tensors if none was `given`.
    `config` is the component's config.json as the conversion writes it.
    """

    source: Match
    component: Component
    given: bool
    config: Mapping[str, Any]

    @property
    def part(self) -> str:
        """The name of the part."""
        return self.source.part

    @property
    def name(self) -> str:
        """The part's label in messages."""
        return self.source.label

    @property
    def own(self) -> Match | None:
        """The pipeline's tensors of this part; None if it has none."""
        return self.component.parts.get(self.part)

    @property
    def stored(self) -> np.dtype[Any]:
        """The most frequent dtype of this part's tensors in the pipeline."""
        assert self.own is not None
        dtypes = [tensor.dtype for tensor in self.own.found.values()]
        return max(set(dtypes), key=dtypes.count)

    def unet_gelu(self, request: Request) -> Gelu:
        """The GELU of the Keras UNet: as in `request` for KerasCV weights, exact for a pipeline's."""
        return request.unet_gelu if self.source.keras else "exact"


def open_sides(request: Request) -> dict[str, Side]:
    """The parts of the pipeline by name: those with a source in `request` and those only the pipeline has.

    Raises Error if a source is incomplete, or if it holds a part that the pipeline lacks.
    """
    folder = Path(request.pipeline)
    components = read_pipeline(folder, variant=request.variant, strict=False)
    sources = [path for source in request.sources for path in locate_all(source)]
    parts = gather(sources, request.named)
    base = find_base(request.base, parts, request.variant, [])[0] if request.base else Base()
    parts |= {part: match for part, match in base.parts.items() if part not in parts}
    if not parts:
        raise Error(
            f"Nothing to compare {folder} with.\n"
            "Give the KerasCV checkpoints that it was made of, or folders of them."
        )
    for part in parts:
        if table_of(part).folder not in components:
            there = parts[part].source.path
            raise Error(f"{folder}: has no {table_of(part).folder}/ to compare {there} with.")
    given = {part: match.require_complete() for part, match in parts.items()}
    owns = {part: match for component in components.values() for part, match in component.parts.items()}
    sound = {part: match for part, match in owns.items() if not match.problems}
    checked = check_together(sound | given)
    given = {part: checked[part] for part in given}
    sides: dict[str, Side] = {}
    configs: dict[str, Mapping[str, Any]] = {}
    for part in family_of(owns | parts).parts:
        folder_name = table_of(part).folder
        component = components.get(folder_name)
        if component is None or (part not in given and part not in owns):
            continue
        source = given.get(part)
        config: Mapping[str, Any] = component.config
        if source is not None:
            if (
                folder_name not in configs
            ):  # the first part of a component has the sizes that its config states
                stating = base if folder_name in base.components else _stating(component)
                configs[folder_name] = config_for(source, stating, None, request.gelu, None)
            config = configs[folder_name]
        sides[part] = Side(source or owns[part], component, part in given, config)
    return sides


def _stating(component: Component) -> Base:
    """Config entries that only the pipeline states for a model of unusual widths: heads and norm groups."""
    table = next(iter(component.parts.values())).spec.table
    names = {*table.entries.untold - table.entries.choices, table.entries.heads}
    config = {name: value for name, value in component.config.items() if name in names}
    return Base(components={component.path.name: replace(component, config=config)})


def source_paths(request: Request) -> list[Path]:
    """The paths of the sources that were given."""
    bases = [path for base in request.base if base != "none" for path in locate_all(base, pipelines=True)]
    given = [*request.sources, *request.named.values()]
    return [path for source in given for path in locate_all(source)] + bases


def scheduler(request: Request, sides: Mapping[str, Side]) -> dict[str, Any]:
    """The scheduler's config as the conversion writes it; empty for a family without a scheduler.

    It is the noise schedule that a part, for Stable Diffusion the UNet, was trained with, and the prediction
    type of `request`, if any. For a part that is not among the sources it is the pipeline's config.
    """
    family = family_of(sides)
    part = family.scheduler_part
    if part is None or family.scheduler:
        return dict(family.scheduler)
    trained = sides.get(part)
    if trained is not None and trained.given:
        config, _ = scheduler_with(trained.source)
    else:
        file = Path(request.pipeline) / SCHEDULER_FILE
        config = scheduler_of(read_scheduler(Path(request.pipeline)), file)
    return config | ({"prediction_type": request.prediction_type} if request.prediction_type else {})


def noise_of(request: Request, sides: Mapping[str, Side]) -> tuple[str, Schedule]:
    """What the UNet predicts, and the noise schedule that it was trained with."""
    config, file = scheduler(request, sides), Path(request.pipeline) / SCHEDULER_FILE
    return prediction_in(config, file), schedule_of(config, file)
