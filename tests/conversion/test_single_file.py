"""Single files in Stable Diffusion's original layout: written, read back, and read by diffusers."""

from __future__ import annotations

import hashlib
import json
import re
import shutil
import signal
import subprocess
import sys
from collections.abc import Callable, Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file, save_file
from support.checkpoints import ROOT
from support.random_pipelines import CONFIGS, TOKENIZER, random_pipeline
from support.waiting import LONG, until

from kcv2diffusers import convert, inspect, to_keras, verify
from kcv2diffusers.errors import Error
from kcv2diffusers.maps.original import namings

VERSIONS = ("sd1", "sd2")
WEIGHTS = {
    "unet": Path("unet", "diffusion_pytorch_model.safetensors"),
    "vae": Path("vae", "diffusion_pytorch_model.safetensors"),
    "text_encoder": Path("text_encoder", "model.safetensors"),
}
UNET, VAE, CLIP, OPEN_CLIP = (
    "model.diffusion_model.",
    "first_stage_model.",
    "cond_stage_model.transformer.",
    "cond_stage_model.model.",
)
Tensors = dict[str, np.ndarray]


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small pipeline of each version. Tests do not change them."""
    folder = tmp_path_factory.mktemp("pipelines")
    return {version: random_pipeline(folder / version, version) for version in VERSIONS}


@pytest.fixture(scope="module")
def files(pipelines: dict[str, Path], tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """Their single files. Tests do not change them."""
    folder = tmp_path_factory.mktemp("files")
    for version, pipeline in pipelines.items():
        convert(pipeline, out=folder / f"{version}.safetensors")
    return {version: folder / f"{version}.safetensors" for version in VERSIONS}


def same(one: Mapping[str, np.ndarray], other: Mapping[str, np.ndarray]) -> bool:
    """Whether names, shapes, dtypes and bits are the same."""
    return one.keys() == other.keys() and all(
        (tensor.dtype, tensor.shape, tensor.tobytes())
        == (other[name].dtype, other[name].shape, other[name].tobytes())
        for name, tensor in one.items()
    )


def metadata(file: Path) -> dict[str, str]:
    with safe_open(file, framework="numpy") as opened:
        return dict(opened.metadata())


def own_metadata(file: Path) -> dict[str, str]:
    """What the metadata of a file say of a model of unusual widths, alone."""
    return {"kcv2diffusers": metadata(file)["kcv2diffusers"]}


def back(file: Path, out: Path, **options: Any) -> Path:
    """The pipeline of a single file."""
    convert(file, out=out, tokenizer=TOKENIZER, **options)
    return out


# Written


@pytest.mark.parametrize("version", VERSIONS)
def test_diffusers_reads_the_same_tensors(version: str, pipelines, files) -> None:
    """`from_single_file`, without a network and with the configs of the pipeline."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_single_file(
        str(files[version]), config=str(pipelines[version]), local_files_only=True, safety_checker=None
    )
    for name, weights in WEIGHTS.items():
        expected = load_file(pipelines[version] / weights)
        state = {key: tensor.numpy() for key, tensor in getattr(pipe, name).state_dict().items()}
        if name == "text_encoder":  # transformers 5 has no such step in the names of its models
            expected = {key.removeprefix("text_model."): tensor for key, tensor in expected.items()}
            state = {key.removeprefix("text_model."): tensor for key, tensor in state.items()}
        assert same(expected, state)
    assert pipe.unet.dtype == torch.float32


@pytest.mark.parametrize("version", VERSIONS)
def test_there_and_back_is_identity(version: str, pipelines, files, tmp_path: Path) -> None:
    """Every file of the pipeline, configs included, has the same bytes."""
    pipeline = pipelines[version]
    made = back(files[version], tmp_path / "back")
    names = {path.relative_to(pipeline) for path in pipeline.rglob("*") if path.is_file()}
    assert names == {p.relative_to(made) for p in made.rglob("*") if p.is_file()} - {Path("conversion.json")}
    for name in names:
        if name.suffix == ".safetensors":  # another order of the tensors in the file
            assert same(load_file(pipeline / name), load_file(made / name))
        elif name.parts[0] != "tokenizer":
            assert json.loads((pipeline / name).read_text()) == json.loads((made / name).read_text()), name


def test_a_folder_without_an_index(pipelines, files, tmp_path: Path) -> None:
    """Another family has a text encoder of the same tensors; it is taken for that of Stable Diffusion."""
    for name in ("text_encoder", "unet", "vae"):
        shutil.copytree(pipelines["sd1"] / name, tmp_path / "some" / name)
        assert {entry.part for entry in inspect(tmp_path / "some")} >= {"text_encoder"}
    convert(tmp_path / "some", out=tmp_path / "model.safetensors")
    assert same(load_file(tmp_path / "model.safetensors"), load_file(files["sd1"]))


def test_the_tensors_of_an_attention_layer_are_fused(pipelines, files) -> None:
    ours, theirs = load_file(files["sd2"]), load_file(pipelines["sd2"] / WEIGHTS["text_encoder"])
    for ending in ("weight", "bias"):
        parts = [theirs[f"text_model.encoder.layers.1.self_attn.{letter}_proj.{ending}"] for letter in "qkv"]
        fused = ours[f"{OPEN_CLIP}transformer.resblocks.1.attn.in_proj_{ending}"]
        assert np.array_equal(fused, np.concatenate(parts))
    assert ours[f"{VAE}decoder.mid.attn_1.q.weight"].shape == (12, 12, 1, 1)


