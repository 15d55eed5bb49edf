"""Pictures drawn with LoRAs extracted from a fine-tune, beside those of the fine-tune.

    python tools/extracted_lora.py [FOLDER]

Fine-tunes all weights of the tiny base on the tiger that ships beside it, and extracts LoRAs of several ranks
from the result. Leaves the table of docs/guides/lora.md in .cache/extracted-lora.md and its pictures in
docs/images/extracted-lora.png. A training run that is in FOLDER already is not repeated.
"""

from __future__ import annotations

import os
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import numpy as np
from demo import GUIDANCE_SCALE, PROMPTS, STEPS

from kcv2diffusers import extract_lora, fine_tune, load_base, locate
from kcv2diffusers.pictures import grid, psnr

ROOT = Path(__file__).parent.parent
TRAINING = {"steps": 60, "batch_size": 2, "learning_rate": 5e-4, "train_text_encoder": True}
SETTINGS = {
    "`--rank 1`": {"rank": 1},
    "`--rank 8`": {"rank": 8},
    "`--rank auto --keep 0.95`": {"rank": "auto", "keep": 0.95},
    "`--rank auto --keep 0.999`": {"rank": "auto", "keep": 0.999},
}


def draw(base: str | Path, lora: Path | None = None) -> np.ndarray:
    """A picture of every prompt, from the same noise each time: uint8."""
    sampler = load_base(base, lora=[lora] if lora else ()).sampler()
    noise = np.random.default_rng(0).standard_normal((len(PROMPTS), 8, 8, 4), dtype="float32")
    return sampler.decode(sampler.sample(PROMPTS, noise, steps=STEPS, guidance_scale=GUIDANCE_SCALE))


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    pipeline = folder / "pipeline"
    if not pipeline.exists():
        subject = {"instance_images": locate("tiny") / "subject", "instance_prompt": "a sks cat"}
        fine_tune(base="tiny", out=folder / "run", export=pipeline, **subject, **TRAINING)
    wanted, before = draw(pipeline), draw("tiny")
    lines = [
        f"The tiny base, fine-tuned in all weights for {TRAINING['steps']} steps; PSNR of "
        f"{len(PROMPTS)} pictures beside those of the fine-tune from the same noise:",
        "",
        "| | kept | ranks | MB | median PSNR | least |",
        "|---|--:|--:|--:|--:|--:|",
    ]

    def row(name: str, cells: str, images: np.ndarray) -> None:
        found = psnr(images, wanted)
        lines.append(f"| {name} | {cells} | {np.median(found):.1f} dB | {found.min():.1f} dB |")
        print(lines[-1], flush=True)

    row("the base, without a LoRA", "0% | | ", before)
    rows, captions = [before], [f"base: {prompt}" for prompt in PROMPTS]
    for name, options in SETTINGS.items():
        lora = extract_lora(pipeline, base="tiny", out=folder / "lora.safetensors", overwrite=True, **options)
        images, ranks = draw("tiny", lora.out), lora.ranks.values()
        spread = f"{min(ranks)} to {max(ranks)}" if min(ranks) < max(ranks) else f"{max(ranks)}"
        row(name, f"{lora.kept:.1%} | {spread} | {lora.bytes_written / 1e6:.2f}", images)
        rows.append(images)
        captions += [f"{name.strip('`')}: {prompt}" for prompt in PROMPTS]
    rows.append(wanted)
    captions += [f"fine-tune: {prompt}" for prompt in PROMPTS]
    (ROOT / ".cache").mkdir(exist_ok=True)
    (ROOT / ".cache" / "extracted-lora.md").write_text("\n".join(lines) + "\n")
    grid(np.concatenate(rows), len(PROMPTS), captions).save(ROOT / "docs" / "images" / "extracted-lora.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / ".cache" / "extracted-lora")
