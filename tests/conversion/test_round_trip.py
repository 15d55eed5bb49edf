"""A pipeline to Keras and back without options is the same pipeline; what cannot work together is refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any, Literal

import h5py
import numpy as np
import pytest

from kcv2diffusers import convert, to_keras
from kcv2diffusers.errors import Error
from kcv2diffusers.json_text import write_json
from kcv2diffusers.models.tokenizer import Tokenizer
from kcv2diffusers.pipeline.scheduler import SCHEDULER
from kcv2diffusers.pipeline.tokenizer_files import TokenizerFiles, find_tokenizer, write_tokenizer
from kcv2diffusers.publish.check import check
from kcv2diffusers.sources.diffusers_pipeline import read_safetensors
from kcv2diffusers.sources.locate import TINY, locate

SCHEDULER_FILE = "scheduler/scheduler_config.json"
ZERO_SNR = {
    "rescale_betas_zero_snr": True,
    "timestep_spacing": "trailing",
    "prediction_type": "v_prediction",
}
LINEAR = {"beta_schedule": "linear", "beta_start": 0.0001, "beta_end": 0.02}
STOCK = {  # as published with stable-diffusion-v1-5
    "_class_name": "PNDMScheduler", "beta_end": 0.012, "beta_schedule": "scaled_linear",
    "beta_start": 0.00085, "clip_sample": False, "num_train_timesteps": 1000, "set_alpha_to_one": False,
    "skip_prk_steps": True, "steps_offset": 1, "trained_betas": None,
}  # fmt: skip


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The tiny base as a pipeline. Tests copy it before they change anything."""
    out = tmp_path_factory.mktemp("made") / "pipeline"
    convert(TINY, out=out)
    return out


@pytest.fixture
def pipeline(made: Path, tmp_path: Path) -> Path:
    return shutil.copytree(made, tmp_path / "pipeline")


def contents(folder: Path) -> dict[str, Any]:
    """All files of a pipeline, but for the record of where it came from; JSON without who wrote it."""
    files = {}
    for path in folder.rglob("*"):
        name = path.relative_to(folder).as_posix()
        if path.suffix == ".json" and path.parent.name != "tokenizer":
            data = json.loads(path.read_text())
            noise = ("_diffusers_version", "transformers_version", "dtype", "torch_dtype", "_name_or_path")
            files[name] = {key: value for key, value in data.items() if key not in noise}
        elif path.is_file():
            files[name] = path.read_bytes()
    files.pop("conversion.json", None)
    return files


def edit(path: Path, **entries: Any) -> None:
    write_json(path, json.loads(path.read_text()) | entries)


def there_and_back(pipeline: Path, work: Path, format: Literal["weights.h5", "h5"] = "weights.h5") -> Path:
    to_keras(pipeline, out=work / "keras", format=format)
    convert(work / "keras", out=work / "again")
    return work / "again"


def assert_same(pipeline: Path, again: Path) -> None:
    before, after = contents(pipeline), contents(again)
    assert before.keys() == after.keys()
    assert [name for name in before if before[name] != after[name]] == []


# There and back


def as_it_is(pipeline: Path) -> None:
    pass


def of_other_noise(pipeline: Path) -> None:
    edit(pipeline / SCHEDULER_FILE, **ZERO_SNR, **LINEAR)


def of_trained_betas(pipeline: Path) -> None:
    betas = np.linspace(0.001, 0.02, 1000).tolist()
    edit(pipeline / SCHEDULER_FILE, trained_betas=betas, steps_offset=0)


def of_a_stock_scheduler(pipeline: Path) -> None:
    write_json(pipeline / SCHEDULER_FILE, STOCK)
    edit(pipeline / "model_index.json", scheduler=["diffusers", "PNDMScheduler"])


def with_entries_of_its_own(pipeline: Path) -> None:
    """Known ones with other values, and such as the tables do not know."""
    edit(pipeline / "unet" / "config.json", sample_size=16, upcast_attention=True, dropout=0.1)
    edit(pipeline / "vae" / "config.json", scaling_factor=0.2, force_upcast=False)
    edit(
        pipeline / "text_encoder" / "config.json",
        hidden_act="gelu_pytorch_tanh", bos_token_id=0, eos_token_id=2, projection_dim=96,
    )  # fmt: skip


@pytest.mark.parametrize(
    "change", [as_it_is, of_other_noise, of_trained_betas, of_a_stock_scheduler, with_entries_of_its_own]
)
def test_there_and_back(change: Callable[[Path], None], pipeline: Path, tmp_path: Path) -> None:
    change(pipeline)
    assert_same(pipeline, there_and_back(pipeline, tmp_path))


