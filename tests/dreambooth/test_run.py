"""Whole runs of the command on a small base, on PyTorch: one in a process of its own, as are those that are
stopped, the others in forks of one process. Other backends: test_training_backends.
"""

from __future__ import annotations

import csv
import json
import shutil
import signal
import struct
import subprocess
import sys
from pathlib import Path

import h5py
import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.numpy import load_file
from support.checkpoints import small_base
from support.dreambooth.run import PROMPTS, command, environment, run
from support.waiting import LONG, until

from kcv2diffusers import Error, convert, inspect
from kcv2diffusers.sources.lora import read_lora

pytestmark = pytest.mark.slow


@pytest.fixture(scope="module")
def base() -> Path:
    return small_base()


@pytest.fixture(scope="module")
def photos(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Three photos of two proportions, one of them with odd EXIF data in a folder of kohya's, and a file that
    is none.
    """
    folder = tmp_path_factory.mktemp("photos")
    rng = np.random.default_rng(0)
    for number, size in enumerate([(64, 64), (70, 66)]):
        Image.fromarray(rng.integers(0, 255, (*size, 3), "uint8")).save(folder / f"{number}.png")
    odd = b"Exif\0\0II*\0\x08\0\0\0\2\0" + struct.pack("<HHLHH", 274, 3, 1, 6, 0)  # turned
    odd += struct.pack("<HHL4sL", 296, 2, 3, b"in\0\0", 0)  # a text where a unit's number belongs
    (folder / "3_sks car").mkdir()
    image = Image.fromarray(rng.integers(0, 255, (64, 64, 3), "uint8"))
    image.save(folder / "3_sks car" / "2.jpg", exif=odd)
    (folder / "notes.txt").write_text("no picture")
    (folder / "0.txt").write_text("a red sks car")
    Image.fromarray(rng.integers(0, 255, (64, 64), "uint8")).save(folder / "0-mask.png")
    return folder


def weights(folder: Path) -> dict[str, np.ndarray]:
    """Every dataset of the weight files of a checkpoint."""
    found: dict[str, np.ndarray] = {}
    for path in sorted(folder.glob("*.h5")):

        def add(name: str, item: h5py.Group | h5py.Dataset, file: str = path.name) -> None:
            if isinstance(item, h5py.Dataset):
                found[f"{file}/{name}"] = item[()]

        with h5py.File(path) as opened:
            opened.visititems(add)
    assert found
    return found


def different(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> list[str]:
    assert one.keys() == other.keys()
    return [name for name in one if not np.array_equal(one[name], other[name])]


COMMON = [*PROMPTS, "--num-class-images", "2", "--sample-steps", "2", "--learning-rate", "1e-3"]


@pytest.fixture(scope="module")
def whole(base: Path, photos: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A run of six steps with all that it leaves, in a process of its own."""
    out = tmp_path_factory.mktemp("run") / "out"
    asked = command(
        base, photos, out, *COMMON, "--steps", "6", "--checkpoint-every", "2", "--keep-checkpoints", "2",
        "--sample-prompt", "a car", "--sample-prompt", "a tree", "--export", out.parent / "pipeline",
    )  # fmt: skip
    done = subprocess.run(asked, env=environment(), capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    assert "Skipped" in done.stdout and "notes.txt (not a picture)" in done.stdout
    assert "3_sks car: 1 photo, 3 times an epoch." in done.stdout and "2.jpg" not in done.stdout
    assert f"Pipeline: {out.parent / 'pipeline'}" in done.stdout
    assert "Training 6/6 loss" in done.stderr
    return out


def test_what_a_run_leaves(whole: Path) -> None:
    assert [path.name for path in sorted((whole / "checkpoints").iterdir())] == ["step-000004", "step-000006"]
    assert [path.name for path in sorted((whole / "resume").iterdir())] == [
        "step-000004.h5",
        "step-000006.h5",
    ]
    with (whole / "log.csv").open() as file:
        rows = list(csv.DictReader(file))
    assert [row["step"] for row in rows] == ["1", "2", "3", "4", "5", "6"]
    assert all(np.isfinite(float(row["loss"])) for row in rows)
    assert Image.open(whole / "loss.png").size == (640, 320)
    assert Image.open(whole / "samples" / "step-000006.png").size[0] > 512
    assert len(list((whole / "class").glob("*.png"))) == 2
    assert not [path for path in whole.rglob(".*")]


def test_a_checkpoint_and_the_export_are_the_trained_model(whole: Path, base: Path, tmp_path: Path) -> None:
    last = whole / "checkpoints" / "step-000006"
    assert [part.part for part in inspect(last)] == ["unet"]
    changed = different(weights(last), {k: v for k, v in weights(base).items() if k.startswith("unet")})
    assert len(changed) > 600
    assert len(different(weights(last), weights(whole / "checkpoints" / "step-000004"))) > 600
    convert(last, out=tmp_path / "pipeline", base=base)
    exported = whole.parent / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    again = tmp_path / "pipeline" / "unet" / "diffusion_pytorch_model.safetensors"
    assert exported.read_bytes() == again.read_bytes()
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(whole.parent / "pipeline")
    pipe.set_progress_bar_config(disable=True)
    assert pipe("a sks car", num_inference_steps=1).images[0].size == (64, 64)


def test_its_record_repeats_it(whole: Path, base: Path, photos: Path, tmp_path: Path) -> None:
    done = run(
        base, photos, tmp_path / "out", "--config", whole / "config.toml", "--export", tmp_path / "pipeline"
    )
    assert done.returncode == 0, done.stderr
    last = "checkpoints/step-000006"
    assert different(weights(whole / last), weights(tmp_path / "out" / last)) == []


EVERYTHING = [
    "--train-text-encoder", "--text-encoder-learning-rate", "1e-4", "--text-encoder-steps", "4",
    "--ema", "0.9", "--accumulate", "2", "--lr-schedule", "cosine_with_restarts", "--lr-cycles", "2",
    "--warmup-steps", "2", "--snr-gamma", "5", "--offset-noise", "0.1", "--flip", "--no-cache", "--masks",
    "--caption-dropout", "0.3", "--validation-every", "2", "--zero-terminal-snr", "--prediction-type",
    "v_prediction",
]  # fmt: skip


@pytest.mark.parametrize(
    "options",
    [
        [],
        EVERYTHING,
        [*EVERYTHING, "--lora-rank", "2", "--optimizer", "lion"],
        ["--optimizer", "adafactor"],
        ["--optimizer", "adam_mini", "--precision", "mixed_float16"],
        ["--optimizer", "prodigy", "--learning-rate", "1", "--accumulate", "2", "--train-text-encoder"],
        ["--optimizer", "adamw8bit", "--accumulate", "2", "--ema", "0.9"],
        ["--train-token", "sks", "--train-token", "<car>", "--ema", "0.9"],
    ],
    ids=["plain", "everything", "lora", "adafactor", "mini", "prodigy", "8bit", "tokens"],
)
def test_resuming_reaches_the_same_weights(
    base: Path, photos: Path, whole: Path, tmp_path: Path, options: list[str]
) -> None:
    """A run of four steps, and one that goes on where a run was killed after the third: with `--accumulate 2`
    between two updates.
    """
    if "adamw8bit" in options:
        pytest.importorskip("bitsandbytes")
    common = [*COMMON, "--class-images", whole / "class", *options, "--checkpoint-every", "3", "--steps", "4"]
    if "--train-token" in options:
        common += ["--instance-prompt", "a sks <car>", "--no-captions"]
    if options == EVERYTHING:
        common += ["--validation-images", photos]
    done = run(base, photos, tmp_path / "whole", *common)
    assert done.returncode == 0, done.stderr
    shutil.copytree(tmp_path / "whole", tmp_path / "parts")
    shutil.rmtree(tmp_path / "parts" / "checkpoints" / "step-000004")
    (tmp_path / "parts" / "resume" / "step-000004.h5").unlink()
    done = run(base, photos, tmp_path / "parts", *common, "--resume")
    assert done.returncode == 0, done.stderr
    one, other = (weights(tmp_path / out / "checkpoints" / "step-000004") for out in ("whole", "parts"))
    assert different(one, other) == []
    records = [(tmp_path / out / "config.toml").read_text() for out in ("whole", "parts")]
    assert records[0] == records[1] and 'backend = "torch"' in records[0] and "precision" in records[0]
    assert [leg["start"] for leg in json.loads((tmp_path / "parts" / "legs.json").read_text())] == [0, 3]
    if "prodigy" in options:
        assert "Prodigy's learning rate after step 4: 1" in done.stdout
    if options == EVERYTHING:
        losses = [(tmp_path / out / "validation.csv").read_text() for out in ("whole", "parts")]
        assert losses[0] == losses[1] and losses[0].split()[1:] != [] and "nan" not in losses[0]
        stated = json.loads(
            (tmp_path / "whole" / "checkpoints" / "step-000004" / "kcv2diffusers.json").read_text()
        )
        assert stated["scheduler"]["rescale_betas_zero_snr"] is True
        assert "1 of 3 photos have captions" in done.stdout and "1 of 3 photos have masks." in done.stdout
    early = weights(tmp_path / "whole" / "checkpoints" / "step-000003")
    assert different(one, early)
    if "--train-text-encoder" in options:
        assert any(name.startswith("text_encoder") for name in different(one, early))


@pytest.mark.parametrize("text", [False, True])
def test_the_lora_file_is_the_merged_weights(
    base: Path, photos: Path, whole: Path, tmp_path: Path, text: bool
) -> None:
    """As diffusers loads it onto the base: the same picture. A run that goes on with it starts there."""
    from diffusers import StableDiffusionPipeline

    options = ["--class-images", whole / "class", "--lora-rank", "2", "--lora-alpha", "6", "--steps", "4"]
    options += ["--learning-rate", "1e-1", "--export", tmp_path / "pipeline"]
    if text:
        options += ["--lora-conv-rank", "3", "--lora-conv-alpha", "1.5"]
    done = run(base, photos, tmp_path / "out", *COMMON, *options, *(["--train-text-encoder"] if text else []))
    assert done.returncode == 0, done.stderr
    convert(base, out=tmp_path / "base")
    pictures = []
    for folder, lora in (("pipeline", False), ("base", True), ("base", False)):
        pipe = StableDiffusionPipeline.from_pretrained(tmp_path / folder)
        pipe.set_progress_bar_config(disable=True)
        if lora:
            pipe.load_lora_weights(tmp_path / "pipeline")
        latents = torch.randn((1, 4, 8, 8), generator=torch.Generator().manual_seed(0))
        pictures.append(pipe("a sks car", latents=latents, num_inference_steps=2, output_type="np").images[0])
    merged, loaded, untrained = pictures
    names = load_file(tmp_path / "pipeline" / "pytorch_lora_weights.safetensors")
    assert sum(".conv1." in name for name in names) == (44 if text else 0)
    assert np.abs(merged - loaded).max() < 2e-3
    assert np.abs(merged - untrained).max() > 2e-2
    files = [tmp_path / "pipeline" / f"{name}_lora_weights.safetensors" for name in ("pytorch", "kohya")]
    one, other = (read_lora(file) for file in files)
    assert (one.spelling, other.spelling) == ("diffusers", "kohya")
    assert {component for component, _ in one.updates} == {"unet", *(["text_encoder"] if text else [])}
    assert one.updates.keys() == other.updates.keys()
    for place, update in one.updates.items():
        for first, second in zip(update.values(), other.updates[place].values(), strict=True):
            np.testing.assert_array_equal(first, second)
    if text:  # goes on from kohya's file, with a learning rate of 0: what is exported is what was read
        options = ["--class-images", whole / "class", "--lora", files[1], "--train-text-encoder"]
        options += [
            "--learning-rate",
            "0",
            "--weight-decay",
            "0",
            "--steps",
            "1",
            "--export",
            tmp_path / "on",
        ]
        done = run(base, photos, tmp_path / "next", *COMMON, *options)
        assert done.returncode == 0, done.stderr
        again = read_lora(tmp_path / "on" / files[0].name).updates
        for place, update in one.updates.items():
            for first, second in zip(update.values(), again[place].values(), strict=True):
                np.testing.assert_array_equal(first, second)
        last = [
            tmp_path / out / "checkpoints" / step
            for out, step in (("out", "step-000004"), ("next", "step-000001"))
        ]
        assert different(*map(weights, last)) == []


def test_what_a_lora_run_leaves_alone_is_the_base(
    base: Path, photos: Path, whole: Path, tmp_path: Path
) -> None:
    """Bit for bit, though frozen weights are held in 16 bits; merged kernels are the sum in float32."""
    options = ["--class-images", whole / "class", "--lora-rank", "2", "--precision", "bf16", "--steps", "2"]
    options += ["--learning-rate", "1e-1", "--sample-prompt", "a car"]
    done = run(base, photos, tmp_path, *COMMON, *options)
    assert done.returncode == 0, done.stderr
    checkpoint = tmp_path / "checkpoints" / "step-000002"
    trained, before = weights(checkpoint), weights(base)
    changed = different(trained, {name: before[name] for name in trained})
    updates = load_file(checkpoint / "pytorch_lora_weights.safetensors")
    products = [
        (updates[name.replace("lora_A", "lora_B")] @ first).T
        for name, first in updates.items()
        if "lora_A" in name
    ]
    # Attention to one place alone has no gradient for its queries and keys.
    assert 100 < len(changed) == sum(product.any() for product in products) <= len(updates) // 2
    for name in changed:
        update = trained[name] - before[name]
        nearest = min(np.abs(update - one).max() for one in products if one.shape == update.shape)
        assert nearest < 1e-6 < np.abs(update).max()


def test_a_token_that_was_trained(base: Path, photos: Path, tmp_path: Path) -> None:
    """Nothing else has changed, and the export has the embedding in a file of its own."""
    from diffusers import StableDiffusionPipeline

    options = ["--instance-prompt", "a <car>", "--no-captions", "--train-token", "<car>", "--steps", "2"]
    options += ["--train-token-from", "red", "--export", tmp_path / "pipeline", "--checkpoint-format", "h5"]
    done = run(base, photos, tmp_path / "out", *options, "--learning-rate", "0.1", "--weight-decay", "0")
    assert done.returncode == 0, done.stderr
    convert(base, out=tmp_path / "base")
    found, before = (
        load_file(tmp_path / name / "text_encoder" / "model.safetensors") for name in ("pipeline", "base")
    )
    table = "text_model.embeddings.token_embedding.weight"
    assert found.keys() == before.keys() and len(found[table]) == len(before[table]) + 1
    for name, value in before.items():
        np.testing.assert_array_equal(found[name][: len(value)], value)
    pipe = StableDiffusionPipeline.from_pretrained(tmp_path / "base")
    (red,) = pipe.tokenizer("red").input_ids[1:-1]
    # AdamW moves a weight by the learning rate in its first steps.
    assert np.abs(found[table][-1] - before[table][red]).max() == pytest.approx(0.2, rel=0.3)
    pipe.load_textual_inversion(tmp_path / "pipeline" / "learned_embeds.safetensors")
    (own,) = pipe.tokenizer("<car>").input_ids[1:-1]
    learnt = pipe.text_encoder.get_input_embeddings().weight[own].detach().numpy()
    np.testing.assert_array_equal(learnt, found[table][-1])
    exported = StableDiffusionPipeline.from_pretrained(tmp_path / "pipeline")
    assert exported.tokenizer("a red <car>").input_ids[-2] == len(before[table])
    with pytest.raises(Error, match="beyond the vocabulary's"):
        shutil.rmtree(tmp_path / "out" / "checkpoints" / "step-000002" / "tokenizer")
        convert(tmp_path / "out" / "checkpoints" / "step-000002", out=tmp_path / "unnamed", base=base)
    again = convert(
        tmp_path / "out" / "checkpoints" / "step-000002", out=tmp_path / "named", base=base,
        placeholder_tokens=["<car>"],
    )  # fmt: skip
    assert (again.out / "learned_embeds.safetensors").read_bytes() == (
        tmp_path / "pipeline" / "learned_embeds.safetensors"
    ).read_bytes()


def test_legacy_checkpoints(base: Path, photos: Path, whole: Path, tmp_path: Path) -> None:
    out = tmp_path / "dog"
    options = ["--class-images", whole / "class", "--checkpoint-format", "h5", "--train-text-encoder"]
    done = run(base, photos, out, *COMMON, *options, "--steps", "2")
    assert done.returncode == 0, done.stderr
    last = out / "checkpoints" / "step-000002"
    names = sorted(path.name for path in last.iterdir())
    assert names == ["dog-text_encoder.h5", "dog-unet.h5", "kcv2diffusers.json"]
    assert {part.container for part in inspect(last)} == {"legacy .h5 weights"}
    convert(last, out=tmp_path / "pipeline", base=base)


@pytest.mark.parametrize("number", [signal.SIGINT, signal.SIGTERM])
def test_a_run_that_is_stopped(
    base: Path, photos: Path, whole: Path, tmp_path: Path, number: signal.Signals
) -> None:
    """One that is killed: test_checkpoints."""
    out = tmp_path / "out"
    options = [
        *COMMON,
        "--class-images",
        str(whole / "class"),
        "--steps",
        "100000",
        "--checkpoint-every",
        "5",
    ]
    process = subprocess.Popen(
        command(base, photos, out, *options),
        env=environment(),
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
    )
    until(lambda: list((out / "checkpoints").glob("step-*")), process)
    if sys.platform == "linux":  # it started itself again with this, under the same process id
        assert b"glibc.malloc.hugetlb=1" in Path(f"/proc/{process.pid}/environ").read_bytes()
    process.send_signal(number)
    stdout, stderr = process.communicate(timeout=LONG)
    kept = sorted(int(path.name[5:]) for path in (out / "checkpoints").glob("step-*"))
    assert kept
    assert process.returncode == 128 + number, stderr
    assert b"Stopping after this step. Once more ends at once." in stderr
    assert b"--resume goes on" in stdout
    assert f"Step {kept[-1]}" in stdout.decode()
    more = ["--steps", str(kept[-1] + 2), "--resume"]
    done = run(base, photos, out, *options, *more)
    assert done.returncode == 0, done.stderr
    with (out / "log.csv").open() as file:
        steps = [int(row["step"]) for row in csv.DictReader(file)]
    assert steps == list(range(1, kept[-1] + 3))


def test_the_log_is_there_before_the_checkpoint(
    base: Path, photos: Path, whole: Path, tmp_path: Path
) -> None:
    """A run may be killed between the two; here the checkpoint fails."""
    (tmp_path / "resume").write_text("in the place of the folder")
    done = run(base, photos, tmp_path, *COMMON, "--class-images", whole / "class", "--steps", "2")
    assert done.returncode == 1 and "resume" in done.stderr and "Traceback" not in done.stderr
    assert len((tmp_path / "log.csv").read_text().splitlines()) == 3


def test_a_run_that_diverges_keeps_the_last_good_checkpoint(
    base: Path, photos: Path, whole: Path, tmp_path: Path
) -> None:
    options = [*COMMON, "--class-images", whole / "class", "--steps", "30", "--checkpoint-every", "1"]
    done = run(base, photos, tmp_path / "out", *options, "--learning-rate", "1e20", "--clip-norm", "0")
    assert done.returncode == 1
    assert "training has diverged" in done.stderr and "checkpoint of step" in done.stderr
    assert "Traceback" not in done.stderr
    assert list((tmp_path / "out" / "checkpoints").iterdir())