@pytest.mark.slow
def test_keras_checkpoints_make_the_same_file_as_their_pipeline(tmp_path: Path) -> None:
    convert("tiny", out=tmp_path / "pipeline")
    convert("tiny", out=tmp_path / "one.safetensors")
    convert(tmp_path / "pipeline", out=tmp_path / "two.safetensors")
    assert same(load_file(tmp_path / "one.safetensors"), load_file(tmp_path / "two.safetensors"))
    own, other = (
        json.loads(metadata(tmp_path / f"{n}.safetensors")["kcv2diffusers"]) for n in ("one", "two")
    )
    assert own == other


@pytest.mark.parametrize(("short", "name"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")])
def test_dtypes(short: str, name: str, files, pipelines, tmp_path: Path) -> None:
    import ml_dtypes
    import torch
    from safetensors.torch import load_file as load_torch

    out = tmp_path / "model.safetensors"
    result = convert(pipelines["sd2"], out=out, dtype=short)
    assert set(result.dtypes.values()) == {name}
    kind = np.dtype(ml_dtypes.bfloat16 if name == "bfloat16" else name)
    whole, made = load_file(files["sd2"]), load_torch(out)
    assert whole.keys() == made.keys()
    for key, tensor in made.items():
        bits = tensor.view(torch.int16 if kind.itemsize == 2 else torch.int32).numpy()
        assert bits.tobytes() == whole[key].astype(kind).tobytes()


@pytest.mark.parametrize("version", VERSIONS)
def test_metadata(version: str, pipelines, tmp_path: Path, monkeypatch) -> None:
    monkeypatch.setenv("SOURCE_DATE_EPOCH", "1700000000")
    out = tmp_path / "dog.safetensors"
    convert(pipelines[version], out=out, title='My "dog"', trigger_phrase="a photo of sks dog")
    found = metadata(out)
    content = out.read_bytes()
    start = 8 + int.from_bytes(content[:8], "little")
    assert json.loads(found.pop("kcv2diffusers"))["unet"]["attention_head_dim"] == 4
    assert found == {
        "format": "pt",
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": {"sd1": "stable-diffusion-v1", "sd2": "stable-diffusion-v2-512"}[version],
        "modelspec.implementation": {
            "sd1": "https://github.com/CompVis/stable-diffusion",
            "sd2": "https://github.com/Stability-AI/stablediffusion",
        }[version],
        "modelspec.title": 'My "dog"',
        "modelspec.date": "2023-11-14T22:13:20Z",
        "modelspec.resolution": "64x64",
        "modelspec.prediction_type": "epsilon",
        "modelspec.trigger_phrase": "a photo of sks dog",
        "modelspec.hash_sha256": f"0x{hashlib.sha256(content[start:]).hexdigest()}",
    }
    again = tmp_path / "again.safetensors"
    convert(pipelines[version], out=again, title='My "dog"', trigger_phrase="a photo of sks dog")
    assert again.read_bytes() == content


def test_a_title_cannot_take_the_place_of_the_hash(pipelines, tmp_path: Path) -> None:
    title = '"modelspec.hash_sha256":"0x' + "0" * 64 + '"'
    out = tmp_path / "dog.safetensors"
    convert(pipelines["sd1"], out=out, title=title)
    assert metadata(out)["modelspec.title"] == title
    assert set(metadata(out)["modelspec.hash_sha256"]) != set("0x")


def test_without_the_hash_the_tensors_are_the_same(pipelines, tmp_path: Path) -> None:
    convert(pipelines["sd1"], out=tmp_path / "with.safetensors")
    convert(pipelines["sd1"], out=tmp_path / "without.safetensors", hashed=False)
    assert "modelspec.hash_sha256" not in metadata(tmp_path / "without.safetensors")
    assert same(load_file(tmp_path / "without.safetensors"), load_file(tmp_path / "with.safetensors"))


@pytest.mark.parametrize("epoch", ["", "x", "9" * 30, "-1"])
def test_names_and_dates_that_are_none(epoch: str, pipelines, tmp_path: Path, monkeypatch) -> None:
    """Bytes that are no text in the name of the file, and a date that nobody can have."""
    monkeypatch.setenv("SOURCE_DATE_EPOCH", epoch)
    out = tmp_path / "dog\udcff.safetensors"
    convert(pipelines["sd1"], out=out, trigger_phrase="\ud800")
    out.rename(tmp_path / "dog.safetensors")
    found = metadata(tmp_path / "dog.safetensors")
    assert found["modelspec.title"] == "dog?" and found["modelspec.trigger_phrase"] == "?"
    assert re.fullmatch(r"\d{4}-\d\d-\d\dT[\d:]{8}Z", found["modelspec.date"])


def test_v_prediction_is_carried(tmp_path: Path) -> None:
    pipeline = random_pipeline(tmp_path / "v", "sd2", prediction_type="v_prediction")
    convert(pipeline, out=tmp_path / "v.safetensors")
    found = metadata(tmp_path / "v.safetensors")
    assert found["modelspec.architecture"] == "stable-diffusion-v2-768-v"
    assert found["modelspec.prediction_type"] == "v"
    made = back(tmp_path / "v.safetensors", tmp_path / "back")
    config = json.loads((made / "scheduler" / "scheduler_config.json").read_text())
    assert config["prediction_type"] == "v_prediction"


def test_without_a_vae_and_with_parts_only(pipelines, files, tmp_path: Path) -> None:
    whole = load_file(files["sd1"])
    convert(pipelines["sd1"], out=tmp_path / "no-vae.safetensors", vae="none")
    without = {name: tensor for name, tensor in whole.items() if not name.startswith(VAE)}
    assert same(without, load_file(tmp_path / "no-vae.safetensors"))
    out = tmp_path / "vae.safetensors"
    convert(vae=files["sd1"], base="none", out=out)
    assert same({n: t for n, t in whole.items() if n.startswith(VAE)}, load_file(out))
    assert metadata(out)["modelspec.architecture"] == "stable-diffusion-v1/vae"
    assert "modelspec.resolution" not in metadata(out)


def test_another_vae_takes_the_place_of_a_files_own(files, pipelines, tmp_path: Path) -> None:
    other = {name: tensor + 1 for name, tensor in load_file(files["sd2"]).items() if name.startswith(VAE)}
    save_file(other, tmp_path / "vae.safetensors")
    convert(files["sd1"], vae=tmp_path / "vae.safetensors", out=tmp_path / "model.safetensors")
    made = load_file(tmp_path / "model.safetensors")
    assert same(other, {name: tensor for name, tensor in made.items() if name.startswith(VAE)})
    assert same(load_file(files["sd1"]) | other, made)


def test_what_is_there_is_kept(files, pipelines, tmp_path: Path) -> None:
    other = tmp_path / "other.safetensors"
    save_file({"x": np.zeros(1, np.float32)}, other)
    with pytest.raises(Error, match="exists already"):
        convert(pipelines["sd1"], out=other)
    with pytest.raises(Error, match="not an earlier output"):
        convert(pipelines["sd1"], out=other, overwrite=True)
    assert load_file(other).keys() == {"x"}
    out = tmp_path / "out.safetensors"
    convert(pipelines["sd1"], out=out)
    convert(pipelines["sd1"], out=out, overwrite=True, dtype="fp16")
    assert load_file(out)[f"{UNET}out.2.bias"].dtype == np.float16
    with pytest.raises(Error, match="would be replaced"):
        convert(out, out=out, overwrite=True)
    assert sorted(path.name for path in tmp_path.iterdir()) == ["other.safetensors", "out.safetensors"]


def test_a_component_without_original_names_has_no_place(pipelines, tmp_path: Path, monkeypatch) -> None:
    known = {name: naming for name, naming in namings().items() if name != "vae"}
    monkeypatch.setattr("kcv2diffusers.conversion.to_single_file.namings", lambda: known)
    with pytest.raises(Error, match=r"no single file has a place for the VAE decoder\.\nWrite a pipeline"):
        convert(pipelines["sd1"], out=tmp_path / "dog.safetensors")
    assert not list(tmp_path.iterdir())


def test_placeholder_tokens_are_left_out(tmp_path: Path) -> None:
    """Rows beyond CLIP's vocabulary, for which other programs have no place."""
    from kcv2diffusers.conversion.to_single_file import _own_vocabulary
    from kcv2diffusers.maps.tables import spec
    from kcv2diffusers.sources.open import open_sources
    from kcv2diffusers.sources.recognise import fit
    from kcv2diffusers.targets.single_file import to_original

    name = f"{CLIP}text_model.embeddings.token_embedding.weight"
    save_file({name: np.arange(2 * 49411, dtype=np.float32).reshape(49411, 2)}, tmp_path / "x.safetensors")
    (source,) = open_sources(tmp_path / "x.safetensors")
    notes: list[str] = []
    text = _own_vocabulary(fit(source, spec("text_encoder", "sd1")), notes)
    assert "Left out: 3 token embeddings beyond the vocabulary's 49408" in notes[0]
    (stored,) = to_original(text, np.dtype("f4"))
    assert (stored.name, stored.shape) == (name, (49408, 2))
    assert stored.entries[0].tensor.nbytes == 49408 * 2 * 4


def test_values_that_are_not_finite_leave_nothing(pipelines, tmp_path: Path) -> None:
    shutil.copytree(pipelines["sd1"], tmp_path / "pipeline")
    weights = tmp_path / "pipeline" / WEIGHTS["unet"]
    tensors = load_file(weights)
    tensors["conv_in.bias"][0] = np.nan
    save_file(tensors, weights)
    with pytest.raises(Error, match=r"conv_in\.bias has NaN"):
        convert(tmp_path / "pipeline", out=tmp_path / "model.safetensors")
    assert [path.name for path in tmp_path.iterdir()] == ["pipeline"]
    convert(tmp_path / "pipeline", out=tmp_path / "model.safetensors", allow_nonfinite=True)


def test_options_that_contradict(files, pipelines, tmp_path: Path) -> None:
    for options, message in (
        ({"out": tmp_path / "x", "format": "single-file"}, "a single file ends in .safetensors"),
        ({"out": tmp_path / "x", "format": "ckpt"}, "choose one of pipeline, single-file"),
        ({"out": tmp_path / "x", "vae": "none"}, "are for single files"),
        ({"out": tmp_path / "x", "title": "x"}, "are for single files"),
        ({"out": tmp_path / "x.safetensors", "tokenizer": TOKENIZER}, "holds no tokenizer"),
    ):
        with pytest.raises(Error, match=message):
            convert(files["sd1"], **options)
    assert not list(tmp_path.iterdir())
    convert(files["sd1"], out=tmp_path / "x.safetensors", format="pipeline", tokenizer=TOKENIZER)
    assert (tmp_path / "x.safetensors" / "model_index.json").is_file()
    dry = convert(files["sd1"], out=tmp_path / "dry.safetensors", dry_run=True)
    assert "a single file" in dry.plan() and not (tmp_path / "dry.safetensors").exists()


SLOW = """
import sys, time
from kcv2diffusers.targets import transfer
from kcv2diffusers.__main__ import start
do = transfer.Worker.do
def slowly(self, job):
    time.sleep(0.05)
    return do(self, job)
transfer.Worker.do = slowly
start()
"""


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGKILL])
def test_a_run_that_is_stopped_leaves_what_was_there(
    number: signal.Signals, pipelines, tmp_path: Path
) -> None:
    out = tmp_path / "dog.safetensors"
    convert(pipelines["sd1"], out=out)
    before = out.read_bytes()
    command = [sys.executable, "-c", SLOW, "convert", str(pipelines["sd1"]), "--overwrite", f"--out={out}"]
    process = subprocess.Popen(command, cwd=ROOT, stderr=subprocess.PIPE, text=True)
    until(lambda: list(tmp_path.glob(".dog.safetensors.tmp-*/dog.safetensors")), process)
    process.send_signal(number)
    _, said = process.communicate(timeout=LONG)
    assert out.read_bytes() == before and "Traceback" not in said
    if number == signal.SIGKILL:  # nobody could remove what was written so far; the next run does
        assert len(list(tmp_path.iterdir())) == 2
        convert(pipelines["sd1"], out=out, overwrite=True)
    assert list(tmp_path.iterdir()) == [out]


