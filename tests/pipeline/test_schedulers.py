"""Other schedulers made from the config of a converted pipeline's, as people do it."""

from __future__ import annotations

from typing import Any

import diffusers
import numpy as np
import pytest
import torch

from kcv2diffusers import convert
from kcv2diffusers.pipeline.scheduler import SCHEDULER
from kcv2diffusers.sources.locate import TINY

STOCK = {  # as published with stable-diffusion-v1-5
    "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip
# KerasCV's sampler needs this one, which the published config leaves to each class.
SPACING = {"timestep_spacing": "leading"}


@pytest.fixture(scope="module")
def pipe(tmp_path_factory: pytest.TempPathFactory) -> Any:
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    convert(TINY, out=folder)
    pipe = diffusers.StableDiffusionPipeline.from_pretrained(folder)
    pipe.set_progress_bar_config(disable=True)
    return pipe


def compatibles() -> list[type]:
    """Those that diffusers lists, without the stand-ins for such as need a package that is not there."""
    found = diffusers.EulerDiscreteScheduler.from_config(SCHEDULER).compatibles
    return sorted((cls for cls in found if "dummy" not in cls.__module__), key=lambda cls: cls.__name__)


def configured(cls: Any, config: dict[str, Any]) -> dict[str, Any]:
    """The values that the class works with."""
    names = cls._get_init_keys(cls)
    return {name: value for name, value in cls.from_config(config).config.items() if name in names}


@pytest.mark.parametrize("cls", compatibles(), ids=lambda cls: cls.__name__)
def test_each_is_configured_as_from_the_published_config(cls: Any, pipe: Any) -> None:
    assert len(compatibles()) >= 12
    own = dict(pipe.scheduler.config)
    assert configured(cls, own) == configured(cls, STOCK | SPACING)


def picture(pipe: Any, scheduler: Any) -> np.ndarray[Any, Any]:
    before, pipe.scheduler = pipe.scheduler, scheduler
    try:
        drawn = pipe(
            "a fox in the snow", num_inference_steps=20, guidance_scale=5.0,
            generator=torch.Generator().manual_seed(0), output_type="np",
        )  # fmt: skip
    finally:
        pipe.scheduler = before
    return np.asarray(drawn.images[0])


@pytest.mark.slow
def test_swapped_pictures(pipe: Any) -> None:
    """DDIM makes the steps of Euler; solvers of higher order go elsewhere, but not astray."""
    own = picture(pipe, pipe.scheduler)
    for name, least in (("DDIMScheduler", 40), ("DPMSolverMultistepScheduler", 25)):
        swapped = picture(pipe, getattr(diffusers, name).from_config(pipe.scheduler.config))
        decibels = -10 * np.log10(np.mean((swapped - own) ** 2))
        print(f"\n{name}: {decibels:.1f} dB")
        assert decibels >= least
