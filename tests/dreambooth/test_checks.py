"""What is wrong with a run is told before a model is built; a run that has ended builds none."""

from __future__ import annotations

import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
from diffusers import DDIMScheduler
from PIL import Image
from support.loras import save

from kcv2diffusers.dreambooth.config import make_config
from kcv2diffusers.dreambooth.train import _base_files, train
from kcv2diffusers.errors import Error
from kcv2diffusers.generation import generate
from kcv2diffusers.models.base import BaseFiles
from kcv2diffusers.pipeline.scheduler import SCHEDULER, deviations

LONG = "a panda " * 40


class Built(Exception):
    """A model was built."""


class Usage(NamedTuple):
    total: int
    used: int
    free: int


@pytest.fixture(autouse=True)
def nothing_built(monkeypatch: pytest.MonkeyPatch) -> None:
    def load(*_: Any, **__: Any) -> None:
        raise Built

    monkeypatch.setattr(BaseFiles, "load", load)


@pytest.fixture
def photos(tmp_path: Path) -> Path:
    folder = tmp_path / "photos"
    folder.mkdir()
    Image.fromarray(np.zeros((64, 64, 3), "uint8")).save(folder / "one.png")
    return folder


@pytest.fixture
def run(tmp_path: Path, photos: Path) -> Callable[..., Any]:
    def start(**options: Any) -> Any:
        usual = {
            "instance_images": str(photos), "instance_prompt": "a sks dog", "base": ["tiny"],
            "out": str(tmp_path / "out"), "steps": 5,
        }  # fmt: skip
        return train(make_config(usual | options))

    return start


def test_a_good_run_builds_its_models(run: Callable[..., Any], tmp_path: Path) -> None:
    with pytest.raises(Built):
        run()
    with pytest.raises(Built):
        generate("tiny", prompts=["a panda"], out=tmp_path / "pictures")


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"instance_prompt": LONG}, "82 tokens, at most 77"),
        ({"class_prompt": LONG}, "82 tokens, at most 77"),
        ({"sample_prompt": [LONG]}, "82 tokens, at most 77"),
        ({"out": "FILE/out"}, "not a folder"),
        ({"class_prompt": "a dog", "class_images": "FILE"}, "not a folder"),
        ({"export": "FILE"}, "exists already"),
        ({"export": "FILE/pipeline"}, "not a folder"),
        ({"export": "PHOTOS"}, "exists already"),
        ({"export": "PHOTOS", "resume": True}, "not an earlier output"),
        ({"instance_images": "nowhere"}, "nowhere"),
        ({"base": ["nowhere"]}, "nowhere"),
        ({"train_token": ["<dog>"]}, "--train-token <dog>: no photo's prompt has this token"),
        ({"train_token": ["a b"], "instance_prompt": "a b"}, "is empty or has white space"),
        ({"train_token": ["sks", "sks"]}, "is given twice"),
        ({"zero_terminal_snr": True}, "needs a model that predicts v; this base predicts noise"),
    ],
)
def test_a_run(
    run: Callable[..., Any], tmp_path: Path, photos: Path, options: dict[str, Any], message: str
) -> None:
    (tmp_path / "file").write_text("in the way")
    places = {"FILE": str(tmp_path / "file"), "PHOTOS": str(photos)}
    for name, value in options.items():
        if isinstance(value, str) and value.partition("/")[0] in places:
            first, *rest = value.split("/")
            options = options | {name: "/".join([places[first], *rest])}
    with pytest.raises(Error, match=message):
        run(**options)
    assert not (tmp_path / "out").exists()


def test_a_caption_that_is_too_long(run: Callable[..., Any], photos: Path) -> None:
    """It is shown, but not all of a long text."""
    next(photos.iterdir()).with_suffix(".txt").write_text(100 * LONG)
    with pytest.raises(Error, match=r"tokens, at most 77 fit: '.{100,300}\.\.\.'\nShorten it"):
        run()