# Read: what is found in the wild


def averaged(name: str) -> str:
    """The name of the moving average of a tensor of the UNet."""
    return "model_ema." + name.removeprefix("model.").replace(".", "")


def with_ema(tensors: Tensors) -> Tensors:
    copies = {averaged(name): tensor + 1 for name, tensor in tensors.items() if name.startswith(UNET)}
    return {
        **tensors,
        **copies,
        "model_ema.decay": np.full((), 0.9999, np.float32),
        "model_ema.num_updates": np.full((), 7, np.int32),
    }


def only_ema(tensors: Tensors) -> Tensors:
    return {averaged(n) if n.startswith(UNET) else n: tensor for n, tensor in tensors.items()}


NOISE = (
    "betas",
    "alphas_cumprod",
    "alphas_cumprod_prev",
    "sqrt_alphas_cumprod",
    "sqrt_one_minus_alphas_cumprod",
    "log_one_minus_alphas_cumprod",
    "sqrt_recip_alphas_cumprod",
    "sqrt_recipm1_alphas_cumprod",
    "posterior_variance",
    "posterior_log_variance_clipped",
    "posterior_mean_coef1",
    "posterior_mean_coef2",
    "logvar",
    "lvlb_weights",
    "scale_factor",
)


def buffers(tensors: Tensors) -> Tensors:
    return {**tensors, **{name: np.zeros(1000, np.float32) for name in NOISE}}


