"""Too little memory is said in two lines, with what each option saves: as much as is really taken."""

from __future__ import annotations

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import keras
import numpy as np
import pytest
import torch
from PIL import Image
from support.checkpoints import small_base
from support.loras import kohya, save
from support.models.backend_run import TEXT, UNET

from kcv2diffusers import convert, models
from kcv2diffusers.dreambooth import train as training
from kcv2diffusers.dreambooth.config import Config, make_config
from kcv2diffusers.dreambooth.lora import add_lora, load_lora, store_frozen_as_computed
from kcv2diffusers.dreambooth.memory import memory_errors, savings
from kcv2diffusers.dreambooth.model import DreamBooth
from kcv2diffusers.dreambooth.optimizers import make_optimizer
from kcv2diffusers.dreambooth.snapshots import Snapshots
from kcv2diffusers.dreambooth.torch_memory import step_bytes
from kcv2diffusers.dreambooth.torch_step import TorchStep
from kcv2diffusers.dreambooth.weight_bytes import training_bytes
from kcv2diffusers.errors import Error
from kcv2diffusers.models.base import BaseFiles, load_weights, open_base
from kcv2diffusers.models.sampler import TextToImage
from kcv2diffusers.sources.lora import read_lora


class OutOfMemoryError(RuntimeError):
    """Named as PyTorch's."""


@pytest.mark.parametrize(
    "error",
    [
        OutOfMemoryError("CUDA out of memory"),
        MemoryError(),
        ValueError("RESOURCE_EXHAUSTED: Out of memory while trying to allocate 3.2GiB."),
        RuntimeError(
            "DefaultCPUAllocator: can't allocate memory: you tried to allocate 4000000000000 bytes."
        ),
    ],
    ids=["PyTorch", "host", "JAX", "PyTorch on a CPU"],
)
def test_too_little_memory_is_said_in_two_lines(error: Exception) -> None:
    with pytest.raises(Error) as raised, memory_errors(lambda: "What helps."):
        raise error
    first, second = str(raised.value).split("\n")
    assert "memory" in first and second == "What helps."


def test_the_words_of_pytorch() -> None:
    with pytest.raises(Error, match="too little memory"), memory_errors(lambda: ""):
        torch.empty(1 << 50)


def test_other_errors_are_left_alone() -> None:
    with pytest.raises(ValueError, match="something else"), memory_errors(lambda: ""):
        raise ValueError("something else")


@pytest.fixture(scope="module")
def files() -> BaseFiles:
    return open_base(small_base())


@pytest.mark.slow
@pytest.mark.parametrize(
    "options",
    [
        {},
        {"ema": 0.9, "accumulate": 2},
        {"optimizer": "lion"},
        {"optimizer": "adam_mini"},
        {"lora_rank": 3, "ema": 0.9},
        {"lora_rank": 3, "precision": "mixed_float16"},
        {"lora_rank": 3, "lora_conv_rank": 2},
        {"lora": "FILE", "ema": 0.9},
    ],
    ids=lambda options: "-".join(options) or "plain",
)
def test_what_training_takes(files: BaseFiles, options: dict[str, Any], tmp_path: Path) -> None:
    """Beside the base's weights: what is held after the optimizer was built, and the gradients."""
    if "lora" in options:  # of all layers
        pipeline = convert(small_base(), out=tmp_path / "pipeline").out
        options = options | {"lora": str(save(kohya(pipeline, rank=3), tmp_path / "lora.safetensors"))}
    config = Config(**options)
    for part, build in (("unet", models.build_unet), ("text_encoder", models.build_text_encoder)):
        model = build(getattr(files.config, part), None if config.precision == "auto" else config.precision)
        before = Snapshots(model.weights).bytes
        if config.lora_rank:
            add_lora(model, config.lora_rank, config.lora_rank, conv_rank=config.lora_conv_rank)
            store_frozen_as_computed(model)
        if config.lora:
            mine = read_lora(config.lora).of(part)
            load_lora(model, mine, load_weights(model, files.parts[part][0]), 0.0)
        trained = [v for layer in model._flatten_layers() for v in layer._trainable_variables if v.trainable]
        assert config.trains_lora == all("lora_kernel" in variable.path for variable in trained)
        optimizer = make_optimizer(config, ())
        optimizer.build(trained)
        gradients = 4 * sum(int(np.prod(variable.shape)) for variable in trained)
        held = Snapshots([*optimizer.variables, *model.weights]).bytes + gradients - before
        # adam_mini has a number for each channel or token, which here are few weights each.
        # Norms stay in float32 where other frozen weights do not.
        tolerance = {"adam_mini": 0.2}.get(config.optimizer, 0.03 if config.precision != "auto" else 1e-3)
        assert training_bytes(config, files.parts[part][0]) == pytest.approx(held, rel=tolerance)


