"""`scheduler_config.json`: the one that `convert` writes, and the reading of a pipeline's own."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, fields
from pathlib import Path
from typing import Any

from kcv2diffusers.diffusion import Schedule
from kcv2diffusers.errors import SourceError
from kcv2diffusers.pipeline_files import SCHEDULER_FILE
from kcv2diffusers.sources.diffusers_pipeline import PREDICTION_TYPES, read_json

# KerasCV's sampler uses its own integer timesteps. This scheduler reproduces it if it is called with those as
# `timesteps=`. DDIM cannot, because it computes the previous timestep itself. Without `timesteps=` the offset
# is used, and diffusers warns unless it is 1. Entries that Euler does not have are for the classes that users
# create from this config (DDIM, DDPM, PNDM): the defaults of those are not Stable Diffusion's values.
SCHEDULER: dict[str, Any] = {
    "_class_name": "EulerDiscreteScheduler",
    "beta_end": 0.012,
    "beta_schedule": "scaled_linear",
    "beta_start": 0.00085,
    "clip_sample": False,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "set_alpha_to_one": False,
    "skip_prk_steps": True,
    "steps_offset": 1,
    "timestep_spacing": "leading",
    "trained_betas": None,
    "use_karras_sigmas": False,
}
# Default entries of the scheduler classes, except those in OTHER_DEFAULTS.
DEFAULTS: dict[str, Any] = {
    "beta_end": 0.02,
    "beta_schedule": "linear",
    "beta_start": 0.0001,
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "steps_offset": 0,
    "timestep_spacing": "linspace",
    "trained_betas": None,
}
_LEADING = {"timestep_spacing": "leading"}
_SD_BETAS = {"beta_start": 0.00085, "beta_end": 0.012}
_CONSISTENCY = _LEADING | _SD_BETAS | {"beta_schedule": "scaled_linear"}
OTHER_DEFAULTS: dict[str, dict[str, Any]] = {
    "DDIMScheduler": _LEADING,
    "DDPMScheduler": _LEADING,
    "HeunDiscreteScheduler": _SD_BETAS,
    "KDPM2AncestralDiscreteScheduler": _SD_BETAS,
    "KDPM2DiscreteScheduler": _SD_BETAS,
    "LCMScheduler": _CONSISTENCY,
    "PNDMScheduler": _LEADING,
    "TCDScheduler": _CONSISTENCY,
}
_NO_BETAS = ("EDM", "FlowMatch")  # prefixes of classes for models with another kind of noise
_NAMES = tuple(entry.name for entry in fields(Schedule))


def read_scheduler(folder: Path, usual: Mapping[str, Any] | None = None) -> dict[str, Any]:
    """Return the scheduler config of a pipeline folder unchanged, or `usual` if there is none.

    By default, `usual` is that of Stable Diffusion.
    """
    path = folder / SCHEDULER_FILE
    return read_json(path) if path.exists() else dict(usual or SCHEDULER)


def class_of(config: Mapping[str, Any], path: Path) -> str:
    """Return the scheduler's class in diffusers. Raises SourceError for a class not for Stable Diffusion."""
    name = config.get("_class_name", SCHEDULER["_class_name"])
    if not isinstance(name, str) or not name.isidentifier() or not name.endswith("Scheduler"):
        raise SourceError(
            path, f"_class_name {str(name)[:40]!r} is not a scheduler class of diffusers.", "Correct it."
        )
    if name.startswith(_NO_BETAS):
        raise SourceError(
            path, f"{name} is for models with another kind of noise.", "Give a Stable Diffusion pipeline."
        )
    return name


def schedule_of(config: Mapping[str, Any], path: Path) -> Schedule:
    """Return the noise schedule of a scheduler config. Missing entries have the defaults of its class.

    Raises SourceError for an invalid schedule.
    """
    stated = DEFAULTS | OTHER_DEFAULTS.get(class_of(config, path), {}) | dict(config)
    values = {name: stated[name] for name in _NAMES}
    if isinstance(values["trained_betas"], list):
        values["trained_betas"] = tuple(values["trained_betas"])
    try:
        return Schedule(**values)
    except ValueError as error:
        raise SourceError(path, f"{error}: an unknown noise schedule.", "Correct it.") from None


def prediction_in(config: Mapping[str, Any], path: Path) -> str:
    """Return the prediction type in a scheduler config. Raises SourceError for an unknown one."""
    stated = config.get("prediction_type", PREDICTION_TYPES[0])
    if stated not in PREDICTION_TYPES:
        known = " and ".join(PREDICTION_TYPES)
        raise SourceError(path, f"prediction_type {str(stated)[:40]!r}: known are {known}.", "Correct it.")
    return str(stated)


def scheduler_of(config: Mapping[str, Any], path: Path) -> dict[str, Any]:
    """Return the scheduler that reproduces KerasCV's sampler for a pipeline with this scheduler config."""
    return scheduler_for(prediction_in(config, path), schedule_of(config, path))


def scheduler_for(prediction_type: str, schedule: Schedule) -> dict[str, Any]:
    """Return the scheduler config that reproduces KerasCV's sampler for a UNet with this schedule."""
    return SCHEDULER | deviations(prediction_type, schedule)


def deviations(prediction_type: str, schedule: Schedule) -> dict[str, Any]:
    """Return the entries, as JSON values, that differ from those of Stable Diffusion."""
    stated = asdict(schedule) | {"prediction_type": prediction_type}
    if schedule.trained_betas is not None:
        stated["trained_betas"] = list(schedule.trained_betas)
    return {name: value for name, value in stated.items() if value != SCHEDULER[name]}