def test_a_disk_that_is_too_small(run: Callable[..., Any], monkeypatch: pytest.MonkeyPatch) -> None:
    """AdamW's state is twice the weights; a LoRA's checkpoints are the weights alone."""
    monkeypatch.setattr(shutil, "disk_usage", lambda _: Usage(10**9, 0, 40 * 10**6))
    with pytest.raises(Error, match=r"0\.\d+ GB are needed and 0\.04 GB are free"):
        run(steps=1000, checkpoint_minutes=0.0, checkpoint_every=100)
    with pytest.raises(Error, match=r"0\.\d+ GB are needed and 0\.04 GB are free"):
        run(steps=1000)
    with pytest.raises(Built):
        run(steps=1000, checkpoint_minutes=0.0, lora_rank=4)


def test_zero_terminal_snr(run: Callable[..., Any], tmp_path: Path) -> None:
    """What a checkpoint and its pipeline state is what was trained: diffusers' own rescaling of the betas."""
    options = {"out": str(tmp_path / "out"), "zero_terminal_snr": True, "prediction_type": "v_prediction"}
    with pytest.raises(Built):
        run(**options)
    usual = {"instance_images": "photos", "instance_prompt": "a sks dog", "base": ["tiny"]}
    files = _base_files(make_config(usual | options))
    assert files.schedule.alphas_cumprod[-1] == 0
    stated = deviations(files.prediction_type, files.schedule)
    assert stated["rescale_betas_zero_snr"] is True and stated["prediction_type"] == "v_prediction"
    theirs = DDIMScheduler.from_config(SCHEDULER | stated)
    assert theirs.config.timestep_spacing == "trailing"
    np.testing.assert_allclose(files.schedule.alphas_cumprod, theirs.alphas_cumprod.numpy(), atol=1e-6)
    theirs.set_timesteps(4)
    np.testing.assert_array_equal(files.schedule.timesteps(4)[::-1], theirs.timesteps.numpy())


@pytest.fixture
def lora(tmp_path: Path) -> Callable[..., str]:
    """A function that writes a LoRA file of some layers of the tiny base."""
    from kcv2diffusers.models.base import open_base

    dims = {part: match.dims for part, (match, _) in open_base("tiny").parts.items()}
    unet, text = dims["unet"]["c0"], dims["text_encoder"]["width"]
    shapes = {
        "lora_unet_conv_in": (unet, 4, 3, 3),
        "lora_te_text_model_encoder_layers_0_mlp_fc1": (4 * text, text),
    }

    def write(*prefixes: str, wide: int = 1, rank: int = 2, value: float = 0.5, other: str = "") -> str:
        tensors = {f"lora_unet_conv_in.{other}": np.ones((2, 2), "float32")} if other else {}
        for name, (outputs, inputs, *kernel) in shapes.items():
            if name.startswith(prefixes):
                ones = [1] * len(kernel)
                tensors[f"{name}.lora_down.weight"] = np.full((rank, inputs, *kernel), value, "float32")
                tensors[f"{name}.lora_up.weight"] = np.full((wide * outputs, rank, *ones), value, "float32")
        return str(save(tensors, tmp_path / "lora.safetensors"))

    return write


UNET, BOTH = ("lora_unet_",), ("lora_unet_", "lora_te_")


