"""The tiny base learns a subject by DreamBooth in Keras; its pipeline draws the same in diffusers.

    python tools/demo.py FOLDER

FOLDER/demo.png shows one prompt a column and three rows: the base before training, after it in Keras, and
after it in diffusers from the same noise. FOLDER/run is the training run, FOLDER/pipeline its export, and
FOLDER/report/report.html compares that with the run's checkpoint.
"""

from __future__ import annotations

import os
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")  # diffusers needs it anyway
os.environ["HF_HUB_OFFLINE"] = "1"

PROMPTS = [
    "a sks cat in the snow",
    "a sks cat on a pink background",
    "a sks cat in a meadow",
    "a sks cat at night",
    "a cat in the snow",
    "a cat at night",
    "a panda in the snow",
    "a red car in a meadow",
]
STEPS, GUIDANCE_SCALE, TRAINING_STEPS = 25, 5.0, 250


@contextmanager
def timed(what: str) -> Iterator[None]:
    started = time.monotonic()
    print(f"{what} ... ", end="", flush=True)
    yield
    print(f"{time.monotonic() - started:.1f} s", flush=True)


def main(folder: Path) -> None:
    started = time.monotonic()
    with timed("loading"):
        import numpy as np

        from kcv2diffusers import fine_tune, load_base, locate, replay, verify
        from kcv2diffusers.pictures import grid, psnr

    run, pipeline = folder / "run", folder / "pipeline"
    for old in (run, pipeline):
        shutil.rmtree(old, ignore_errors=True)
    noise = np.random.default_rng(0).standard_normal((len(PROMPTS), 8, 8, 4)).astype("float32")

    def draw(base: str | Path) -> np.ndarray:
        sampler = load_base(base).sampler()
        return sampler.decode(sampler.sample(PROMPTS, noise, steps=STEPS, guidance_scale=GUIDANCE_SCALE))

    with timed(f"Keras: {len(PROMPTS)} pictures of the tiny base"):
        before = draw("tiny")
    with timed(f"Keras: DreamBooth, {TRAINING_STEPS} steps, and export"):
        trained = fine_tune(
            base="tiny",
            instance_images=locate("tiny") / "subject",
            instance_prompt="a sks cat",
            class_prompt="a cat",
            num_class_images=16,
            batch_size=4,
            steps=TRAINING_STEPS,
            learning_rate=2e-4,
            train_text_encoder=True,
            guidance_scale=GUIDANCE_SCALE,
            out=run,
            export=pipeline,
        )
    with timed("Keras: the same pictures after it"):
        after = draw(pipeline)
    with timed("diffusers: the same pictures after it"):
        stock = replay(pipeline, PROMPTS, noise, steps=STEPS, guidance_scale=GUIDANCE_SCALE)
    captions = [f"{row}: {p}" for row in ("before", "after, Keras", "after, diffusers") for p in PROMPTS]
    grid(np.concatenate([before, after, stock]), len(PROMPTS), captions, scale=2).save(folder / "demo.png")
    print(f"Keras and diffusers: least PSNR of a pair {psnr(after, stock).min():.1f} dB")
    with timed("verifying the pipeline"):
        result = verify(
            pipeline,
            trained.checkpoint,
            base=["tiny"],
            unet_gelu="exact",
            prompts=PROMPTS[:2],
            steps=STEPS,
            guidance=GUIDANCE_SCALE,
            seeds=1,
            report=folder / "report",
        )
    print(result.text())
    print(f"{time.monotonic() - started:.0f} s in all. Look at {folder / 'demo.png'}.")
    if not result.passed:
        sys.exit(result.reason)


if __name__ == "__main__":
    main(Path(sys.argv[1]))