def position_ids(tensors: Tensors) -> Tensors:
    ids = np.arange(77, dtype=np.int64)[None]
    return {**tensors, f"{CLIP}text_model.embeddings.position_ids": ids}


def without_text_model(tensors: Tensors) -> Tensors:
    return {name.replace(f"{CLIP}text_model.", CLIP): tensor for name, tensor in tensors.items()}


def whole_open_clip(tensors: Tensors) -> Tensors:
    """With the 24th layer, and what OpenCLIP has beside the text encoder."""
    layer = f"{OPEN_CLIP}transformer.resblocks.22."
    last = {n.replace(".22.", ".23."): t + 1 for n, t in tensors.items() if n.startswith(layer)}
    beside = {"text_projection": np.zeros((12, 12), np.float32), "logit_scale": np.ones((), np.float32)}
    return {**tensors, **last, **{OPEN_CLIP + name: tensor for name, tensor in beside.items()}}


def old_vae(tensors: Tensors) -> Tensors:
    """The attention of the autoencoder as matrices with one axis more, as files of 2022 have it."""
    return {n: t[..., 0] if ".mid.attn_1." in n and t.ndim == 4 else t for n, t in tensors.items()}


def conditioner(tensors: Tensors) -> Tensors:
    """As the code of Stable Diffusion XL names a text encoder."""
    return {n.replace("cond_stage_model.", "conditioner.embedders.0."): t for n, t in tensors.items()}


