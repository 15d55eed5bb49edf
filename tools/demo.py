"""The tiny base in Keras, converted, and in diffusers: the same pictures.

    python tools/demo.py FOLDER

FOLDER/both.png shows what Keras made above what diffusers made of the same prompts and the same noise;
FOLDER/pipeline is the converted pipeline, FOLDER/report/report.html compares it with its checkpoints.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")  # diffusers needs it anyway
os.environ["HF_HUB_OFFLINE"] = "1"

PROMPTS = [
    "a red car on a white background",
    "a blue car in a meadow",
    "a yellow star at night",
    "a purple mushroom in a meadow",
    "a cat in a meadow",
    "a panda in the snow",
    "a fox in the snow",
    "a house at sunset",
]
STEPS, GUIDANCE_SCALE = 25, 5.0


@contextmanager
def timed(what: str) -> Iterator[None]:
    started = time.monotonic()
    print(f"{what} ... ", end="", flush=True)
    yield
    print(f"{time.monotonic() - started:.1f} s", flush=True)


def main(folder: Path) -> None:
    started = time.monotonic()
    with timed("Keras: loading the tiny base"):
        import numpy as np

        from kcv2diffusers import convert
        from kcv2diffusers.models.base import load_base
        from kcv2diffusers.pictures import grid, psnr
        from kcv2diffusers.replay import replay

        sampler = load_base("tiny").sampler()
    noise = np.random.default_rng(0).standard_normal((len(PROMPTS), 8, 8, 4)).astype("float32")
    with timed(f"Keras: {len(PROMPTS)} pictures, {STEPS} steps"):
        latents = sampler.sample(PROMPTS, noise, steps=STEPS, guidance_scale=GUIDANCE_SCALE)
        keras = sampler.decode(latents)
    with timed(f"kcv2diffusers convert tiny:// --out {folder / 'pipeline'}"):
        convert("tiny://", out=folder / "pipeline", overwrite=True)
    with timed("diffusers: the same pictures"):
        stock = replay(folder / "pipeline", PROMPTS, noise, steps=STEPS, guidance_scale=GUIDANCE_SCALE)
    captions = [f"Keras: {prompt}" for prompt in PROMPTS] + [f"diffusers: {prompt}" for prompt in PROMPTS]
    grid(np.concatenate([keras, stock]), len(PROMPTS), captions, scale=2).save(folder / "both.png")
    print(
        f"least PSNR of a pair {psnr(keras, stock).min():.1f} dB; {time.monotonic() - started:.0f} s in all"
    )
    print(f"Look at {folder / 'both.png'}: Keras above, diffusers below.")
    verified(folder)


def verified(folder: Path) -> None:
    """Verify FOLDER/pipeline on every level, with a report; exit code 1 if it is outside the bars."""
    from kcv2diffusers import verify

    options = {"prompts": PROMPTS, "steps": STEPS, "guidance": GUIDANCE_SCALE, "seeds": 1}
    with timed(f"kcv2diffusers verify {folder / 'pipeline'} tiny:// --report {folder / 'report'}"):
        result = verify(folder / "pipeline", "tiny://", report=folder / "report", **options)
    print(result.text())
    if not result.passed:
        sys.exit(result.reason)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
