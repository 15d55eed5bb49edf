"""Folders of photos, as people have them, to pictures of bucket sizes."""

from __future__ import annotations

import math
import warnings
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kcv2diffusers.errors import Error

Array = np.ndarray[Any, Any]
Size = tuple[int, int]
"""Height and width in pixels."""

_GRAIN = 64  # sides are multiples of it
_LONGEST = 2  # a bucket's long side is at most so many times the resolution


@dataclass(frozen=True)
class Photo:
    """A file that opens as a picture, and its size as it is seen (EXIF orientation applied)."""

    path: Path
    size: Size


@dataclass(frozen=True)
class Photos:
    """The pictures of a folder by name, and the names of files that are none, with reasons."""

    found: list[Photo]
    skipped: list[str]


def find_photos(folder: Path) -> Photos:
    """Open every file of `folder`. Raises Error if it is no folder."""
    if not folder.is_dir():
        raise Error(f"{folder}: no such folder.\nCheck the path.")
    found, skipped = [], []
    for path in sorted(folder.iterdir()):
        if not path.is_file():
            continue
        try:
            found.append(Photo(path, _load(path).size[::-1]))
        except (OSError, ValueError, SyntaxError, Image.DecompressionBombError) as error:
            reason = "not a picture" if isinstance(error, UnidentifiedImageError) else str(error)
            skipped.append(f"{path.name} ({reason.splitlines()[0] if reason else 'damaged'})")
    return Photos(found, skipped)


def buckets(resolution: int) -> list[Size]:
    """The sizes pictures are trained at: multiples of 64 of at most the square of `resolution` pixels, up to
    about 4:1; photos keep their proportions but for what is cropped to the nearest.
    """
    longest = _LONGEST * resolution
    sizes = {}
    for height in range(_GRAIN, longest + 1, _GRAIN):
        width = min(longest, resolution**2 // height // _GRAIN * _GRAIN)
        if width:
            sizes[width] = height  # of two heights for one width the larger
    return sorted((height, width) for width, height in sizes.items())


def bucket_of(size: Size, resolution: int) -> Size:
    """The bucket whose proportions are nearest to those of `size`."""
    wanted = math.log(size[0] / size[1])
    return min(buckets(resolution), key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - wanted))


def read_photo(
    photo: Photo, size: Size, *, place: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Array:
    """The picture at `size`, (height, width, 3) float32 in -1..1.

    It is scaled to cover `size`; `place` says where what is left over is cut, 0..1 down and across.
    """
    height, width = size
    image = ImageOps.fit(
        _load(photo.path), (width, height), Image.Resampling.LANCZOS, centering=(place[1], place[0])
    )
    values = np.asarray(ImageOps.mirror(image) if flip else image, dtype="float32")
    return values / 127.5 - 1


def _load(path: Path) -> Image.Image:
    """A file as RGB, upright, on white where it is transparent. Raises what Pillow does."""
    with warnings.catch_warnings():
        warnings.simplefilter("error", Image.DecompressionBombWarning)
        try:
            image: Image.Image = Image.open(path)
            image.load()
        except Image.DecompressionBombWarning as error:
            raise ValueError("more than 89 million pixels") from error
    image = ImageOps.exif_transpose(image)
    if image.mode.startswith("I") or image.mode == "F":  # 16 bits and more
        values = np.asarray(image, dtype="float64")
        top = 255 if values.max() <= 255 else 65535
        image = Image.fromarray((np.clip(values / top, 0, 1) * 255).astype("uint8"))
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