WILD: list[tuple[str, Callable[[Tensors], Tensors], str]] = [
    ("sd1", with_ema, "EMA copies"),
    ("sd1", only_ema, ""),
    ("sd1", buffers, "noise schedule (15 tensors"),
    ("sd1", position_ids, "parts that pictures do not need (1 tensor"),
    ("sd1", without_text_model, ""),
    ("sd2", whole_open_clip, "parts that pictures do not need (14 tensors"),
    ("sd2", old_vae, ""),
    ("sd1", conditioner, ""),
    ("sd2", conditioner, ""),
    ("sd1", lambda tensors: {**tensors, "notes": np.zeros(3, np.float32)}, "tensors of no model (1 tensor"),
]


@pytest.mark.parametrize(
    ("version", "change", "note"), WILD, ids=lambda value: getattr(value, "__name__", None)
)
def test_files_of_the_wild(version: str, change, note: str, files, pipelines, tmp_path: Path) -> None:
    file = tmp_path / "wild.safetensors"
    save_file(change(load_file(files[version])), file, own_metadata(files[version]))
    result = convert(file, out=tmp_path / "pipeline", tokenizer=TOKENIZER)
    for weights in WEIGHTS.values():
        assert same(load_file(pipelines[version] / weights), load_file(tmp_path / "pipeline" / weights))
    assert note in "\n".join(result.notes)
    assert ("EMA" in result.parts["unet"]) == (change is only_ema)


def test_the_averaged_unet_is_taken_where_that_is_asked_for(files, tmp_path: Path) -> None:
    tensors = load_file(files["sd1"])
    save_file(with_ema(tensors), tmp_path / "both.safetensors", own_metadata(files["sd1"]))
    result = convert(tmp_path / "both.safetensors", out=tmp_path / "out.safetensors", ema=True)
    assert result.parts["unet"].endswith("(single file .safetensors, EMA weights)")
    assert "the UNet beside its EMA copy (686 tensors" in "\n".join(result.notes)
    expected = {n: t + 1 if n.startswith(UNET) else t for n, t in tensors.items()}
    assert same(load_file(tmp_path / "out.safetensors"), expected)
    with pytest.raises(Error, match="holds no EMA copy of the UNet"):
        convert(files["sd1"], out=tmp_path / "no.safetensors", ema=True)


def test_the_prompt_of_a_dreambooth_run_is_the_trigger_phrase(pipelines, tmp_path: Path) -> None:
    shutil.copytree(pipelines["sd1"], tmp_path / "dog")
    (tmp_path / "dog" / "dreambooth.toml").write_text('instance_prompt = "a photo of sks dog"\n')
    convert(tmp_path / "dog", out=tmp_path / "dog.safetensors")
    assert metadata(tmp_path / "dog.safetensors")["modelspec.trigger_phrase"] == "a photo of sks dog"


FULL_SIZE = [
    ("sd1", {}, {"noise schedule": 15}),
    ("sd2", {"transformer.resblocks.23.ln_1.weight": [1024], "text_projection": [1024, 1024]}, {}),
]


@pytest.mark.parametrize(("version", "beside", "left_out"), FULL_SIZE)
def test_a_full_size_file_is_told_by_its_header(version, beside, left_out, tmp_path: Path) -> None:
    """A sparse file: `inspect` reads no tensor."""
    from kcv2diffusers.conversion.map_check import _shapes
    from kcv2diffusers.maps.original import naming
    from kcv2diffusers.maps.tables import tables

    shapes: dict[str, tuple[int, ...]] = {}
    for table in map(tables().__getitem__, namings()):
        of = version if version in table.versions else "any"
        names = naming(table.name, of)
        targets, _ = _shapes(table, of)
        for target, place in names.places(targets).items():
            shapes[names.prefix + place.name] = place.shape(targets[target])
    shapes |= {OPEN_CLIP + name: shape for name, shape in beside.items()}
    shapes |= {name: (1000,) for name in NOISE} if left_out else {}
    header, end = {}, 0
    for name, shape in shapes.items():
        size = 2 * int(np.prod(shape))
        header[name] = {"dtype": "F16", "shape": list(shape), "data_offsets": [end, end + size]}
        end += size
    text = json.dumps(header).encode()
    file = tmp_path / "model.safetensors"
    with file.open("wb") as opened:
        opened.write(len(text).to_bytes(8, "little") + text)
        opened.truncate(8 + len(text) + end)
    found = inspect(file)
    assert {(entry.part, entry.version) for entry in found} == {
        ("unet", version),
        ("text_encoder", version),
        ("vae_encoder", "any"),
        ("vae_decoder", "any"),
    }
    assert all(entry.standard and not entry.problems for entry in found)
    unused = {"parts that pictures do not need": len(beside)} if beside else {}
    assert found[0].left_out == left_out | unused


