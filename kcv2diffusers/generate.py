"""Pictures from prompts, written as PNG files: `kcv2diffusers generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

from kcv2diffusers.backend import choose_backend
from kcv2diffusers.errors import Error, MissingExtra
from kcv2diffusers.interruption import keeps


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
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write pictures of each of `prompts` into folder `out`, and return their paths in that order.

    They are numbered on from what is there. `base` is "tiny", a diffusers pipeline folder, or KerasCV
    checkpoints. `height` and `width` are in pixels, multiples of 64 (default: the base's size). Raises
    Error with a message for the user.
    """
    if not prompts or images_per_prompt < 1:
        raise Error("Nothing to generate: give a prompt, and at least one image per prompt.")
    choose_backend()
    try:
        from PIL import Image

        from kcv2diffusers.models.base import load_base
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "keras") from error

    loaded = load_base(*base, tokenizer=tokenizer)
    images = loaded.sampler()(
        [prompt for prompt in prompts for _ in range(images_per_prompt)],
        height=height or loaded.image_size,
        width=width or loaded.image_size,
        seed=seed,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance_scale=guidance_scale,
        progress=progress,
    )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    first = max((int(path.stem) + 1 for path in folder.glob("*.png") if path.stem.isdecimal()), default=0)
    paths = [folder / f"{first + number:03}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
        keeps(f"the last picture written is {path}")
    return paths
