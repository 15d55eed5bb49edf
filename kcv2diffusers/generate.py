"""Pictures from prompts, written as PNG files: `kcv2diffusers generate`."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from os import PathLike
from pathlib import Path

from kcv2diffusers.errors import Error, MissingExtra


def generate(
    *base: str | PathLike[str],
    prompts: Sequence[str],
    out: str | PathLike[str],
    negative_prompt: str = "",
    steps: int = 50,
    guidance_scale: float = 7.5,
    seed: int | None = None,
    height: int | None = None,
    width: int | None = None,
    tokenizer: str | PathLike[str] | None = None,
    progress: Callable[[int, int], None] | None = None,
) -> list[Path]:
    """Write a picture for each of `prompts` into folder `out`, and return their paths in that order.

    `base` is "tiny", a diffusers pipeline folder, or KerasCV checkpoints. `height` and `width` are in pixels,
    multiples of 64 (default: 64 for the tiny base, otherwise 512). Raises Error with a message for the user.
    """
    if not prompts:
        raise Error("Nothing to generate: give --prompt.")
    try:
        from PIL import Image

        from kcv2diffusers.models.base import TINY, load_base
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "keras") from error

    side = 64 if [str(source) for source in base] == [TINY] else 512
    images = load_base(*base, tokenizer=tokenizer).sampler()(
        prompts,
        height=height or side,
        width=width or side,
        seed=seed,
        negative_prompt=negative_prompt,
        steps=steps,
        guidance_scale=guidance_scale,
        progress=progress,
    )
    folder = Path(out)
    folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{number:03}.png" for number in range(len(images))]
    for path, image in zip(paths, images, strict=True):
        Image.fromarray(image).save(path)
    return paths