def test_a_file_of_mixed_dtypes_keeps_those_of_its_components(files, tmp_path: Path) -> None:
    tensors = {
        name: tensor if name.startswith(VAE) else tensor.astype(np.float16)
        for name, tensor in load_file(files["sd1"]).items()
    }
    tensors[f"{UNET}out.0.weight"] = tensors[f"{UNET}out.0.weight"].astype(np.float32)
    save_file(tensors, tmp_path / "mixed.safetensors", metadata(files["sd1"]))
    result = convert(tmp_path / "mixed.safetensors", out=tmp_path / "again.safetensors")
    assert result.dtypes == {"text_encoder": "float16", "unet": "float32", "vae": "float32"}
    made = load_file(tmp_path / "again.safetensors")
    assert made.keys() == tensors.keys()
    assert all(
        np.array_equal(made[name].astype(np.float32), tensors[name].astype(np.float32)) for name in made
    )


@pytest.mark.parametrize("bare", [True, False])
@pytest.mark.parametrize(("prefix", "name"), [(UNET, "unet"), (VAE, "vae"), (CLIP, "text_encoder")])
def test_files_of_one_component(prefix: str, name: str, bare: bool, files, pipelines, tmp_path: Path) -> None:
    """With and without the prefix that a whole checkpoint has."""
    tensors = {
        key.removeprefix(prefix) if bare else key: tensor
        for key, tensor in load_file(files["sd1"]).items()
        if key.startswith(prefix)
    }
    save_file(tensors, tmp_path / "part.safetensors", own_metadata(files["sd1"]))
    result = convert(tmp_path / "part.safetensors", out=tmp_path / "out", base="none")
    assert {said.partition(" (")[2] for said in result.parts.values()} == {"single file .safetensors)"}
    assert same(load_file(pipelines["sd1"] / WEIGHTS[name]), load_file(tmp_path / "out" / WEIGHTS[name]))


@pytest.mark.parametrize("version", VERSIONS)
@pytest.mark.parametrize("name", WEIGHTS)
def test_weight_files_of_diffusers(name: str, version: str, pipelines, files, tmp_path: Path) -> None:
    """One that was taken out of its folder, given by its path."""
    weights = tmp_path / "weights.safetensors"
    save_file(load_file(pipelines[version] / WEIGHTS[name]), weights, own_metadata(files[version]))
    found = {entry.part for entry in inspect(weights)}
    assert found == ({"vae_encoder", "vae_decoder"} if name == "vae" else {name})
    option: dict[str, Any] = {name: weights}
    convert(files[version], **option, out=tmp_path / "model.safetensors")
    assert same(load_file(files[version]), load_file(tmp_path / "model.safetensors"))


def test_a_stranger_inside_of_a_model_is_refused(files, tmp_path: Path) -> None:
    tensors = load_file(files["sd1"])
    tensors[f"{UNET}input_blocks.1.0.adapter.weight"] = np.zeros((2, 2), np.float32)
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(Error, match=r"belong to no part.*\n.*input_blocks\.1\.0\.adapter\.weight"):
        convert(tmp_path / "model.safetensors", out=tmp_path / "out", tokenizer=TOKENIZER)


def test_what_is_missing_or_misshapen_is_called_as_in_the_file(files, tmp_path: Path) -> None:
    tensors = load_file(files["sd2"])
    del tensors[f"{UNET}input_blocks.1.0.in_layers.2.weight"]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        Error, match=r"missing \(1\):\n *model.diffusion_model.input_blocks.1.0.in_layers.2.weight"
    ):
        convert(tmp_path / "model.safetensors", out=tmp_path / "out", tokenizer=TOKENIZER)
    tensors = load_file(files["sd2"])
    name = f"{OPEN_CLIP}transformer.resblocks.3.attn.in_proj_weight"
    tensors[name] = tensors[name][:-1]
    save_file(tensors, tmp_path / "model.safetensors")
    with pytest.raises(
        Error, match=r"mismatched \(3\):\n *cond_stage_model.model.transformer.resblocks.3.attn"
    ):
        convert(tmp_path / "model.safetensors", out=tmp_path / "out", tokenizer=TOKENIZER)


def channels(name: str, count: int) -> Callable[[Tensors], Tensors]:
    def change(tensors: Tensors) -> Tensors:
        shape = list(tensors[name].shape)
        shape[1] = count
        return {**tensors, name: np.zeros(shape, np.float32)}

    return change


def named(*names: str) -> Callable[[Tensors], Tensors]:
    return lambda _: {name: np.zeros((4, 4), np.float32) for name in names}


OTHERS = [
    (channels(f"{UNET}input_blocks.0.0.weight", 9), "an inpainting model"),
    (channels(f"{UNET}input_blocks.0.0.weight", 8), "an InstructPix2Pix model"),
    (channels(f"{UNET}input_blocks.0.0.weight", 5), "a depth model"),
    (channels(f"{VAE}decoder.conv_in.weight", 16), "16 latent channels"),
    (named(f"{UNET}joint_blocks.0.x_block.attn.qkv.weight"), "Stable Diffusion 3"),
    (named("double_blocks.0.img_attn.proj.weight"), "Flux"),
    (named(f"{UNET}label_emb.0.0.weight", f"{UNET}input_blocks.0.0.weight"), "Stable Diffusion XL"),
    (named("conditioner.embedders.1.model.ln_final.weight"), "Stable Diffusion XL"),
    (named("text_encoders.t5xxl.transformer.shared.weight"), "Stable Diffusion 3 or a later family"),
    (named("lora_unet_mid_block_attentions_0_proj_in.lora_down.weight"), "a LoRA"),
    (named("unet.mid_block.attentions.0.proj_in.lora_A.weight"), "a LoRA"),
    (named("lora_unet_mid_block_attentions_0_proj_in.hada_w1_a"), "a LoHa"),
    (named("lora_unet_mid_block_attentions_0_proj_in.lokr_w1"), "a LoKr"),
    (named("lora_te_text_model_encoder_layers_0_mlp_fc1.dora_scale"), "a DoRA"),
    (named("control_model.input_hint_block.0.weight"), "a ControlNet"),
    (named("emb_params"), "a textual inversion"),
]