@pytest.mark.slow
@pytest.mark.parametrize("dtype", ["float32", "float16", "bfloat16"])
def test_every_dtype_and_format(dtype: str, tmp_path: Path) -> None:
    convert(TINY, out=tmp_path / "pipeline", dtype=dtype)
    assert_same(tmp_path / "pipeline", there_and_back(tmp_path / "pipeline", tmp_path, "h5"))
    found = convert(tmp_path / "keras", out=tmp_path / "all", dtype="float32")
    assert set(found.dtypes.values()) == {"float32"}
    note = "--dtype float32 keeps every bit"
    again = convert(tmp_path / "keras", out=tmp_path / "again", overwrite=True)
    assert any(note in line for line in again.notes) == (dtype != "float32")


def test_as_diffusers_saves_it(made: Path, tmp_path: Path) -> None:
    """With each entry that the libraries know; the tokenizer's files differ from version to version."""
    diffusers = pytest.importorskip("diffusers")
    saved = tmp_path / "saved"
    diffusers.StableDiffusionPipeline.from_pretrained(made).save_pretrained(saved)
    before, after = contents(saved), contents(there_and_back(saved, tmp_path))
    for name in ("unet/config.json", "vae/config.json", SCHEDULER_FILE):
        assert {k: v for k, v in after[name].items() if k in before[name]} == before[name], name
    text = before["text_encoder/config.json"]
    assert {k: v for k, v in after["text_encoder/config.json"].items() if k in text} == text
    for name in (name for name in before if name.endswith(".safetensors")):
        old, new = (
            {t.name: t.shape for t in read_safetensors(f / name)} for f in (saved, tmp_path / "again")
        )
        assert sorted(old.values()) == sorted(new.values())
    one, other = (find_tokenizer(f / "tokenizer") for f in (saved, tmp_path / "again"))
    assert (one.vocab, one.merges) == (other.vocab, other.merges)


def with_a_placeholder(folder: Path) -> Path:
    """The tiny base's checkpoints with one more row in the token embedding."""
    shutil.copytree(locate(TINY), folder)
    with h5py.File(folder / "text_encoder.weights.h5", "r+") as file:
        group = file["layers/clip_embedding/token_embedding/vars"]
        rows = group["0"][()]
        del group["0"]
        group["0"] = np.concatenate([rows, rows[-1:] / 2])
    return folder


def test_textual_inversion(tmp_path: Path) -> None:
    source = with_a_placeholder(tmp_path / "source")
    convert(source, out=tmp_path / "pipeline", placeholder_tokens=["<mine>"])
    assert (tmp_path / "pipeline" / "learned_embeds.safetensors").exists()
    assert_same(tmp_path / "pipeline", there_and_back(tmp_path / "pipeline", tmp_path))


def test_to_keras_replaces_its_own_output(pipeline: Path, tmp_path: Path) -> None:
    to_keras(pipeline, out=tmp_path / "keras")
    shutil.rmtree(pipeline / "tokenizer")
    to_keras(pipeline, out=tmp_path / "keras", overwrite=True)
    assert not (tmp_path / "keras" / "tokenizer").exists()


def test_options_come_before_what_is_stated(pipeline: Path, tmp_path: Path) -> None:
    of_other_noise(pipeline)
    to_keras(pipeline, out=tmp_path / "keras")
    convert(tmp_path / "keras", out=tmp_path / "again", image_size=128, prediction_type="epsilon")
    found = contents(tmp_path / "again")
    assert found[SCHEDULER_FILE] == SCHEDULER | ZERO_SNR | LINEAR | {"prediction_type": "epsilon"}
    assert found["unet/config.json"]["sample_size"] == 16
    assert found["vae/config.json"]["sample_size"] == 128


@pytest.mark.parametrize(
    "stated",
    [
        {"scheduler": []},
        {"scheduler": {"beta_start": {}}},
        {"scheduler": {"_class_name": "a b"}},
        {"dtypes": {"unet": "float8"}},
        {"dtypes": {"unet": []}},
        {"others": {"unet": 3}},
        {"others": 3},
        [],
    ],
)
def test_a_damaged_config_is_refused(stated: Any, pipeline: Path, tmp_path: Path) -> None:
    to_keras(pipeline, out=tmp_path / "keras")
    path = tmp_path / "keras" / "kcv2diffusers.json"
    if isinstance(stated, dict):
        stated = json.loads(path.read_text()) | stated
    path.write_text(json.dumps(stated))
    with pytest.raises(Error, match=r"kcv2diffusers.json.*\n") as refused:
        convert(tmp_path / "keras", out=tmp_path / "again")
    assert len(str(refused.value).split("\n")) == 2
    assert not (tmp_path / "again").exists()


