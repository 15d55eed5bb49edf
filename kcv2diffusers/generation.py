"""Image generation from prompts, written as PNG files: `kcv2diffusers generate`."""

from __future__ import annotations

from collections.abc import Sequence
from os import PathLike
from pathlib import Path

from kcv2diffusers.errors import Error, MissingExtra
from kcv2diffusers.progress import Progress
from kcv2diffusers.system.interruption import keeps
from kcv2diffusers.system.output import check_folder


def generate(
    *base: str | PathLike[str],
    prompts: Sequence[str],
    out: str | PathLike[str],
    negative_prompt: str = "",
    steps: int = 50,
    guidance_scale: float = 7.5,
    images_per_prompt: int = 1,
    seed: int | None = None,
    height: int | None = None,
    width: int | None = None,
    tokenizer: str | PathLike[str] | None = None,
    lora: str | PathLike[str] | Sequence[str | PathLike[str]] = (),
    progress: Progress | None = None,
) -> list[Path]:
    """Generate images for each of `prompts`, write them into folder `out` and return their paths.

    The paths are in the order of the prompts. File numbers continue after the highest number already in
    `out`. `base` is "tiny", a diffusers pipeline folder, or KerasCV checkpoints. `height` and `width` are in
    pixels, multiples of 64 (default: the size of the base). `lora` are LoRA files to draw with, each a path,
    an hf:// address, or either with ":STRENGTH" (default: 1). Raises Error with a message for the user.
    """
    if not prompts or images_per_prompt < 1:
        raise Error("Nothing to generate: give a prompt, and at least one image per prompt.")
    try:
        from PIL import Image

        from kcv2diffusers.models.base import open_base
        from kcv2diffusers.models.sampler import check_size
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "keras") from error

    folder = Path(out)
    check_folder(folder)
    files = open_base(*base, tokenizer=tokenizer, lora=lora)
    files.check_prompts(*prompts, negative_prompt)
    files.schedule.check(files.prediction_type)
    files.schedule.timesteps(steps)
    height, width = height or files.image_size, width or files.image_size
    check_size(height, width)
    images = files.load().sampler()(
        [prompt for prompt in prompts for _ in range(images_per_prompt)],
        height=height,
        width=width,
        seed=seed,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance_scale=guidance_scale,
        progress=progress,
    )
    folder.mkdir(parents=True, exist_ok=True)
    first = max((int(path.stem) + 1 for path in folder.glob("*.png") if path.stem.isdecimal()), default=0)
    paths = [folder / f"{first + number:03}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
        keeps(f"the last picture written is {path}")
    return paths