def test_what_options_save(files: BaseFiles) -> None:
    matches = {part: match for part, (match, _) in files.parts.items()}
    config = Config(ema=0.9, train_text_encoder=True)
    found = savings(config, matches)
    count = {part: sum(int(np.prod(t.shape)) for _, t in matches[part].slots()) for part in matches}
    both = count["unet"] + count["text_encoder"]
    assert found["--ema 0"] == 4 * both
    assert found["--optimizer adam_mini"] == 6 * both
    assert found["no --train-text-encoder"] == 16 * count["text_encoder"]
    assert 0.8 * 16 * both < found["--lora-rank 4"] < 16 * both
    assert savings(Config(lora_rank=4, optimizer="adam_mini"), matches) == {
        "--lora-rank 4": 0, "--optimizer adam_mini": 0, "--ema 0": 0,
    }  # fmt: skip


def batch(count: int) -> dict[str, Any]:
    shape = (count, 16, 16, 4)
    return {
        "latents": np.ones(shape, "float32"),
        "noise": np.ones(shape, "float32"),
        "timesteps": np.arange(count, dtype="int32"),
        "condition": np.ones((count, 9, 24), "float32"),
        "prior": np.zeros(count, "float32"),
    }


@pytest.mark.slow
def test_what_pictures_take_is_what_pytorch_keeps_for_the_backward_pass() -> None:
    model = DreamBooth(models.build_unet(UNET))
    weights = {variable.value.untyped_storage()._cdata for variable in model.weights}
    found = {}
    for count in (1, 4):
        kept: dict[int, int] = {}

        def keep(tensor: Any, kept: dict[int, int] = kept) -> Any:
            if tensor.untyped_storage()._cdata not in weights:
                kept[tensor.untyped_storage()._cdata] = tensor.untyped_storage().nbytes()
            return tensor

        given = {name: torch.from_numpy(value) for name, value in batch(count).items()}
        with torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
            model.loss_of(given, model(given, training=True)).backward()
        found[count] = step_bytes(model, batch(count))
        # Beside what is kept there is what is computed at the moment.
        assert 0.9 * sum(kept.values()) < found[count] < 1.5 * sum(kept.values())
    assert found[4] > 2.5 * found[1]
    models.rematerialise(model.unet)
    assert step_bytes(model, batch(4)) < 0.6 * found[4]
    assert all(variable.value.grad is None or variable.value.grad.numel() for variable in model.weights)


@pytest.fixture
def start(tmp_path: Path) -> Callable[..., str]:
    """A run that ends with an Error, of which it returns the second line."""
    (tmp_path / "photos").mkdir()
    Image.new("RGB", (64, 64), "red").save(tmp_path / "photos" / "one.png")

    def start(**options: Any) -> str:
        usual = {
            "instance_images": str(tmp_path / "photos"), "instance_prompt": "a red car", "steps": 2,
            "base": [str(small_base())], "out": str(tmp_path / "out"), "sample_steps": 1,
        }  # fmt: skip
        with pytest.raises(Error) as raised:
            training.train(make_config(usual | options))
        first, second = str(raised.value).split("\n")
        assert first == "The device has too little memory; what was written before is kept."
        return second

    return start


def full(*_: Any, **__: Any) -> None:
    raise OutOfMemoryError("CUDA out of memory")


@pytest.mark.slow
def test_a_step_that_does_not_fit(start: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(TorchStep, "__call__", full)
    said = start(batch_size=4, ema=0.9, train_text_encoder=True)
    found = {name: float(size) for name, size in re.findall(r"(\S*--[^,(]*) \((\S+) MB less\)", said)}
    assert {name.removeprefix("no ") for name in found} == {
        "--lora-rank 4", "--optimizer adam_mini", "--ema 0", "--train-text-encoder", "--rematerialise",
        "--batch-size 1 --accumulate 4",
    }, said  # fmt: skip
    assert list(found.values()) == sorted(found.values(), reverse=True)
    assert found["--optimizer adam_mini"] == pytest.approx(1.5 * found["--ema 0"], rel=0.05)


@pytest.mark.slow
def test_a_model_that_does_not_fit(start: Callable[..., str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(BaseFiles, "load", full)
    said = start()
    assert "--optimizer adam_mini (" in said and "--rematerialise" not in said


@pytest.mark.slow
@pytest.mark.parametrize("options", [{"class_prompt": "a car"}, {"sample_prompt": ["a car"] * 3}])
def test_drawings_that_do_not_fit(
    start: Callable[..., str], monkeypatch: pytest.MonkeyPatch, options: dict[str, Any]
) -> None:
    monkeypatch.setattr(TextToImage, "denoise", full)
    assert "--sample-batch-size 1" in start(sample_batch_size=2, **options)


def test_the_small_models_are_those_of_the_backends() -> None:
    assert UNET.context_width == TEXT.width == batch(1)["condition"].shape[-1]
    assert keras.backend.backend() == "torch"