@pytest.mark.parametrize(("change", "what"), OTHERS, ids=[what for _, what in OTHERS])
def test_other_families_are_refused_by_name(change, what: str, files, tmp_path: Path) -> None:
    save_file(change(load_file(files["sd1"])), tmp_path / "model.safetensors")
    for read in (
        lambda file: convert(file, out=tmp_path / "out"),
        lambda file: to_keras(file, out=tmp_path / "out"),
        inspect,
    ):
        with pytest.raises(Error) as caught:
            read(tmp_path / "model.safetensors")
        first, *rest = str(caught.value).splitlines()
        assert what in first and len(rest) == 1
    assert [path.name for path in tmp_path.iterdir()] == ["model.safetensors"]


@pytest.mark.parametrize("prediction", ["epsilon", "v_prediction"])
def test_what_a_full_size_unet_predicts_is_told_by_its_weights(prediction: str, tmp_path: Path) -> None:
    """Where a file of Stable Diffusion 2 has no metadata."""
    from dataclasses import replace

    from kcv2diffusers.maps.tables import spec, tables
    from kcv2diffusers.pipeline.configs import scheduler_with
    from kcv2diffusers.sources.open import open_sources
    from kcv2diffusers.sources.recognise import fit

    name = f"{UNET}output_blocks.11.1.transformer_blocks.0.norm1.bias"
    spread = {"epsilon": 0.03, "v_prediction": 0.2}[prediction]
    values = np.random.default_rng(0).normal(0, spread, 320).astype(np.float16)
    save_file({name: values, f"{UNET}out.2.bias": values}, tmp_path / "unet.safetensors")
    (source,) = open_sources(tmp_path / "unet.safetensors")
    unet = replace(fit(source, spec("unet", "sd2")), dims=dict(tables()["unet"].versions["sd2"].dims))
    assert scheduler_with(unet)[0]["prediction_type"] == prediction


# Pickles


class Payload:
    """Makes a file when it is unpickled."""

    def __init__(self, marker: Path) -> None:
        self.marker = marker

    def __reduce__(self) -> tuple[Any, ...]:
        return Path.touch, (self.marker,)


@pytest.mark.parametrize("zipped", [True, False])
@pytest.mark.parametrize("nested", [True, False])
def test_pickled_files_are_read_where_it_is_allowed(
    zipped: bool, nested: bool, files, pipelines, tmp_path: Path
) -> None:
    import torch
    from safetensors.torch import load_file as load_torch

    tensors: dict[str, Any] = load_torch(files["sd2"])
    bias = f"{UNET}out.2.bias"
    tensors[bias] = tensors[bias].to(torch.bfloat16).to(torch.float32)
    content = {"state_dict": tensors, "epoch": 3} if nested else tensors
    file = tmp_path / "model.ckpt"
    (tmp_path / "kcv2diffusers.json").write_text(json.dumps(CONFIGS))
    torch.save(content, file, _use_new_zipfile_serialization=zipped)
    for read in (
        lambda **options: convert(file, out=tmp_path / "model.safetensors", **options),
        lambda **options: inspect(file, **options),
    ):
        with pytest.raises(Error, match=r"pickle.*\n.*--allow-pickle"):
            read()
        read(allow_pickle=True)
    made = load_torch(tmp_path / "model.safetensors")
    assert made.keys() == tensors.keys()
    assert all(torch.equal(made[name], tensors[name]) for name in made)


def test_pickled_bfloat16(files, tmp_path: Path) -> None:
    import torch
    from safetensors.torch import load_file as load_torch

    tensors = {name: tensor.to(torch.bfloat16) for name, tensor in load_torch(files["sd1"]).items()}
    torch.save(tensors, tmp_path / "model.ckpt")
    (tmp_path / "kcv2diffusers.json").write_text(json.dumps(CONFIGS))
    convert(tmp_path / "model.ckpt", out=tmp_path / "model.safetensors", allow_pickle=True)
    made = load_torch(tmp_path / "model.safetensors")
    assert all(torch.equal(made[name], tensors[name]) for name in tensors)


