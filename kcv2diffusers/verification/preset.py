"""The sources of a pipeline as a preset, which KerasHub's own classes load."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from kcv2diffusers.conversion.to_kerascv import preset_of
from kcv2diffusers.diffusion import PIXELS_PER_LATENT
from kcv2diffusers.json_text import write_json
from kcv2diffusers.maps.parts import family_of
from kcv2diffusers.pipeline.scheduler import read_scheduler
from kcv2diffusers.pipeline_files import COMPONENT_CONFIG
from kcv2diffusers.progress import silent
from kcv2diffusers.sources.diffusers_pipeline import Component
from kcv2diffusers.targets.keras_h5 import write_weights_h5
from kcv2diffusers.targets.stream import run_finite
from kcv2diffusers.verification.sides import Side


def write_preset(folder: Path, pipeline: Path, sides: Mapping[str, Side], size: int) -> None:
    """Write a preset of the whole model for images of `size` pixels.

    The tensors of Keras files are copied as they are. Parts without a source are the pipeline's own. Raises
    PlanError for one with missing or wrong tensors.
    """
    family = family_of(sides)
    assert family.preset is not None  # its reference is KerasHub
    parts = {part: side.source.require_complete() for part, side in sides.items()}
    components: dict[str, Component] = {}
    for side in sides.values():
        name = side.component.path.name
        if name not in components:
            config = dict(side.config) | {"sample_size": size // PIXELS_PER_LATENT}
            components[name] = replace(side.component, config=config, parts={})
        components[name].parts[side.part] = side.source
    folder.mkdir()
    scheduler = read_scheduler(pipeline, family.scheduler)
    write_json(folder / COMPONENT_CONFIG, preset_of(parts, components, scheduler))
    jobs = write_weights_h5(folder / family.preset.weights, *parts.values(), whole=True)
    run_finite(jobs, silent, allow_nonfinite=True)
