"""Pictures with a LoRA: loaded by diffusers from both spellings, and merged into the weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from support.loras import kernels, kohya, save

from kcv2diffusers import convert, convert_lora, extract_lora

PROMPTS = ["a red car in a meadow", "a panda in the snow"]
LEAST = 60  # decibels


def draw(pipeline: Path, lora: Path | None = None) -> np.ndarray:
    """Pictures (n, height, width, 3) from 0 to 1 of the stock pipeline, each time from the same noise."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    pipe.set_progress_bar_config(disable=True)
    if lora:
        pipe.load_lora_weights(lora.parent, weight_name=lora.name)
    noise = torch.from_numpy(np.random.default_rng(3).standard_normal((2, 4, 8, 8)).astype("float32"))
    drawn = pipe(PROMPTS, latents=noise, num_inference_steps=5, guidance_scale=5.0, output_type="np")
    return np.asarray(drawn.images)


def psnr(one: np.ndarray, other: np.ndarray) -> float:
    """Of the pictures that differ most, in decibels."""
    error = ((one.astype("float64") - other) ** 2).mean((1, 2, 3)).max()
    return float(-10 * np.log10(max(error, 1e-20)))


@pytest.fixture(scope="module")
def base(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return Path(convert("tiny", out=tmp_path_factory.mktemp("tiny") / "pipeline").out)


@pytest.fixture(scope="module")
def plain(base: Path) -> np.ndarray:
    """Pictures without a LoRA."""
    return draw(base)


@pytest.mark.slow
@pytest.mark.parametrize("alpha", [4, 3])
def test_both_spellings_and_merged_weights_draw_the_same(
    alpha: float, base: Path, plain: np.ndarray, tmp_path: Path
) -> None:
    """A LoRA of all linear layers and convolutions of the tiny base, alpha equal to the rank and not."""
    file = save(kohya(base, alpha=alpha, scale=0.05), tmp_path / "kohya.safetensors")
    assert len(kernels(base)) > 200
    converted = convert_lora(file, out=tmp_path / "pytorch_lora_weights.safetensors").out
    merged = convert("tiny", out=tmp_path / "merged", lora=file).out
    single = convert("tiny", out=tmp_path / "merged.safetensors", lora=converted).out
    of_single = convert(single, base=base, out=tmp_path / "of-single").out
    wanted = draw(merged)
    found = {
        "kohya": psnr(draw(base, file), wanted),
        "diffusers": psnr(draw(base, converted), wanted),
        "single file": psnr(draw(of_single), wanted),
    }
    print(f"\nalpha {alpha}: PSNR {found}, without the LoRA {psnr(plain, wanted):.1f} dB")
    assert psnr(plain, wanted) < 30  # the LoRA is seen
    assert min(found.values()) >= LEAST


@pytest.mark.slow
def test_the_more_is_kept_the_nearer_are_the_pictures(base: Path, plain: np.ndarray, tmp_path: Path) -> None:
    """A LoRA extracted from a fine-tune of all weights, beside the fine-tune. Its pictures are those of the
    fine-tune where the rank is that of the difference.
    """
    wide = save(kohya(base, rank=16, alpha=16, scale=0.02), tmp_path / "wide.safetensors")
    tuned = convert("tiny", out=tmp_path / "tuned", lora=wide).out
    wanted = draw(tuned)
    kept, near = [], []
    for rank in (1, 8, 16):
        lora = extract_lora(tuned, base=base, out=tmp_path / f"{rank}.safetensors", rank=rank)
        kept.append(lora.kept)
        near.append(psnr(draw(base, lora.out), wanted))
        print(f"\nrank {rank}: {lora.kept:.1%} kept, PSNR {near[-1]:.1f} dB")
    print(f"without the LoRA {psnr(plain, wanted):.1f} dB")
    assert kept == sorted(kept) and kept[-1] > 0.999
    assert near == sorted(near) and near[-1] >= LEAST
    assert near[0] > psnr(plain, wanted)


@pytest.mark.slow
def test_ranks_and_alphas_of_each_layer(base: Path, tmp_path: Path) -> None:
    """diffusers reads those that differ from layer to layer from the metadata of a file in its format."""
    ranks = [kohya(base, rank=rank, alpha=alpha, scale=0.05) for rank, alpha in ((4, 4), (2, 1), (6, 12))]
    modules = sorted({name.partition(".")[0] for name in ranks[0]})
    mixed = {
        name: tensor
        for number, module in enumerate(modules)
        for name, tensor in ranks[number % 3].items()
        if name.startswith(f"{module}.")
    }
    file = save(mixed, tmp_path / "kohya.safetensors")
    converted = convert_lora(file, out=tmp_path / "diffusers.safetensors").out
    merged = convert("tiny", out=tmp_path / "merged", lora=file).out
    found = psnr(draw(base, converted), draw(merged))
    print(f"\nPSNR {found:.1f} dB")
    assert found >= LEAST
