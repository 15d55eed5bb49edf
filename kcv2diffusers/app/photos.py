"""Photos as a training sees them: upright, cropped to their buckets. A command of the page's server.

    python -m kcv2diffusers.app.photos FOLDER OUT RESOLUTION

It writes a small picture of each photo into OUT and prints JSON: `photos` (a list of `file`, `name`,
`caption`), their `count`, and `skipped`. Photos are opened in a
process of their own, because a damaged one may take much memory.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path

import numpy as np
from PIL import Image

from kcv2diffusers.dreambooth.photos import Photo, Size, bucket_of, find_photos, read_photo
from kcv2diffusers.errors import Error, plain

_SHOWN = 60  # photos
_SIDE = 256  # pixels of a small picture


def main() -> None:
    """Write the pictures and print what was found; an Error is printed on stderr, with exit code 1."""
    folder, out, resolution = Path(sys.argv[1]), Path(sys.argv[2]), int(sys.argv[3])
    out.mkdir(exist_ok=True)
    try:
        photos = find_photos(folder)
        shown = [
            _show(photo, out / f"{number:03}.jpg", resolution)
            for number, photo in enumerate(photos.found[:_SHOWN])
        ]
    except Error as error:
        sys.exit(f"kcv2diffusers: {error}")
    print(json.dumps({"photos": shown, "count": len(photos.found), "skipped": photos.skipped}))


def _show(photo: Photo, file: Path, resolution: int) -> dict[str, str]:
    bucket = bucket_of(photo.size, resolution)
    pixels = ((read_photo(photo, bucket) + 1) * 127.5).round().astype(np.uint8)
    image = Image.fromarray(pixels)
    image.thumbnail((_SIDE, _SIDE))
    image.save(file, quality=85)
    return {"file": str(file), "name": photo.path.name, "caption": caption(photo, bucket)}


def caption(photo: Photo, bucket: Size) -> str:
    """The name, the size, the bucket, how much the crop takes away, and the prompt of its own, if any."""
    height, width = photo.size
    scale = max(bucket[0] / height, bucket[1] / width)
    kept = bucket[0] * bucket[1] / (height * width * scale**2)
    words = f"{plain(photo.path.name)}: {width} x {height}, trained at {bucket[1]} x {bucket[0]}"
    words += f", {1 - kept:.0%} cropped" if kept < 0.995 else ""
    words += ", enlarged" if scale > 1 else ""
    return words + (f"; {plain(photo.prompt)}" if photo.prompt else "")


if __name__ == "__main__":
    main()