@pytest.mark.parametrize("how", ["pickle", "zip", "beside the tensors"])
def test_a_hostile_pickle_runs_nothing(how: str, files, tmp_path: Path) -> None:
    import pickle

    import torch
    from safetensors.torch import load_file as load_torch

    marker, file = tmp_path / "marker", tmp_path / "model.ckpt"
    payload = Payload(marker)
    if how == "pickle":
        file.write_bytes(pickle.dumps(payload))
    else:
        beside = load_torch(files["sd1"]) if how == "beside the tensors" else {}
        torch.save({**beside, "callbacks": payload}, file)
    for allow in (False, True):
        for read in (
            lambda allow: convert(file, out=tmp_path / "out.safetensors", allow_pickle=allow),
            lambda allow: inspect(file, allow_pickle=allow),
        ):
            with pytest.raises(Error) as caught:
                read(allow)
            assert len(str(caught.value).splitlines()) == 2
            assert [path.name for path in tmp_path.iterdir()] == [file.name]
    with suppress(RuntimeError):  # a bare pickle is none of PyTorch's files, which it sees afterwards
        torch.load(file, weights_only=False)
    assert marker.exists()  # so the payload would have run


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ([1, 2], "not of named tensors"),
        ({"x": 1}, "0 tensors are not those of a Stable Diffusion model"),
    ],
)
def test_pickles_of_something_else(content: Any, message: str, tmp_path: Path) -> None:
    import torch

    torch.save(content, tmp_path / "model.ckpt")
    with pytest.raises(Error, match=message):
        inspect(tmp_path / "model.ckpt", allow_pickle=True)


def test_damaged_pickles(files, tmp_path: Path) -> None:
    import random

    import torch
    from safetensors.torch import load_file as load_torch

    torch.save(load_torch(files["sd1"]), tmp_path / "model.ckpt")
    content = (tmp_path / "model.ckpt").read_bytes()
    chosen = random.Random(0)
    for size in [0, 1, 4, *(chosen.randrange(len(content)) for _ in range(10))]:
        (tmp_path / "model.ckpt").write_bytes(content[:size])
        with pytest.raises(Error) as caught:
            inspect(tmp_path / "model.ckpt", allow_pickle=True)
        assert len(str(caught.value).splitlines()) == 2


def test_an_old_pytorch_is_not_used(files, tmp_path: Path, monkeypatch) -> None:
    import torch

    torch.save({}, tmp_path / "model.ckpt")
    monkeypatch.setattr(torch, "__version__", "2.5.1+cpu")
    with pytest.raises(Error, match=r"needs PyTorch 2\.6 or newer"):
        inspect(tmp_path / "model.ckpt", allow_pickle=True)


# Used wherever a source or a base is


def test_to_keras_writes_what_the_pipeline_gives(files, pipelines, tmp_path: Path) -> None:
    for version in VERSIONS:
        to_keras(pipelines[version], out=tmp_path / "pipeline", overwrite=True)
        to_keras(files[version], out=tmp_path / "file", overwrite=True)
        names = sorted(path.name for path in (tmp_path / "file").iterdir())
        assert len(names) == 5 and "kcv2diffusers.json" in names
        for name in names:
            one, two = (tmp_path / kind / name for kind in ("pipeline", "file"))
            assert one.read_bytes() == two.read_bytes()


@pytest.mark.parametrize("version", VERSIONS)
def test_inspect_shows_the_same_of_a_pipeline_and_its_file(version: str, pipelines, files) -> None:
    def shown(source: Path) -> list[tuple[Any, ...]]:
        found = sorted(inspect(source), key=lambda entry: entry.part)
        return [(e.part, e.version, e.dtypes, e.tensors, e.parameters, e.sizes, e.problems) for e in found]

    assert shown(pipelines[version]) == shown(files[version])
    assert len(shown(pipelines[version])) == 4


def test_a_file_is_what_its_pipeline_is_verified_against(files, tmp_path: Path) -> None:
    """As `convert --verify` does; a pipeline that the other parts came from is its base."""
    result = convert(files["sd1"], out=tmp_path / "out", tokenizer=TOKENIZER)
    assert set(result.sources.values()) == {files["sd1"]} and len(result.sources) == 4
    assert verify(result.out, level="weights", **result.sources).passed


def test_inspect_shows_what_a_file_says_of_itself(pipelines, tmp_path: Path) -> None:
    out = tmp_path / "dog.safetensors"
    convert(pipelines["sd1"], out=out, title="My\x1b[31m dog", trigger_phrase="sks dog")
    found = inspect(out)
    assert {entry.part for entry in found} == {"unet", "text_encoder", "vae_encoder", "vae_decoder"}
    text = found[0].text()
    assert "title: My" in text and "\x1b" not in text
    assert "trigger phrase: sks dog" in text
    assert f"hash sha256: {metadata(out)['modelspec.hash_sha256']}" in text
    assert found[0].to_dict()["metadata"]["modelspec.trigger_phrase"] == "sks dog"


@pytest.mark.slow
def test_the_keras_models_take_a_file_as_base(files, pipelines) -> None:
    import keras

    from kcv2diffusers.models.base import load_base

    for version in VERSIONS:
        one = load_base(files[version], tokenizer=TOKENIZER)
        two = load_base(pipelines[version])
        assert one.config == two.config
        assert one.prediction_type == two.prediction_type and one.image_size == two.image_size
        for model in ("unet", "text_encoder", "decoder", "image_encoder"):
            for a, b in zip(getattr(one, model).weights, getattr(two, model).weights, strict=True):
                assert np.array_equal(keras.ops.convert_to_numpy(a), keras.ops.convert_to_numpy(b))
