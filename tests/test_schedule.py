"""The noise schedule against diffusers' own: betas, zero terminal SNR, timesteps, defaults of classes."""

from __future__ import annotations

import inspect
from pathlib import Path
from typing import Any

import diffusers
import numpy as np
import pytest

from kcv2diffusers.diffusion import SD, Schedule, alphas_cumprod, sampling_timesteps
from kcv2diffusers.errors import Error, SourceError
from kcv2diffusers.pipeline.scheduler import (
    DEFAULTS,
    OTHER_DEFAULTS,
    SCHEDULER,
    deviations,
    prediction_in,
    schedule_of,
    scheduler_of,
)

BETAS = tuple(np.linspace(0.001, 0.02, 50).tolist())
HERE = Path("scheduler_config.json")


@pytest.mark.parametrize(
    "stated",
    [
        {},
        {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02},
        {"beta_schedule": "squaredcos_cap_v2"},
        {"num_train_timesteps": 400},
        {"num_train_timesteps": 50, "trained_betas": BETAS},
    ],
)
@pytest.mark.parametrize("zero_snr", [False, True])
def test_alphas_are_diffusers(stated: dict[str, Any], zero_snr: bool) -> None:
    ours = Schedule(**stated, rescale_betas_zero_snr=zero_snr)
    config = SCHEDULER | stated | {"rescale_betas_zero_snr": zero_snr}
    if "trained_betas" in stated:
        config["trained_betas"] = list(BETAS)
    theirs = diffusers.DDPMScheduler.from_config(config).alphas_cumprod.numpy()
    assert ours.alphas_cumprod.dtype == np.float32 and ours.alphas_cumprod.shape == theirs.shape
    assert np.abs(ours.alphas_cumprod - theirs).max() < 2e-6
    assert (ours.alphas_cumprod[-1] == 0) == zero_snr
    assert schedule_of(config, HERE) == ours


def test_stable_diffusion_s_own_is_the_default() -> None:
    assert schedule_of(SCHEDULER, HERE) == SD
    assert np.array_equal(alphas_cumprod(), SD.alphas_cumprod)
    assert np.array_equal(sampling_timesteps(25), SD.timesteps(25))
    assert deviations("epsilon", SD) == {}
    assert deviations("v_prediction", Schedule(steps_offset=0)) == {
        "prediction_type": "v_prediction",
        "steps_offset": 0,
    }


@pytest.mark.parametrize("steps", [1, 4, 7, 20, 25, 50, 1000])
def test_trailing_timesteps_are_diffusers(steps: int) -> None:
    theirs = diffusers.DDIMScheduler.from_config(SCHEDULER | {"timestep_spacing": "trailing"})
    theirs.set_timesteps(steps)
    assert Schedule(timestep_spacing="trailing").timesteps(steps)[::-1].tolist() == theirs.timesteps.tolist()


def test_other_numbers_of_timesteps() -> None:
    assert Schedule(num_train_timesteps=400).timesteps(5).tolist() == [0, 100, 200, 299, 399]


def test_defaults_are_those_of_the_classes() -> None:
    """A config that leaves an entry out means what the class takes for it."""
    names = {"LCMScheduler", "TCDScheduler"}
    names |= {cls.__name__ for cls in diffusers.EulerDiscreteScheduler().compatibles}
    compared = 0
    for name in names - {"EDMEulerScheduler"}:
        parameters = inspect.signature(getattr(diffusers, name).__init__).parameters
        for entry, value in (DEFAULTS | OTHER_DEFAULTS.get(name, {})).items():
            if entry in parameters:
                assert parameters[entry].default == value, (name, entry)
                compared += 1
    assert compared > 100


def test_a_config_with_little_in_it() -> None:
    stock = {
        "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
        "beta_start": 0.00085, "num_train_timesteps": 1000, "steps_offset": 1, "trained_betas": None,
    }  # fmt: skip
    assert schedule_of(stock, HERE) == SD
    assert scheduler_of(stock, HERE) == SCHEDULER
    assert schedule_of({"_class_name": "DDIMScheduler"}, HERE) == Schedule(
        beta_start=0.0001, beta_end=0.02, beta_schedule="linear", steps_offset=0
    )


@pytest.mark.parametrize(
    "wrong",
    [
        {"beta_start": "0.1"},
        {"beta_start": float("nan")},
        {"beta_end": 1},
        {"beta_schedule": "sigmoid"},
        {"beta_schedule": []},
        {"trained_betas": [0.1, 0.2]},
        {"trained_betas": {"a": 1}},
        {"num_train_timesteps": 10**9},
        {"num_train_timesteps": True},
        {"rescale_betas_zero_snr": "yes"},
        {"timestep_spacing": {}},
        {"steps_offset": -1},
        {"_class_name": "os.system"},
        {"_class_name": "FlowMatchEulerDiscreteScheduler"},
        {"_class_name": None},
    ],
)
def test_what_is_no_schedule_is_refused(wrong: dict[str, Any]) -> None:
    with pytest.raises(SourceError) as refused:
        schedule_of(SCHEDULER | wrong, HERE)
    assert len(str(refused.value).split("\n")) == 2


def test_what_a_unet_predicts() -> None:
    assert prediction_in({}, HERE) == "epsilon"
    assert prediction_in({"prediction_type": "v_prediction"}, HERE) == "v_prediction"
    with pytest.raises(SourceError, match="known are epsilon and v_prediction"):
        prediction_in({"prediction_type": ["sample"]}, HERE)


def test_noise_cannot_be_predicted_from_noise_alone() -> None:
    zero = Schedule(rescale_betas_zero_snr=True)
    zero.check("v_prediction")
    SD.check("epsilon")
    with pytest.raises(Error, match="rescale_betas_zero_snr"):
        zero.check("epsilon")
