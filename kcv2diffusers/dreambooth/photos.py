"""Folders of photos, as people have them, to pictures of bucket sizes."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kcv2diffusers.diffusion import Array
from kcv2diffusers.errors import Error, plain, reading

Size = tuple[int, int]
"""Height and width in pixels."""

_GRAIN = 64  # sides are multiples of it
_LONGEST = 2  # a bucket's long side is at most so many times the resolution
_MOST_PIXELS = 300_000_000  # phones take up to 200 million; a small file that claims more is a bomb
_SPARE = 2  # a large photo is read at no less than so many times the size that is wanted

_REPEATED = re.compile(r"(\d{1,3})_.+")  # kohya's folders, "10_sks dog"
_ORIENTATION = 0x0112  # EXIF's tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS = (5, 6, 7, 8)  # the orientations that make a height of a width
_REDUCIBLE = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")
_WHITES = (255, 65535, 2**31 - 1)  # of numbers that are not bytes: 8, 16 and 32 bits

# How pictures begin that Pillow does not open, and what to say of them. HEIC is read if its opener is there.
_HEIC = rb".{4}ftyp(hei[cxms]|hev[cxms]|mif1|msf1)"
_UNREAD = (
    (_HEIC, "HEIC; pip install 'kcv2diffusers[heic]' to use it"),
    (rb".{4}ftypavi[fs]", "AVIF, damaged or too new for this Pillow; pip install 'pillow>=11.3'"),
    (rb"\xff\x0a|.{4}JXL ", "JPEG XL, which is not read; save it as PNG"),
    (
        rb"II\*\0|MM\0\*",
        "a TIFF or a camera's raw file that is damaged or of a kind not read; save it as PNG",
    ),
)


@dataclass(frozen=True)
class Photo:
    """A file that opens as a picture, its size as it is seen (EXIF orientation applied), and how many times
    an epoch takes it.
    """

    path: Path
    size: Size
    repeats: int = 1


@dataclass(frozen=True)
class Photos:
    """The pictures of a folder by name, and what is none or not looked at, by name with reasons."""

    found: list[Photo]
    skipped: list[str]


def find_photos(folder: Path) -> Photos:
    """Open every file of `folder`, and of folders in it that are named as kohya's scripts want them: an epoch
    takes the photos of "10_sks dog" 10 times. Raises Error if it is no folder.
    """
    photos = Photos([], [])
    with reading(folder):
        if not folder.is_dir():
            if folder.exists():
                raise Error(f"{plain(folder)}: a file, not a folder.\nGive the folder with the photos.")
            raise Error(f"{plain(folder)}: no such folder.\nCheck the path.")
        for path in _find(folder, "", 1, photos):
            match = _REPEATED.fullmatch(path.name)
            if match and int(match[1]):
                inner = _find(path, f"{path.name}/", int(match[1]), photos)
                photos.skipped.extend(f"{plain(each.relative_to(folder))}/ (a folder)" for each in inner)
            else:
                name = plain(path.name)
                photos.skipped.append(f"{name}/ (a folder; give it, or name it 1_{name})")
    return photos


def _find(folder: Path, place: str, repeats: int, photos: Photos) -> list[Path]:
    """Add the files of one folder, with `place` before their names. Returns the folders in it."""
    folders = []
    for path in sorted(folder.iterdir()):
        if path.is_dir():
            if not path.name.startswith("."):  # thumbnails and the like
                folders.append(path)
            continue
        try:
            if not path.is_file():  # opening a pipe would wait
                raise ValueError("not a file")
            photos.found.append(Photo(path, _load(path, 1)[1], repeats))
        except Exception as error:  # decoders raise whatever they meet; the run goes on without the photo
            photos.skipped.append(f"{plain(place + path.name)} ({_reason(path, error)})")
    return folders


def _reason(path: Path, error: Exception) -> str:
    """Why a file is not used, in a few words."""
    if isinstance(error, UnidentifiedImageError):
        with suppress(OSError):
            head = _head(path)
            if "HEIF" in Image.OPEN and re.match(_HEIC, head, re.S):
                return "HEIC, damaged"
            return next((why for begins, why in _UNREAD if re.match(begins, head, re.S)), "not a picture")
    if isinstance(error, Image.DecompressionBombError):
        return f"more than {_MOST_PIXELS // 10**6} million pixels"
    if isinstance(error, MemoryError):
        return "too large for the memory that is free"
    said = (error.strerror if isinstance(error, OSError) else None) or str(error)
    words = plain(next(iter(said.strip().splitlines()), "").rstrip("."))
    if words and isinstance(error, (OSError, ValueError)):
        return words
    return f"damaged: {words}" if words else "damaged"


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
    try:
        image, _ = _load(photo.path, max(size))
    except Exception as error:  # whatever a decoder raises
        raise Error(
            f"{plain(photo.path)}: could be read before, and cannot now: {_reason(photo.path, error)}.\n"
            "Leave the photos of a run in their place until it ends; --resume goes on."
        ) from error
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS, centering=(place[1], place[0]))
    values = np.asarray(ImageOps.mirror(image) if flip else image, dtype="float32")
    return values / 127.5 - 1


def _load(path: Path, side: int) -> tuple[Image.Image, Size]:
    """A file as RGB, upright, on white where it is transparent, and its size as it is seen.

    A large picture comes smaller, with both sides at least `_SPARE` times `side`. Raises what Pillow does.
    """
    with _opened(path) as image:
        width, height = image.size
        least = _SPARE * side
        drafted = image.draft(None, (least, least))  # of a JPEG, whose decoder makes it smaller
        image.load()
        if not drafted:
            width, height = image.size  # a TIFF is upright now
        if not width * height:
            raise ValueError("no pixels")
        turn = _orientation(image)
        picture = _eight_bits(image)
        factor = min(picture.size) // least
        if factor > 1 and picture.mode in _REDUCIBLE:
            picture = picture.reduce(factor)
        picture = _on_white(picture)
        if turn in _TURNS:
            picture = picture.transpose(_TURNS[turn])
        return picture, (width, height) if turn in _SWAPS else (height, width)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """A picture with Pillow's limit of pixels at ours, and without its warnings: what matters is an error."""
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if re.match(_HEIC, _head(path), re.S):
            with suppress(ImportError):
                from pillow_heif import register_heif_opener

                register_heif_opener()
        try:
            Image.MAX_IMAGE_PIXELS = _MOST_PIXELS // 2  # twice that is an error
            with Image.open(path) as image:
                yield image
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _orientation(image: Image.Image) -> int:
    """That of the EXIF data; 1, upright, where there is none or it cannot be read."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # it raises what it meets in the other tags
        return 1
    return found if isinstance(found, int) else 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """The picture with a byte for each value. Numbers up to 1 are taken as shares of white, if they are not
    whole; larger ones as 8, 16 or 32 bits, 16 where the file says so. Raises ValueError for NaN and infinity.
    """
    if image.mode != "F" and not image.mode.startswith("I"):
        return image
    values = np.asarray(image)
    most = float(values.max())
    if image.mode == "F" and not np.isfinite(values).all():
        raise ValueError("some of its values are NaN or infinite")
    if image.mode.startswith("I;16"):
        white = 65535.0
    elif image.mode == "F" and most <= 1:
        white = 1.0
    else:
        white = float(next((white for white in _WHITES if most <= white), most))
    scaled = values.astype("float32")
    scaled *= 255 / white
    return Image.fromarray(np.clip(scaled, 0, 255, out=scaled).round(out=scaled).astype("uint8"))


def _on_white(image: Image.Image) -> Image.Image:
    if "A" in image.getbands() or "transparency" in image.info:
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")