def test_what_others_state_replaces_no_size(pipeline: Path, tmp_path: Path) -> None:
    to_keras(pipeline, out=tmp_path / "keras")
    others = {"unet": {"_class_name": "Evil", "in_channels": 9, "torch_dtype": "float16"}}
    edit(tmp_path / "keras" / "kcv2diffusers.json", others=others)
    convert(tmp_path / "keras", out=tmp_path / "again")
    assert_same(pipeline, tmp_path / "again")


# The noise that a UNet was trained with


@pytest.mark.parametrize("noise", [ZERO_SNR, LINEAR, {"timestep_spacing": "trailing"}])
def test_a_base_s_unet_keeps_its_noise(noise: dict[str, Any], pipeline: Path, tmp_path: Path) -> None:
    edit(pipeline / SCHEDULER_FILE, **noise)
    text = tmp_path / "text"
    text.mkdir()
    shutil.copy(locate(TINY) / "text_encoder.weights.h5", text)
    convert(text, out=tmp_path / "out", base=pipeline)
    assert contents(tmp_path / "out")[SCHEDULER_FILE] == SCHEDULER | noise
    unet = tmp_path / "unet"
    unet.mkdir()
    shutil.copy(locate(TINY) / "unet.weights.h5", unet)
    convert(unet, out=tmp_path / "other", base=pipeline)
    assert contents(tmp_path / "other")[SCHEDULER_FILE] == SCHEDULER


def test_a_base_of_another_class(pipeline: Path, tmp_path: Path) -> None:
    """The scheduler that replays KerasCV's sampler, with the noise of the base's."""
    ddim = {"_class_name": "DDIMScheduler", "clip_sample": True, **LINEAR, "steps_offset": 1}
    write_json(pipeline / SCHEDULER_FILE, ddim)
    text = tmp_path / "text"
    text.mkdir()
    shutil.copy(locate(TINY) / "text_encoder.weights.h5", text)
    convert(text, out=tmp_path / "out", base=pipeline)
    assert contents(tmp_path / "out")[SCHEDULER_FILE] == SCHEDULER | LINEAR


# What cannot work together


def larger(folder: Path) -> Path:
    """A tokenizer with more tokens than the tiny base has embeddings."""
    words = [a + b + c for a in "bcdfghjklmnp" for b in "aeiou" for c in "rstvwxz"]
    found = Tokenizer.of_words(words)
    write_tokenizer(found.files, folder)
    assert len(found.vocabulary) > 691
    return folder


def without_tokenizer(folder: Path) -> Path:
    return shutil.copytree(locate(TINY), folder, ignore=shutil.ignore_patterns("tokenizer"))


def test_a_vocabulary_that_does_not_fit_is_refused(tmp_path: Path) -> None:
    """The case of a machine that has CLIP's vocabulary somewhere."""
    alone, tokenizer = without_tokenizer(tmp_path / "alone"), larger(tmp_path / "tokenizer")
    with pytest.raises(Error, match=r"691 token embeddings, fewer.*\n.*--tokenizer"):
        convert(alone, out=tmp_path / "out", tokenizer=tokenizer)
    assert not (tmp_path / "out").exists()
    shutil.copytree(locate(TINY) / "tokenizer", alone / "tokenizer")
    convert(alone, out=tmp_path / "out")  # as the remedy says


def test_clip_s_vocabulary_on_this_machine(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, bpe: Path
) -> None:
    datasets = tmp_path / "keras" / "datasets"
    datasets.mkdir(parents=True)
    shutil.copy(bpe, datasets)
    monkeypatch.setenv("KERAS_HOME", str(tmp_path / "keras"))
    with pytest.raises(Error, match="691 token embeddings, fewer than the 49408"):
        convert(without_tokenizer(tmp_path / "alone"), out=tmp_path / "out")


def test_a_vocabulary_that_is_too_small_is_refused(tmp_path: Path) -> None:
    write_tokenizer(Tokenizer.of_words(["cat"]).files, tmp_path / "tokenizer")
    with pytest.raises(Error, match=r"beyond the vocabulary's"):
        convert(TINY, out=tmp_path / "out", tokenizer=tmp_path / "tokenizer")


