"""From KerasCV checkpoints to pipelines that stock diffusers runs, through the command line."""

from __future__ import annotations

import hashlib
import json
import logging
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping
from pathlib import Path
from typing import Any
from warnings import catch_warnings, simplefilter

import h5py
import numpy as np
import pytest
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, StableDiffusionPipeline, UNet2DConditionModel
from diffusers.models.activations import GEGLU
from safetensors.torch import load_file, save_file
from support.checkpoints import ROOT, cached
from transformers import CLIPTextConfig

from kcv2diffusers.maps.tables import specs
from kcv2diffusers.pipeline.configs import config_of

pytestmark = pytest.mark.slow

PARTS = ("unet", "text_encoder", "vae_decoder", "vae_encoder")
WEIGHTS = {
    "unet": "unet/diffusion_pytorch_model.safetensors",
    "text_encoder": "text_encoder/model.safetensors",
    "vae": "vae/diffusion_pytorch_model.safetensors",
}
Cli = Callable[..., str]
Load = Callable[..., StableDiffusionPipeline]


@pytest.fixture(scope="module", autouse=True)
def _no_gradients() -> Iterator[None]:
    with torch.no_grad():
        yield


@pytest.fixture(scope="module")
def cli() -> Cli:
    """Run the command in a process of its own; returns what it prints."""

    def run(*arguments: str | Path) -> str:
        done = subprocess.run(
            [sys.executable, "-m", "kcv2diffusers", *map(str, arguments)],
            cwd=ROOT,
            capture_output=True,
            text=True,
            check=False,
        )
        assert done.returncode == 0, done.stderr
        # No bar where there is no terminal, but a line each for the seconds of a busy machine.
        assert re.sub(r"(?m)^Converting [\d.]+/[\d.]+ GB\n", "", done.stderr) == ""
        return done.stdout

    return run


@pytest.fixture(scope="module")
def load() -> Load:
    """`from_pretrained`, and nothing to complain about: missing or unexpected keys are warnings."""

    def run(folder: Path, **options: Any) -> StableDiffusionPipeline:
        warnings: list[logging.LogRecord] = []
        handler = logging.Handler(logging.WARNING)
        handler.emit = warnings.append  # type: ignore[method-assign]
        libraries = [logging.getLogger(name) for name in ("diffusers", "transformers")]
        for library in libraries:
            library.addHandler(handler)
        try:
            with catch_warnings():
                simplefilter("error", FutureWarning)  # an outdated config
                pipe = StableDiffusionPipeline.from_pretrained(folder, **options)
        finally:
            for library in libraries:
                library.removeHandler(handler)
        assert [record.getMessage() for record in warnings] == []
        pipe.set_progress_bar_config(disable=True)
        return pipe

    return run


def sampled(version: int, bpe: Path) -> tuple[Path, dict[str, Any], dict[str, np.ndarray]]:
    """A small model's checkpoints and what KerasCV's own pipeline made of it (support/kerascv/sample.py)."""
    folder = cached("keras3-torch", "sample.py", str(version), str(bpe))
    with np.load(folder / "sample.npz") as arrays:
        return folder, json.loads((folder / "sample.json").read_text()), dict(arrays)


@pytest.fixture(scope="module")
def keras(bpe: Path) -> Path:
    """The folder of the checkpoints of a small SD1."""
    return sampled(1, bpe)[0]