@pytest.mark.parametrize(
    ("prefixes", "change", "options", "message"),
    [
        (UNET, {}, {}, None),
        (BOTH, {}, {"train_text_encoder": True}, None),
        (BOTH, {}, {}, "Add --train-text-encoder"),
        (UNET, {}, {"lora_rank": 4}, "Omit --lora-rank"),
        (UNET, {}, {"train_text_encoder": True}, "changes no layer of the text encoder"),
        (("lora_te_",), {}, {"train_text_encoder": True}, "changes no layer of the UNet"),
        (UNET, {"wide": 2}, {}, "shapes are not those of the model"),
        (UNET, {"rank": 1000}, {}, "rank 1000 is larger than the weight"),
        (UNET, {"value": float("nan")}, {}, "NaN or infinite"),
        (UNET, {"other": "hada_w1_a"}, {}, "of a LoHa, which is not read here"),
        (UNET, {"other": "lokr_w1"}, {}, "of a LoKr, which is not read here"),
        (UNET, {"other": "dora_scale"}, {}, "of a DoRA, which is not read here"),
        ((), {}, {}, "not those of a LoRA"),
        ((), {}, {"lora": "nowhere"}, "no such file"),
        ((), {}, {"lora": "https://huggingface.co/alice/dog"}, "Write hf://alice/dog for it"),
    ],
)
def test_a_lora_to_go_on_with(
    run: Callable[..., Any],
    lora: Callable[..., str],
    tmp_path: Path,
    prefixes: tuple[str, ...],
    change: dict[str, Any],
    options: dict[str, Any],
    message: str | None,
) -> None:
    """It has to fit the base and the parts that are trained."""
    with pytest.raises(Error if message else Built, match=message) as caught:
        run(**{"lora": lora(*prefixes, **change), **options})
    if message:
        assert len(str(caught.value).splitlines()) == 2
        assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"prompts": [LONG]}, "82 tokens, at most 77"),
        ({"negative_prompt": LONG}, "82 tokens, at most 77"),
        ({"prompts": []}, "Nothing to generate"),
        ({"steps": 0}, "needs at least 1"),
        ({"height": 100}, "multiples of 64"),
        ({"width": -64}, "multiples of 64"),
        ({"out": "file/pictures"}, "not a folder"),
        ({"out": "file"}, "not a folder"),
    ],
)
def test_pictures(tmp_path: Path, options: dict[str, Any], message: str) -> None:
    (tmp_path / "file").write_text("in the way")
    out = tmp_path / options.pop("out", "out")
    with pytest.raises(Error, match=message):
        generate("tiny", **({"prompts": ["a panda"], "out": out} | options))
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize("log", [b"step,loss\n1,0.5\n", b"step,loss,seconds\nnone,0,0\n", b"\xff\n\xff\n"])
def test_a_damaged_log(run: Callable[..., Any], tmp_path: Path, log: bytes) -> None:
    out = tmp_path / "out"
    (out / "checkpoints").mkdir(parents=True)
    (out / "log.csv").write_bytes(log)
    with pytest.raises(Error, match=r"log\.csv: is not the log of a run, or damaged"):
        run(resume=True)
    assert (out / "log.csv").read_bytes() == log


@pytest.mark.slow
def test_a_run_that_has_ended(run: Callable[..., Any], tmp_path: Path) -> None:
    """Its checkpoint is that of tiny itself, as if nothing had been learnt."""
    from kcv2diffusers.sources.locate import TINY, locate

    out = tmp_path / "out"
    checkpoint = out / "checkpoints" / "step-000005"
    checkpoint.mkdir(parents=True)
    for name in ("unet.weights.h5", "kcv2diffusers.json"):
        shutil.copy(locate(TINY) / name, checkpoint)
    (out / "resume").mkdir()
    (out / "resume" / "step-000005.h5").write_bytes(b"")
    with pytest.raises(Error, match="holds a run already"):
        run()
    result = run(resume=True)
    assert (result.step, result.finished, result.checkpoint) == (5, True, checkpoint)
    assert result.notes == ["The run has ended before; nothing is trained."]
    export = tmp_path / "pipeline"
    assert run(resume=True, export=str(export)).export == export
    made = (export / "model_index.json").stat().st_mtime_ns
    run(resume=True, export=str(export))
    assert (export / "model_index.json").stat().st_mtime_ns == made
    with pytest.raises(Built):
        run(resume=True, steps=6)
    with pytest.raises(Built):
        run(resume=True, sample_prompt=["a panda"])
