"""The README's picture: one row drawn by Keras from KerasCV checkpoints, one by diffusers after conversion.

    python tools/readme_picture.py

Both rows start from the same noise, on the tiny base. The result is docs/images/same-pictures.png, and the
least PSNR of a pair is printed.
"""

from __future__ import annotations

import os
from pathlib import Path
from tempfile import TemporaryDirectory

os.environ.setdefault("KERAS_BACKEND", "torch")  # diffusers needs it anyway
os.environ["HF_HUB_OFFLINE"] = "1"

ROOT = Path(__file__).parent.parent
TARGET = ROOT / "docs" / "images" / "same-pictures.png"
PROMPTS = [
    "a fox in the snow",
    "a red car in a meadow",
    "a panda on a pink background",
    "a boat on the beach",
    "a house at sunset",
    "a rocket at night",
]
STEPS, GUIDANCE_SCALE = 25, 5.0


def main() -> None:
    import numpy as np
    from PIL import Image

    from kcv2diffusers import convert, load_base, replay
    from kcv2diffusers.pictures import grid, psnr

    noise = np.random.default_rng(0).standard_normal((len(PROMPTS), 8, 8, 4)).astype("float32")
    options = {"steps": STEPS, "guidance_scale": GUIDANCE_SCALE}
    sampler = load_base("tiny").sampler()
    keras = sampler.decode(sampler.sample(PROMPTS, noise, **options))
    with TemporaryDirectory() as folder:
        pipeline = convert("tiny", out=Path(folder) / "pipeline").out
        diffusers = replay(pipeline, PROMPTS, noise, **options)
    captions = [f"{row}: {prompt}" for row in ("KerasCV", "diffusers") for prompt in PROMPTS]
    sheet = grid(np.concatenate([keras, diffusers]), len(PROMPTS), captions, scale=2)
    TARGET.parent.mkdir(parents=True, exist_ok=True)
    palette = sheet.quantize(256, kmeans=3)
    sheet.quantize(palette=palette, dither=Image.Dither.FLOYDSTEINBERG).save(TARGET, optimize=True)
    print(f"{TARGET.relative_to(ROOT)}: {TARGET.stat().st_size / 1e3:.0f} kB")
    print(f"least PSNR of a pair: {psnr(diffusers, keras).min():.1f} dB")


if __name__ == "__main__":
    main()