@pytest.fixture(scope="module")
def converted(keras: Path, bpe: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Its pipeline. Tests copy it before they change anything."""
    out = tmp_path_factory.mktemp("converted") / "pipeline"
    cli("convert", keras / "parts", "--out", out, "--tokenizer", bpe, "--image-size", 64)
    return out


def tensors(folder: Path) -> dict[str, dict[str, torch.Tensor]]:
    return {name: load_file(folder / file) for name, file in WEIGHTS.items() if (folder / file).exists()}


def assert_equal(actual: Mapping[str, torch.Tensor], expected: Mapping[str, torch.Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, value in expected.items():
        assert value.dtype == actual[name].dtype and torch.equal(value, actual[name]), name


def digest(tensor: torch.Tensor) -> list[Any]:
    return [list(tensor.shape), hashlib.sha256(tensor.numpy().tobytes()).hexdigest()]


def relative(actual: Any, expected: np.ndarray) -> float:
    return float(np.abs(np.asarray(actual) - expected).max() / np.abs(expected).max())


# The whole


@pytest.mark.parametrize("version", [1, 2])
def test_folder_loads_and_draws(version: int, bpe: Path, cli: Cli, load: Load, tmp_path: Path) -> None:
    folder, _, _ = sampled(version, bpe)
    out = tmp_path / "pipeline"
    printed = cli("convert", folder / "parts", "--out", out, "--tokenizer", bpe, "--image-size", 64, "--json")
    result = json.loads(printed)
    sizes = {name: sum(t.nbytes for t in held.values()) for name, held in tensors(out).items()}
    assert 0 < result.pop("seconds") < 60
    assert result == {
        "out": str(out),
        "version": f"sd{version}",
        "complete": True,
        "pipeline": "StableDiffusionPipeline",
        "absent": [],
        "parts": {p: f"{folder / 'parts' / p}.weights.h5 (.weights.h5)" for p in PARTS},
        "dtypes": dict.fromkeys(WEIGHTS, "float32"),
        "missing": [],
        "bytes_read": sum(sizes.values()),
        "bytes_written": sum(sizes.values()),
        "notes": ["The safety checker is off: KerasCV has none."],
    }
    assert {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()} == {
        *WEIGHTS.values(),
        "conversion.json",
        *(f"{name}/config.json" for name in WEIGHTS),
        "model_index.json",
        "scheduler/scheduler_config.json",
        *(f"tokenizer/{n}.json" for n in ("vocab", "special_tokens_map", "tokenizer_config")),
        "tokenizer/merges.txt",
    }
    pipe = load(out)
    assert_equal(pipe.unet.state_dict(), tensors(out)["unet"])
    assert_equal(pipe.vae.state_dict(), tensors(out)["vae"])
    assert pipe.unet.config.use_linear_projection == (version == 2)
    assert pipe.text_encoder.config.hidden_act == ("quick_gelu" if version == 1 else "gelu")
    assert pipe.tokenizer("a cat").input_ids == [49406, 320, 2368, 49407]
    (image,) = pipe("a cat", num_inference_steps=2).images
    assert image.size == (64, 64) and np.asarray(image).std() > 1


@pytest.mark.parametrize("version", [1, 2])
def test_kerascv_s_sampler_replayed(
    version: int, bpe: Path, cli: Cli, load: Load, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    folder, told, keras = sampled(version, bpe)
    cli("convert", folder / "parts", "--out", tmp_path / "out", "--tokenizer", bpe)
    pipe = load(tmp_path / "out")
    count = told["steps"]
    timesteps = (np.arange(count) * (999 / (count - 1))).round().astype(int)[::-1].tolist()
    noise = torch.from_numpy(keras["noise"]).permute(2, 0, 1)[None]

    def run(**options: Any) -> Any:
        return pipe(**told["run"], latents=noise, height=128, width=128, **options).images

    def latents(**options: Any) -> np.ndarray:
        return run(output_type="latent", **options).permute(0, 2, 3, 1).numpy()

    stock = relative(latents(timesteps=timesteps), keras["latent"])
    assert stock < 2e-2
    assert relative(latents(num_inference_steps=count), keras["latent"]) > 0.1  # other timesteps
    monkeypatch.setattr(GEGLU, "gelu", lambda self, gate: F.gelu(gate, approximate="tanh"))
    error = relative(latents(timesteps=timesteps), keras["latent"])
    levels = np.abs(run(timesteps=timesteps, output_type="np") * 255 - keras["image"])

    def formula(latent: torch.Tensor, t: torch.Tensor, encoder_hidden_states: torch.Tensor, **_: Any) -> Any:
        context = encoder_hidden_states.mean((1, 2))[:, None, None, None]
        return (torch.sin(latent) * (1 + torch.cos(t.float()) / 2) + context,)

    monkeypatch.setattr(pipe.unet, "forward", formula)
    sampler = relative(latents(timesteps=timesteps), keras["formula"])
    print(f"\nSD{version}, {count} steps: sampler alone {sampler:.1e}, with UNet and tanh GELU {error:.1e},")
    print(f"stock {stock:.1e}; largest difference of the image {levels.max():.2f} of 255")
    assert sampler < 5e-6
    assert error < 2e-3  # random weights and guidance magnify what a UNet rounds
    assert levels.max() < 1.5  # KerasCV cuts the fraction off


# Configs. What is published at stable-diffusion-v1-5 and stable-diffusion-2-1-base.

UNET = {
    "act_fn": "silu",
    "attention_head_dim": 8,
    "block_out_channels": [320, 640, 1280, 1280],
    "center_input_sample": False,
    "cross_attention_dim": 768,
    "down_block_types": [*["CrossAttnDownBlock2D"] * 3, "DownBlock2D"],
    "downsample_padding": 1,
    "flip_sin_to_cos": True,
    "freq_shift": 0,
    "in_channels": 4,
    "layers_per_block": 2,
    "mid_block_scale_factor": 1,
    "norm_eps": 1e-05,
    "norm_num_groups": 32,
    "out_channels": 4,
    "sample_size": 64,
    "up_block_types": ["UpBlock2D", *["CrossAttnUpBlock2D"] * 3],
}
TEXT_ENCODER = {
    "architectures": ["CLIPTextModel"],
    "attention_dropout": 0.0,
    "bos_token_id": 0,
    "dropout": 0.0,
    "eos_token_id": 2,
    "hidden_act": "quick_gelu",
    "hidden_size": 768,
    "initializer_factor": 1.0,
    "initializer_range": 0.02,
    "intermediate_size": 3072,
    "layer_norm_eps": 1e-05,
    "max_position_embeddings": 77,
    "model_type": "clip_text_model",
    "num_attention_heads": 12,
    "num_hidden_layers": 12,
    "pad_token_id": 1,
    "projection_dim": 768,
    "torch_dtype": "float32",
    "vocab_size": 49408,
}
VAE = {
    "act_fn": "silu",
    "block_out_channels": [128, 256, 512, 512],
    "down_block_types": ["DownEncoderBlock2D"] * 4,
    "in_channels": 3,
    "latent_channels": 4,
    "layers_per_block": 2,
    "norm_num_groups": 32,
    "out_channels": 3,
    "sample_size": 512,
    "up_block_types": ["UpDecoderBlock2D"] * 4,
}
PUBLISHED = {
    ("unet", "sd1"): UNET,
    ("unet", "sd2"): UNET
    | {
        "attention_head_dim": [5, 10, 20, 20],
        "cross_attention_dim": 1024,
        "dual_cross_attention": False,
        "num_class_embeds": None,
        "only_cross_attention": False,
        "upcast_attention": False,
        "use_linear_projection": True,
    },
    ("text_encoder", "sd1"): TEXT_ENCODER,
    ("text_encoder", "sd2"): TEXT_ENCODER
    | {
        "hidden_act": "gelu",
        "hidden_size": 1024,
        "intermediate_size": 4096,
        "num_attention_heads": 16,
        "num_hidden_layers": 23,
        "projection_dim": 512,
    },
    ("vae", "any"): VAE,
}
CLASSES = {"unet": UNet2DConditionModel, "vae": AutoencoderKL}


@pytest.mark.parametrize(("name", "version"), PUBLISHED)
def test_config_is_the_published_one(name: str, version: str) -> None:
    spec = next(s for s in specs() if s.table.name == name and s.version == version)
    ours = config_of(spec.table, version, spec.nominal, image_size=512)
    published = PUBLISHED[name, version]

    def effective(config: Mapping[str, Any]) -> dict[str, Any]:
        """With every default filled in by the library."""
        if name == "text_encoder":
            return CLIPTextConfig(**config).to_dict()
        with torch.device("meta"):
            model = CLASSES[name].from_config({k: v for k, v in config.items() if k[0] != "_"})
        return {k: v for k, v in model.config.items() if k != "_use_default_values"}

    left, right = effective(ours), effective(published)
    # The ids published for CLIP are wrong (they stand for another vocabulary) and only used when pooling.
    different = {"bos_token_id": 49406, "eos_token_id": 49407} if name == "text_encoder" else {}
    assert {k: left.get(k) for k in {*left, *right} if left.get(k) != right.get(k)} == different
    assert set(published) - set(ours) <= {
        "dual_cross_attention", "num_class_embeds", "only_cross_attention", "upcast_attention"
    }  # fmt: skip


# Dtypes


@pytest.mark.parametrize(
    ("dtype", "variant"), [("float16", "fp16"), ("float16", None), ("bfloat16", None), ("bfloat16", "bf16")]
)
def test_dtype(
    dtype: str,
    variant: str | None,
    keras: Path,
    converted: Path,
    bpe: Path,
    cli: Cli,
    load: Load,
    tmp_path: Path,
) -> None:
    out = tmp_path / "pipeline"
    options = ["--variant", variant] if variant else []
    cli("convert", keras / "parts", "--out", out, "--tokenizer", bpe, "--dtype", dtype, *options)
    kind = getattr(torch, dtype)
    for name, file in WEIGHTS.items():
        stem, suffix = file.rsplit(".", 1)
        expected = {key: value.to(kind) for key, value in tensors(converted)[name].items()}
        assert_equal(load_file(out / (f"{stem}.{variant}.{suffix}" if variant else file)), expected)
    pipe = load(out, variant=variant, dtype=kind)
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {kind}
    assert_equal(pipe.unet.state_dict(), load_file(next((out / "unet").glob("*.safetensors"))))
    pipe = load(out, variant=variant)  # where no dtype is asked for, all parts have the same
    assert {part.dtype for part in (pipe.unet, pipe.vae, pipe.text_encoder)} == {torch.float32}


# Where missing parts come from


def same_but(converted: Path, out: Path, **changed: Mapping[str, torch.Tensor]) -> None:
    expected = tensors(converted) | changed
    for name, held in tensors(out).items():
        assert_equal(held, expected[name])


@pytest.fixture(scope="module")
def other(
    keras: Path, bpe: Path, cli: Cli, tmp_path_factory: pytest.TempPathFactory
) -> dict[str, torch.Tensor]:
    """Weights of another small model's VAE, to tell where a tensor is from."""
    files = [
        cached("keras3-torch", "forward.py", f"vae_{h}", "1") / f"vae_{h}.weights.h5"
        for h in ("encoder", "decoder")
    ]
    out = tmp_path_factory.mktemp("other") / "vae"
    cli("convert", *files, "--out", out, "--base", "none")
    return tensors(out)["vae"]


def old_names(base: Path) -> None:
    """A base as it was published in 2022: older attention names, a position_ids buffer, no safety."""
    vae = base / WEIGHTS["vae"]
    new = {"to_q": "query", "to_k": "key", "to_v": "value", "to_out.0": "proj_attn"}
    held = {}
    for name, tensor in load_file(vae).items():
        for current, old in new.items():
            name = name.replace(f".{current}.", f".{old}.")
        held[name] = tensor
    assert sum(".proj_attn." in name for name in held) == 4
    save_file(held, vae, {"format": "pt"})


def position_ids(base: Path) -> None:
    file = base / WEIGHTS["text_encoder"]
    name = "text_model.embeddings.position_ids"
    save_file(load_file(file) | {name: torch.arange(77)[None]}, file, {"format": "pt"})


def no_prefix(base: Path) -> None:
    """As transformers 5 names them."""
    file = base / WEIGHTS["text_encoder"]
    held = {name.removeprefix("text_model."): t for name, t in load_file(file).items()}
    save_file(held | {"embeddings.position_ids": torch.arange(77)[None]}, file, {"format": "pt"})


def saved_again(base: Path) -> None:
    """As diffusers itself saves it."""
    pipe = StableDiffusionPipeline.from_pretrained(base)
    shutil.rmtree(base)
    pipe.save_pretrained(base)


@pytest.mark.parametrize("change", [None, old_names, position_ids, no_prefix, saved_again])
def test_base_pipeline_fills_in(
    change: Callable[[Path], None] | None,
    keras: Path,
    converted: Path,
    cli: Cli,
    load: Load,
    tmp_path: Path,
) -> None:
    base, out = tmp_path / "base", tmp_path / "out"
    shutil.copytree(converted, base)
    if change:
        change(base)
    printed = cli("convert", keras / "parts" / "unet.weights.h5", "--out", out, "--base", base, "--json")
    same_but(converted, out)
    result = json.loads(printed)
    assert result["complete"]
    assert [part for part, source in result["parts"].items() if str(base) in source] == [*PARTS[1:]]
    assert load(out).tokenizer("a cat").input_ids == [49406, 320, 2368, 49407]


def test_base_pipeline_fills_in_half_a_vae(
    converted: Path, other: dict[str, torch.Tensor], cli: Cli, load: Load, tmp_path: Path
) -> None:
    for half, prefixes in (("decoder", ("decoder.", "post_quant")), ("encoder", ("encoder.", "quant"))):
        file = cached("keras3-torch", "forward.py", f"vae_{half}", "1") / f"vae_{half}.weights.h5"
        out = tmp_path / half
        cli("convert", f"--vae-{half}", file, "--out", out, "--base", converted)
        mine = {k: v for k, v in other.items() if k.startswith(prefixes)}
        assert len(mine) == {"decoder": 140, "encoder": 108}[half]
        same_but(converted, out, vae=tensors(converted)["vae"] | mine)
        load(out)


def test_base_of_another_dtype(keras: Path, converted: Path, cli: Cli, load: Load, tmp_path: Path) -> None:
    """The base's parts are cast with the others."""
    out = tmp_path / "half"
    cli("convert", keras / "parts" / "unet.weights.h5", "--out", out, "--base", converted,
        "--dtype", "float16", "--variant", "fp16")  # fmt: skip
    pipe = load(out, variant="fp16", dtype=torch.float16)
    assert_equal(pipe.vae.state_dict(), {k: v.half() for k, v in tensors(converted)["vae"].items()})
    again = tmp_path / "again"  # a base with nothing but a variant
    cli("convert", keras / "parts" / "unet.weights.h5", "--out", again, "--base", out)
    held = tensors(again)
    assert {t.dtype for t in held["text_encoder"].values()} == {torch.float16}
    assert_equal(held["unet"], tensors(converted)["unet"])


def test_base_states_the_heads(keras: Path, converted: Path, cli: Cli, tmp_path: Path) -> None:
    """A model of unusual widths without its kcv2diffusers.json, beside a base of the same shape."""
    alone = tmp_path / "alone"
    alone.mkdir()
    for part in ("unet", "text_encoder"):
        shutil.copy(keras / "parts" / f"{part}.weights.h5", alone)
    out = tmp_path / "out"
    cli("convert", alone, "--out", out, "--base", converted, "--image-size", 64)
    same_but(converted, out)
    for name in WEIGHTS:
        config = (Path(name) / "config.json").as_posix()
        assert json.loads((out / config).read_text()) == json.loads((converted / config).read_text())


def test_base_of_kerascv_files(keras: Path, converted: Path, bpe: Path, cli: Cli, tmp_path: Path) -> None:
    parts, rest = keras / "parts", tmp_path / "rest"
    rest.mkdir()
    for part in ("vae_decoder", "vae_encoder"):
        shutil.copy(parts / f"{part}.weights.h5", rest)
    out = tmp_path / "out"
    bases = ["--base", rest, "--base", parts / "text_encoder.weights.h5"]
    cli("convert", "--unet", parts / "unet.weights.h5", "--out", out, *bases, "--tokenizer", bpe)
    same_but(converted, out)
    assert tensors(out).keys() == WEIGHTS.keys()


def test_base_none_writes_what_is_given(keras: Path, converted: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    file = keras / "parts" / "unet.weights.h5"
    printed = cli("convert", file, "--out", out, "--base", "none", "--image-size", 64)
    assert "A full pipeline still needs: text encoder, VAE decoder, VAE encoder." in printed
    files = {str(file.relative_to(out)) for file in out.rglob("*") if file.is_file()}
    assert files == {WEIGHTS["unet"], "unet/config.json"}
    same_but(converted, out)
    assert (out / "unet/config.json").read_text() == (converted / "unet/config.json").read_text()
    UNet2DConditionModel.from_pretrained(out / "unet")


def test_overwrite_replaces_all(keras: Path, converted: Path, bpe: Path, cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "out"
    arguments = ["convert", keras / "parts", "--out", out, "--tokenizer", bpe, "--image-size", 64]
    cli(*arguments, "--dtype", "float16", "--variant", "fp16")
    cli(*arguments, "--overwrite")
    same_but(converted, out)
    assert not list(out.rglob("*.fp16.*")) and [p.name for p in tmp_path.iterdir()] == ["out"]


# Textual inversion


@pytest.mark.parametrize("count", [1, 2])
def test_textual_inversion(
    count: int, keras: Path, converted: Path, bpe: Path, cli: Cli, load: Load, tmp_path: Path
) -> None:
    folder, told, sample = sampled(1, bpe)
    tokens, prompt = told["placeholders"][:count], told["inversion"][str(count)]
    file, out = folder / f"inverted_{count}" / "text_encoder.weights.h5", tmp_path / "out"
    named = [argument for token in tokens for argument in ("--placeholder-token", token)]
    cli("convert", file, "--out", out, "--base", converted, *named)
    pipe = load(out)
    padded = pipe.tokenizer(prompt, padding="max_length", max_length=77)
    ids = sample[f"tokens_{count}"].tolist()
    assert padded.input_ids == ids + [49407] * (77 - len(ids))
    assert [i for i in ids if i >= 49408] == [49408 + n for n in range(count)]
    hidden = pipe.text_encoder(torch.tensor([padded.input_ids])).last_hidden_state
    assert relative(hidden, sample[f"context_{count}"]) < 1e-5

    with h5py.File(file) as opened:
        rows = torch.from_numpy(opened["layers/clip_embedding/token_embedding/vars/0"][49408:])
    embeds = sorted(out.glob("learned_embeds*"))
    names = (
        ["learned_embeds.safetensors"] if count == 1 else [f"learned_embeds-{n}.safetensors" for n in (0, 1)]
    )
    assert [path.name for path in embeds] == names
    base = load(converted)
    assert base.tokenizer.convert_tokens_to_ids(tokens[0]) == 49407  # unknown as yet
    for path in embeds:
        base.load_textual_inversion(out, weight_name=path.name)
    held = base.text_encoder.get_input_embeddings().weight
    assert base.tokenizer(prompt).input_ids == ids
    assert torch.equal(held[49408:], rows)
    same_but(converted, out, text_encoder=tensors(out)["text_encoder"])


# What Keras does to a partly frozen model


@pytest.mark.parametrize(
    ("stack", "part"),
    [*(("keras2", part) for part in PARTS), ("keras3", "text_encoder"), ("keras3", "vae_encoder")],
)
def test_partly_frozen(stack: str, part: str, cli: Cli, tmp_path: Path) -> None:
    folder = cached(stack, "frozen.py", part, "1")
    files = sorted(path for path in folder.glob("*/*") if path.suffix != ".json")
    assert {path.name for path in files} == ({"legacy.h5"} if stack == "keras2" else {"model.h5", "export"})
    for number, file in enumerate(files):
        sources = [file]
        if part.startswith("vae"):
            half = "vae_encoder" if part == "vae_decoder" else "vae_decoder"
            sources.append(cached("keras3-torch", "forward.py", half, "1") / f"{half}.weights.h5")
        out = tmp_path / str(number)
        cli("convert", *sources, "--out", out, "--base", "none")
        (weights,) = tensors(out).values()
        expected = json.loads((file.parent / "expected.json").read_text())
        assert {name: digest(weights[name]) for name in expected} == expected


# transformers 4

TRANSFORMERS4 = """
import hashlib, json, sys
import transformers
model, info = transformers.CLIPTextModel.from_pretrained(sys.argv[1], output_loading_info=True)
digests = {k: hashlib.sha256(v.numpy().tobytes()).hexdigest() for k, v in model.state_dict().items()}
problems = {k: list(v) for k, v in info.items()}
print(json.dumps({"version": transformers.__version__, "digests": digests, "problems": problems}))
"""


def test_text_encoder_in_transformers_4(converted: Path) -> None:
    default = ROOT / ".venv" / "transformers4"
    where = Path(os.environ.get("KCV_TRANSFORMERS4") or default)
    if not where.is_dir():
        pytest.skip(f"transformers 4 is not at $KCV_TRANSFORMERS4 or {default}")
    done = subprocess.run(
        [sys.executable, "-c", TRANSFORMERS4, converted / "text_encoder"],
        env={**os.environ, "PYTHONPATH": str(where)},
        capture_output=True,
        text=True,
        check=True,
    )
    result = json.loads(done.stdout.splitlines()[-1])
    assert result["version"].startswith("4.")
    assert not any(result["problems"].values())
    expected = tensors(converted)["text_encoder"]
    assert result["digests"] == {name: digest(tensor)[1] for name, tensor in expected.items()}
