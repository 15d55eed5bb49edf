"""The validation loss is a mean of the same images each time; its log is that of the run."""

from __future__ import annotations

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import keras
import numpy as np
import pytest
from support.models.backend_run import UNET

from kcv2diffusers import models
from kcv2diffusers.diffusion import LATENT_SCALE, alphas_cumprod, timestep_embedding
from kcv2diffusers.dreambooth.batches import Examples
from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.dreambooth.follow import Follow
from kcv2diffusers.dreambooth.model import DreamBooth
from kcv2diffusers.dreambooth.photos import Photo
from kcv2diffusers.dreambooth.validation import TIMESTEPS, Validation
from kcv2diffusers.errors import Error

RNG = np.random.default_rng(0)
SIZES = [(128, 128), (64, 256)]


@pytest.fixture(scope="module")
def model() -> DreamBooth:
    return DreamBooth(models.build_unet(UNET), prior_weight=0.3, snr_gamma=2.0)


@pytest.fixture(scope="module")
def examples() -> Examples:
    photos = [Photo(Path(f"{n}.png"), size, prompt="ab"[n % 2]) for n, size in enumerate(SIZES)]
    conditions = {name: RNG.standard_normal((9, 24), dtype="float32") for name in "ab"}
    found = Examples(photos, conditions, None, 128, masked=True)
    for number, (height, width) in enumerate(SIZES):
        key, shape = (number, (height, width), False), (height // 8, width // 8)
        found._moments[key] = RNG.standard_normal((*shape, 8), dtype="float32")
        mask = RNG.random((*shape, 1), dtype="float32")
        found._masks[key] = mask / mask.mean()
    return found


def by_hand(model: DreamBooth, examples: Examples, seed: int) -> float:
    losses = []
    for number, photo in enumerate(examples.photos):
        (key,) = (key for key in examples._moments if key[0] == number)
        moments, mask = examples._moments[key], examples._masks[key]
        rng = np.random.default_rng((seed, 5, number))
        for t in (62, 187, 312, 437, 562, 687, 812, 937):
            draw = rng.standard_normal(moments[..., :4].shape, dtype="float32")
            latents = LATENT_SCALE * (moments[..., :4] + np.exp(moments[..., 4:] / 2) * draw)
            noise = rng.standard_normal(latents.shape, dtype="float32")
            a = alphas_cumprod()[t].astype("float64")
            given = {
                "latent": (a**0.5 * latents + (1 - a) ** 0.5 * noise)[None].astype("float32"),
                "timestep_embedding": timestep_embedding(np.array([t]), 32),
                "context": examples.conditions[photo.prompt][None],
            }
            predicted = keras.ops.convert_to_numpy(model.unet(given))[0]
            error = (mask * (predicted - noise) ** 2).sum() / (mask.sum() * 4)
            losses.append(min(a / (1 - a), 2.0) / (a / (1 - a)) * error)
    return float(np.mean(losses))


@pytest.mark.slow
def test_the_loss_is_a_mean_over_photos_and_timesteps(
    model: DreamBooth, examples: Examples, tmp_path: Path
) -> None:
    """Whatever the batch size, which fills up the last batch of each size; another seed has other noise."""
    expected = by_hand(model, examples, 7)
    for size in (5, 16):
        validation = Validation(examples, tmp_path, batch_size=size, timesteps=1000, seed=7)
        assert {len(batch["noise"]) for batch, _ in validation.batches} == {size}
        assert sum(count for _, count in validation.batches) == len(SIZES) * TIMESTEPS
        losses = [validation.loss(model) for _ in range(2)]
        assert losses[0] == losses[1] == pytest.approx(expected, rel=1e-5)
    other = Validation(examples, tmp_path, batch_size=16, timesteps=1000, seed=8)
    assert other.loss(model) != pytest.approx(expected, rel=1e-3)


@pytest.fixture
def follow(examples: Examples, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Any:
    """The callback of a run whose validation loss is 10 less its step, and 5 from then on."""

    def make(start: int, **options: Any) -> Follow:
        config = Config(out=str(tmp_path), steps=5, checkpoint_minutes=0.0, **options)
        validation = Validation(examples, tmp_path, batch_size=4, timesteps=1000, seed=0, start=start)
        trainer = SimpleNamespace(
            jax_state_sync=lambda: None, variables=[], optimizer=SimpleNamespace(variables=[])
        )
        checkpoints: Any = SimpleNamespace(
            trainer=trainer, check=lambda: None, averaged=averaged, save=lambda *_, **__: None
        )
        made = Follow(config, checkpoints, Any, start, lambda *_: None, validation)
        monkeypatch.setattr(validation, "loss", lambda _: float(10 - made.step + 3 * (made.step > 4)))
        return made

    return make


class Averages:
    used = 0

    def __enter__(self) -> None:
        Averages.used += 1

    def __exit__(self, *_: object) -> None:
        pass


def averaged() -> Averages:
    return Averages()


def test_when_it_is_validated(follow: Any, tmp_path: Path) -> None:
    """Before the first step, where there are no averages yet; every so often; after the last step."""
    Averages.used = 0
    run = follow(0, validation_every=2)
    logged: list[Any] = []
    run.loggers = [lambda step, values: logged.append((step, values))]
    run.on_train_begin()
    assert not Averages.used
    for number in range(5):
        run.on_train_batch_end(number, {"step_loss": 1.0})
    expected = [(0, 10.0), (2, 8.0), (4, 6.0), (5, 8.0)]
    assert run.validation.rows == expected and Averages.used == 3
    assert [(step, {"validation_loss": loss}) for step, loss in expected] == [
        entry for entry in logged if "validation_loss" in entry[1]
    ]
    lines = (tmp_path / "validation.csv").read_text().split()
    assert lines == ["step,loss", *(f"{step},{loss}" for step, loss in expected)]
    assert run.validation.text() == (
        "Validation loss: 10.0000 at step 0, 6.0000 at step 4, 8.0000 at step 5; "
        "the lowest is that of step 4."
    )
    resumed = follow(3)
    resumed.on_train_begin()
    assert resumed.validation.rows == expected[:2]
    for number in range(2):
        resumed.on_train_batch_end(number, {"step_loss": 1.0})
    assert resumed.validation.rows == [*expected[:2], (5, 8.0)]


def test_a_damaged_log(examples: Examples, tmp_path: Path) -> None:
    (tmp_path / "validation.csv").write_text("step,loss\n1\n")
    with pytest.raises(Error, match="is not the log of the validation, or damaged"):
        Validation(examples, tmp_path, batch_size=4, timesteps=1000, seed=0)
