"""verify of Stable Diffusion 3 against KerasHub's own classes; mistakes planted in a pipeline are located.

Both sides run in this process, to save their start, except where a test says so.
"""

from __future__ import annotations

import json
import shutil
import subprocess
import sys
from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support import keras_hub

from kcv2diffusers import convert, verify
from kcv2diffusers.errors import Error
from kcv2diffusers.progress import StageProgress
from kcv2diffusers.verification import diffusers_side, exchange, stock_flow
from kcv2diffusers.verification import run as running
from kcv2diffusers.verification.request import Request
from kcv2diffusers.verification.result import Verified

pytestmark = pytest.mark.slow
keras_hub_side = pytest.importorskip("kcv2diffusers.verification.keras_hub_side", exc_type=ImportError)

TRANSFORMER = "transformer/diffusion_pytorch_model.safetensors"
PROMPT = "a photo of a red cat"
Check = Callable[..., Verified]
Plant = Callable[[Path], None]


def source(kind: str) -> Path:
    return (keras_hub.trained() if kind == "trained" else keras_hub.models() / kind) / "task"


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """The pipeline of each kind; that with T5 has no tokenizers."""
    folder = tmp_path_factory.mktemp("pipelines")
    for kind in keras_hub.KINDS:
        convert(source(kind), out=folder / kind, **({"base": "none"} if kind == "sd35m" else {}))
    return {kind: folder / kind for kind in keras_hub.KINDS}


@pytest.fixture(scope="module")
def check(tmp_path_factory: pytest.TempPathFactory) -> Check:
    """`verify` in this process; what the Keras side left is used again."""
    kept: dict[str, Path] = {}

    def run_side(name: str, title: str, folder: Path, progress: StageProgress, backend: str) -> None:
        request = Request.load(folder)
        if name == "diffusers_side":
            return diffusers_side.run(folder, request, progress)
        key = json.dumps(asdict(request) | {"pipeline": ""}) + (folder / "plan.json").read_text()
        if key not in kept:
            assert name == "keras_hub_side" and backend == "torch"
            keras_hub_side.run(folder, request, progress)
            kept[key] = tmp_path_factory.mktemp("keras") / "keras"
            shutil.copytree(folder / "keras", kept[key])
        shutil.copytree(kept[key], folder / "keras", dirs_exist_ok=True)

    def run(pipeline: Path, kind: str, **options: Any) -> Verified:
        options = {"prompts": [PROMPT], "seeds": 1, "steps": 4, "size": keras_hub.SIZE, **options}
        with pytest.MonkeyPatch.context() as patch:
            patch.setattr(running, "run_side", run_side)
            return verify(pipeline, source(kind), **options)

    return run


@pytest.mark.parametrize(("kind", "level"), [("sd3", "images"), ("sd35m", "modules"), ("sd35l", "images")])
def test_a_right_pipeline_passes(made: dict[str, Path], check: Check, kind: str, level: str) -> None:
    """Pictures with T5 need its tokenizer; see below."""
    result = check(made[kind], kind, level=level)
    assert result.passed, result.failures()
    assert result.request.reference == "keras-hub" and "keras-hub" in result.versions
    parts = {found.part: found for found in result.modules or []}
    assert parts.keys() == {
        *("mmdit", "clip_l", "clip_l_projection", "clip_g", "clip_g_projection"),
        *("vae16_decoder", "vae16_encoder", *(["t5"] if kind == "sd35m" else [])),
    }
    # All layers but the table of positions, and T5's embedding, which transformers calls by another name.
    layers = 4 if kind == "sd35m" else 3
    blocks = {
        "mmdit": layers + 6,
        "clip_l": 4,
        "clip_g": 5,
        "t5": 3,
        "vae16_encoder": 17,
        "vae16_decoder": 21,
    }
    assert {name: len(found.blocks) for name, found in parts.items()} == {
        name: blocks.get(name, 1) for name in parts
    }
    assert parts["clip_l"].attributed < 2e-6 and "with KerasHub's epsilon" in result.text()
    if kind == "sd35m":
        assert parts["t5"].attributed < 2e-6 < parts["t5"].stock
    if level == "images":
        assert result.images is not None and result.images.worst("attributed").attributed.psnr > 70