def test_special_tokens_get_the_ids_they_have(tmp_path: Path) -> None:
    """They need not be the last ones."""
    files = find_tokenizer(locate(TINY) / "tokenizer")
    order = [*list(files.vocab)[-2:], *list(files.vocab)[:-2]]
    moved = TokenizerFiles({token: n for n, token in enumerate(order)}, files.merges, (), Path())
    write_tokenizer(moved, tmp_path / "tokenizer")
    convert(TINY, out=tmp_path / "out", tokenizer=tmp_path / "tokenizer")
    config = contents(tmp_path / "out")["text_encoder/config.json"]
    assert (config["bos_token_id"], config["eos_token_id"]) == (0, 1)


@pytest.mark.parametrize("name", ["bos_token_id", "eos_token_id", "pad_token_id"])
@pytest.mark.parametrize("value", [691, -1, "1", True])
def test_ids_without_an_embedding_are_refused(name: str, value: Any, tmp_path: Path) -> None:
    source = shutil.copytree(locate(TINY), tmp_path / "source")
    path = source / "kcv2diffusers.json"
    stated = json.loads(path.read_text())
    stated["text_encoder"][name] = value
    write_json(path, stated)
    with pytest.raises(Error, match=f"{name} is {value!r}, the text encoder has 691 tokens"):
        convert(source, out=tmp_path / "out")


@pytest.mark.parametrize(
    "entry", [{"vocab_size": 49408}, {"max_position_embeddings": 32}, {"eos_token_id": 49407}]
)
def test_a_base_whose_config_is_another_s_is_refused(
    entry: dict[str, int], pipeline: Path, tmp_path: Path
) -> None:
    edit(pipeline / "text_encoder" / "config.json", **entry)
    shutil.copy(locate(TINY) / "unet.weights.h5", tmp_path)
    with pytest.raises(Error, match=rf"config.json: {next(iter(entry))} is .*\n"):
        convert(tmp_path / "unet.weights.h5", out=tmp_path / "out", base=pipeline)


def test_push_says_what_helps(pipeline: Path, tmp_path: Path) -> None:
    shutil.rmtree(pipeline / "tokenizer")
    larger(pipeline / "tokenizer")
    with pytest.raises(Error, match=r"tokens and the text encoder 691.*\n.*--tokenizer"):
        check(pipeline)


# A variant's dtype


@pytest.mark.parametrize(
    ("variant", "dtype"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")]
)
def test_a_variant_means_its_dtype(variant: str, dtype: str, tmp_path: Path) -> None:
    convert(TINY, out=tmp_path / "base", dtype="float32")
    to_keras(tmp_path / "base", out=tmp_path / "keras")
    found = convert(tmp_path / "keras", out=tmp_path / "out", variant=variant)
    assert set(found.dtypes.values()) == {dtype}
    for path in (tmp_path / "out").glob(f"*/*.{variant}.safetensors"):
        assert {tensor.dtype.name for tensor in read_safetensors(path)} == {dtype}


def test_a_variant_of_another_dtype_is_refused(tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"fp16 names files of float16, and --dtype is float32.*\n"):
        convert(TINY, out=tmp_path / "out", variant="fp16", dtype="float32")
    assert not (tmp_path / "out").exists()
    convert(TINY, out=tmp_path / "out", variant="ema", dtype="float32")


# What weights do not tell


def only_unet(folder: Path) -> Path:
    folder.mkdir()
    shutil.copy(locate(TINY) / "unet.weights.h5", folder)
    return folder


@pytest.mark.parametrize("base", ["tiny", TINY, "folder", "pipeline", "several"])
def test_every_spelling_of_a_base_of_the_same_shape(
    base: str, pipeline: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("kcv2diffusers.pipeline.shapes.shipped", dict)  # as for widths that no model here has
    spelt: dict[str, Any] = {
        "folder": shutil.copytree(locate(TINY), tmp_path / "folder"),
        "pipeline": pipeline,
        "several": sorted((tmp_path / "folder").glob("*.h5")),
    }
    convert(only_unet(tmp_path / "alone"), out=tmp_path / "out", base=spelt.get(base, base))
    assert_same(pipeline, tmp_path / "out")
    with pytest.raises(Error, match="number of heads"):
        convert(tmp_path / "alone", out=tmp_path / "none", base="none")


def test_a_file_parted_from_its_config(pipeline: Path, tmp_path: Path) -> None:
    """Where its widths are those of the base that ships with the package."""
    convert(only_unet(tmp_path / "alone"), out=tmp_path / "out", base="none")
    assert (tmp_path / "out/unet/config.json").read_text() == (pipeline / "unet/config.json").read_text()
    apart = shutil.copytree(locate(TINY), tmp_path / "apart", ignore=shutil.ignore_patterns("kcv*.json"))
    convert(apart, out=tmp_path / "whole")
    assert_same(pipeline, tmp_path / "whole")