@pytest.fixture(scope="module")
def trained(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """The pipeline of the trained model, which has the structure of Stable Diffusion 3 medium."""
    out = tmp_path_factory.mktemp("trained") / "out"
    convert(source("trained"), out=out)
    return out


def test_pictures_of_a_trained_model(trained: Path, check: Check) -> None:
    """At its own size: 64 pixels, where its table of positions ends. 83 dB is four values off by one."""
    result = check(trained, "trained", steps=8, seeds=2, size=None)
    assert result.passed, result.failures()
    assert json.loads((trained / "transformer" / "config.json").read_text()).get("qk_norm") is None
    assert result.images is not None and len(result.images.runs) == 2
    for side, most in (("attributed", 1e-5), ("stock", 2e-5)):
        assert getattr(result.images.worst(side), side).psnr > 76
        assert max(error for drawn in result.images.runs for error in getattr(drawn, side).steps) < most
    with pytest.raises(Error, match=r"^--image-size 80: .* ends at 64 pixels.\nGive at most 64"):
        check(trained, "trained", level="modules", size=80)


def test_the_trained_model_draws_what_it_learned(trained: Path) -> None:
    """diffusers arrives where KerasHub does, at the latent of each prompt. The untrained model does not."""
    with np.load(keras_hub.trained() / "sample.npz") as held:
        targets, noise, learned, untrained = (
            held[name] for name in ("targets", "noise", "trained", "untrained")
        )
    steps: list[np.ndarray] = []
    images = stock_flow.draw(
        stock_flow.load(trained),
        [PROMPT, ""],
        np.repeat(noise, 2, axis=0),
        steps=4,
        guidance_scale=1.0,
        observe=steps.append,
    )
    assert np.abs(steps[-1] - learned).max() < 1e-4

    def distances(latents: np.ndarray) -> np.ndarray:
        """From the latent of each prompt (rows) to each target, over the size of the target."""
        return np.array([[np.linalg.norm(x - t) / np.linalg.norm(t) for t in targets] for x in latents])

    own = np.eye(2, dtype=bool)
    assert distances(steps[-1])[own].max() < 0.4 < 1 < distances(steps[-1])[~own].min()
    assert distances(untrained).min() > 1
    assert images.std() > 20 and np.abs(images[0].astype(int) - images[1]).mean() > 10


@pytest.fixture(scope="module")
def with_t5(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A task with T5 and, beside it, a tokenizer_3/ as diffusers has it, with words of its own."""
    from tokenizers import Tokenizer, models, pre_tokenizers, processors
    from transformers import PreTrainedTokenizerFast

    folder = Path(shutil.copytree(source("sd35m"), tmp_path_factory.mktemp("t5") / "task"))
    words = ["<pad>", "</s>", "<unk>", *(f"\u2581{word}" for word in PROMPT.split())]
    pieces = [(word, -float(n)) for n, word in enumerate([*words, *(f"<{n}>" for n in range(900))])]
    made = Tokenizer(models.Unigram(pieces, unk_id=2))
    made.pre_tokenizer = pre_tokenizers.Metaspace()
    made.post_processor = processors.TemplateProcessing(
        single="$A </s>", pair="$A </s> $B </s>", special_tokens=[("</s>", 1)]
    )
    words3 = PreTrainedTokenizerFast(
        tokenizer_object=made, pad_token="<pad>", eos_token="</s>", unk_token="<unk>", model_max_length=256
    )
    words3.save_pretrained(folder / "tokenizer_3")
    config = folder / "tokenizer_3" / "tokenizer_config.json"
    stated = json.loads(config.read_text()) | {"tokenizer_class": "T5TokenizerFast", "extra_ids": 0}
    config.write_text(json.dumps(stated))
    return folder


def test_pictures_with_t5(with_t5: Path, check: Check, tmp_path: Path) -> None:
    """T5 reads the prompt on both sides: other words give other pictures."""
    convert(with_t5, out=tmp_path / "out")
    result = check(tmp_path / "out", "sd35m", prompts=[PROMPT, "a a a"])
    assert result.passed, result.failures()
    assert result.images is not None and result.images.worst("attributed").attributed.psnr > 70
    assert "t5" in {found.part for found in result.modules or []}


def change(file: str, edit: Callable[[dict[str, np.ndarray]], None]) -> Plant:
    def plant(folder: Path) -> None:
        tensors = load_file(folder / file)
        edit(tensors)
        save_file({name: np.ascontiguousarray(t) for name, t in tensors.items()}, folder / file)

    return plant


def swap(file: str, one: str, other: str) -> Plant:
    def edit(tensors: dict[str, np.ndarray]) -> None:
        tensors[one], tensors[other] = tensors[other], tensors[one]

    return change(file, edit)


def halves(file: str, name: str) -> Plant:
    """[scale, shift] becomes [shift, scale], as in Keras."""
    return change(
        file, lambda tensors: tensors.update({name: np.roll(tensors[name], len(tensors[name]) // 2, 0)})
    )


def setting(file: str, **entries: Any) -> Plant:
    def plant(folder: Path) -> None:
        path = folder / file
        path.write_text(json.dumps(json.loads(path.read_text()) | entries))

    return plant


CLIP = "text_encoder_2/model.safetensors"
VAE = "vae/diffusion_pytorch_model.safetensors"
BLOCK = "transformer_blocks.1"


@pytest.mark.parametrize(
    ("plant", "part", "block"),
    [
        (swap(TRANSFORMER, f"{BLOCK}.attn.to_q.weight", f"{BLOCK}.attn.to_k.weight"), "MMDiT", BLOCK),
        (swap(TRANSFORMER, f"{BLOCK}.ff.net.2.bias", f"{BLOCK}.ff_context.net.2.bias"), "MMDiT", BLOCK),
        (halves(TRANSFORMER, "norm_out.linear.weight"), "MMDiT", "norm_out"),
        (
            halves(TRANSFORMER, "transformer_blocks.2.norm1_context.linear.weight"),
            "MMDiT",
            "transformer_blocks.2",
        ),
        (
            change(CLIP, lambda t: t.update({"text_projection.weight": t["text_projection.weight"].T})),
            "CLIP-G projection",
            "text_projection",
        ),
        (
            swap(VAE, "decoder.mid_block.resnets.0.conv1.bias", "decoder.mid_block.resnets.0.conv2.bias"),
            "16-channel VAE decoder",
            "decoder.mid_block.resnets.0",
        ),
    ],
)
def test_a_mistake_is_located(
    made: dict[str, Path], check: Check, tmp_path: Path, plant: Plant, part: str, block: str
) -> None:
    """By the weights, and without them by what the one block computes."""
    pipeline = Path(shutil.copytree(made["sd35l"], tmp_path / "copy"))
    plant(pipeline)
    result = check(pipeline, "sd35l", level="modules")
    assert not result.passed and result.failures()["weights"]
    (failure,) = result.failures()["modules"]
    assert failure.startswith(f"{part}: error") and f"departs: {block} (" in failure
    (wrong,) = [found for found in result.modules or [] if found.departing]
    assert [found.module.name for found in wrong.departing] == [block]


@pytest.mark.parametrize(
    ("plant", "named"),
    [
        (setting("scheduler/scheduler_config.json", shift=1.0), "shift is 1.0, not 3.0"),
        (setting("tokenizer_2/tokenizer_config.json", pad_token="<|endoftext|>"), 'not "!"'),
        (setting("transformer/config.json", qk_norm=None), "qk_norm is null"),
        (setting("model_index.json", text_encoder_2=["os", "path"]), 'text_encoder_2 is ["os", "path"]'),
    ],
)
def test_settings(made: dict[str, Path], check: Check, tmp_path: Path, plant: Plant, named: str) -> None:
    pipeline = Path(shutil.copytree(made["sd35l"], tmp_path / "copy"))
    plant(pipeline)
    (failure,) = check(pipeline, "sd35l", level="weights").failures()["weights"]
    assert named in failure


def test_what_is_not_installed_is_named(made: dict[str, Path], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(exchange, "find_spec", lambda name: None if name.startswith("keras_hub") else "found")
    with pytest.raises(
        Error, match=r"^KerasHub, .*is not installed.\npip install 'kcv2diffusers\[keras-hub\]'"
    ):
        verify(made["sd35l"], source("sd35l"), level="modules")
    assert verify(made["sd35l"], source("sd35l"), level="weights").passed


def test_other_references_are_refused(made: dict[str, Path], tmp_path: Path) -> None:
    with pytest.raises(
        Error, match=r"--reference keras-cv: not for Stable Diffusion 3.\nUse --reference keras-hub"
    ):
        verify(made["sd35l"], source("sd35l"), reference="keras-cv")
    pipeline = Path(shutil.copytree(made["sd3"], tmp_path / "copy", ignore=shutil.ignore_patterns("vae")))
    with pytest.raises(Error, match=r"has no 16-channel VAE decoder; .*whole pipeline.\nUse --level weights"):
        verify(pipeline, keras_hub.models() / "sd3" / "diffuser.weights.h5", level="modules")


def run(*arguments: str | Path) -> dict[str, Any]:
    """The JSON result of a command that a user runs."""
    command = [sys.executable, "-m", "kcv2diffusers", *arguments, "--json"]
    done = subprocess.run(command, capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    found: dict[str, Any] = json.loads(done.stdout)
    return found


def test_in_processes_of_their_own(made: dict[str, Path], tmp_path: Path) -> None:
    """As users run it, for a pipeline in fp16, with few steps."""
    out = tmp_path / "out"
    convert(source("sd35l"), out=out, dtype="fp16")
    few = ("--image-size", "64", "--steps", "2", "--images-per-prompt", "1")
    found = run("verify", out, source("sd35l"), *few)
    assert found["passed"] and len(found["images"]["runs"]) == 1 and "rounded" in " ".join(found["notes"])


@pytest.mark.parametrize(
    ("base", "levels"), [("pipeline", {"weights", "modules", "images"}), ("none", {"weights"})]
)
def test_convert_verifies_what_the_example_saves(
    made: dict[str, Path], tmp_path: Path, base: str, levels: set[str]
) -> None:
    """The MMDiT with the rest from a pipeline is drawn; alone, its weights are compared."""
    network = keras_hub.models() / "sd35l" / "diffuser.weights.h5"
    rest = made["sd35l"] if base == "pipeline" else "none"
    size = ("--image-size", "64")  # the table of positions of this small model ends at 192 pixels
    found = run("convert", network, "--base", rest, "--out", tmp_path / "out", *size, "--verify")
    verified = found["verified"]
    assert verified["passed"]
    assert {level for level in ("weights", "modules", "images") if verified[level]} == levels
