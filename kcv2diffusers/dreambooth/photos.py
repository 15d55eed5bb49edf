"""Read folders of photos in common formats as images of bucket sizes."""

from __future__ import annotations

import math
import re
import warnings
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image, ImageOps, UnidentifiedImageError

from kcv2diffusers.diffusion import PIXELS_PER_LATENT, Array
from kcv2diffusers.dreambooth.captions import METADATA, caption_beside, listed_captions
from kcv2diffusers.errors import Error, plain, reading

Size = tuple[int, int]
"""Height and width in pixels."""

_GRAIN = 64  # bucket sides are multiples of this
_LONGEST = 2  # a bucket's longer side is at most this many times the resolution
_MOST_PIXELS = 300_000_000  # phones reach 200 million; a small file that claims more is a decompression bomb
_SPARE = 2  # a large photo is decoded at no less than this many times the required size

_MASK = "-mask.png"
_REPEATED = re.compile(r"(\d{1,3})_.+")  # kohya's folder names, "10_sks dog"
_ORIENTATION = 0x0112  # the EXIF tag
_TURNS = {
    2: Image.Transpose.FLIP_LEFT_RIGHT,
    3: Image.Transpose.ROTATE_180,
    4: Image.Transpose.FLIP_TOP_BOTTOM,
    5: Image.Transpose.TRANSPOSE,
    6: Image.Transpose.ROTATE_270,
    7: Image.Transpose.TRANSVERSE,
    8: Image.Transpose.ROTATE_90,
}
_SWAPS = (5, 6, 7, 8)  # orientations that swap height and width
_REDUCIBLE = ("L", "LA", "RGB", "RGBA", "CMYK", "YCbCr")
_WHITES = (255, 65535, 2**31 - 1)  # white in 8, 16 and 32 bits, for values that are not bytes

# First bytes of formats that Pillow does not open, with messages. HEIC is read if its opener is installed.
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
    """An image file that opens.

    `size` is the displayed size (EXIF orientation applied). `repeats` is how often an epoch contains the
    photo. `prompt` describes it; of a photo that was found it is its caption, if there is one. `mask` is the
    file NAME-mask.png beside it.
    """

    path: Path
    size: Size
    repeats: int = 1
    prompt: str = ""
    mask: Path | None = None


@dataclass(frozen=True)
class Photos:
    """The photos of a folder in order of name, and the skipped files and folders by name with reasons."""

    found: list[Photo]
    skipped: list[str]


def find_photos(folder: Path) -> Photos:
    """Open every file of `folder` and of the folders in it that are named as in kohya's scripts.

    An epoch contains the photos of a folder named "10_sks dog" 10 times. Captions and masks beside a photo
    are its own. Raises Error if `folder` is not a folder, and for a caption that cannot be read.
    """
    photos = Photos([], [])
    with reading(folder):
        if not folder.is_dir():
            if folder.exists():
                raise Error(f"{plain(folder)}: a file, not a folder.\nGive the folder with the photos.")
            raise Error(f"{plain(folder)}: no such folder.\nCheck the path.")
        listed: dict[str, str] = {}
        for path in _find(folder, "", 1, photos, listed):
            match = _REPEATED.fullmatch(path.name)
            if match and int(match[1]):
                inner = _find(path, f"{path.name}/", int(match[1]), photos, listed)
                photos.skipped.extend(f"{plain(each.relative_to(folder))}/ (a folder)" for each in inner)
            else:
                name = plain(path.name)
                photos.skipped.append(f"{name}/ (a folder; give it, or name it 1_{name})")
        found = {photo.path.relative_to(folder).as_posix() for photo in photos.found}
        if left := sorted(listed.keys() - found):
            names = plain(", ".join(left[:3])) + (", ..." if len(left) > 3 else "")
            photos.skipped.append(f"{len(left)} captions in {METADATA} of other pictures ({names})")
    return photos


def _find(folder: Path, place: str, repeats: int, photos: Photos, listed: dict[str, str]) -> list[Path]:
    """Add the files of one folder to `photos`, and return its subfolders.

    `place` is put before the names of skipped files. `listed` are the captions in the metadata files so far,
    by place and name; those of this folder are added.
    """
    folders = []
    paths = sorted(folder.iterdir())
    stems = {path.stem for path in paths if path.suffix.lower() != ".txt"}
    listed |= {place + name: text for name, text in listed_captions(folder).items()}
    for path in paths:
        if path.is_dir():
            if not path.name.startswith("."):  # hidden folders hold thumbnails and the like
                folders.append(path)
            continue
        if path.name == METADATA or _belongs_to_a_photo(path, stems):
            continue
        try:
            if not path.is_file():  # opening a pipe would block
                raise ValueError("not a file")
            size = _load(path, 1)[1]
        except Exception as error:  # decoders raise any exception type; the run continues without the photo
            photos.skipped.append(f"{plain(place + path.name)} ({_reason(path, error)})")
            continue
        caption = caption_beside(path) or listed.get(place + path.name, "")
        mask = path.with_name(f"{path.stem}{_MASK}")
        photos.found.append(Photo(path, size, repeats, caption, mask if mask.is_file() else None))
    return folders


def _belongs_to_a_photo(path: Path, stems: Iterable[str]) -> bool:
    """Whether a file is the caption or the mask of another one, of which the name without suffix is given."""
    if path.suffix.lower() == ".txt":
        return path.stem in stems
    return path.name.endswith(_MASK) and path.name.removesuffix(_MASK) in stems


def _reason(path: Path, error: Exception) -> str:
    """A short reason why a file is not used."""
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
    """The sizes at which images are trained: multiples of 64, at most `resolution` squared pixels.

    Proportions go up to about 4:1. Photos keep their proportions, except for the crop to the nearest bucket.
    """
    longest = _LONGEST * resolution
    sizes = {}
    for height in range(_GRAIN, longest + 1, _GRAIN):
        width = min(longest, resolution**2 // height // _GRAIN * _GRAIN)
        if width:
            sizes[width] = height  # keeps the largest height for each width
    return sorted((height, width) for width, height in sizes.items())


def bucket_of(size: Size, resolution: int) -> Size:
    """The bucket whose aspect ratio is nearest to that of `size`."""
    wanted = math.log(size[0] / size[1])
    return min(buckets(resolution), key=lambda bucket: abs(math.log(bucket[0] / bucket[1]) - wanted))


def read_photo(
    photo: Photo, size: Size, *, place: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Array:
    """The photo at `size`, as (height, width, 3) float32 in -1..1.

    It is scaled to cover `size` and cropped. `place` is the position of the crop, 0..1 down and across.
    Raises Error if the file cannot be read any more.
    """
    return _fitted(photo.path, _on_white, size, place, flip) / 127.5 - 1


def read_mask(
    photo: Photo, size: Size, *, place: tuple[float, float] = (0.5, 0.5), flip: bool = False
) -> Array:
    """The mask of `read_photo`'s image, as (height / 8, width / 8, 1) float32 in 0..1.

    It is the brightness of the photo's mask file or else the photo's own opacity, averaged over the pixels of
    a latent. Raises Error if the file cannot be read any more.
    """
    side = PIXELS_PER_LATENT
    pixels = _fitted(*_masked(photo), size, place, flip) / 255
    blocks = pixels.reshape(size[0] // side, side, size[1] // side, side)
    return np.asarray(blocks.mean((1, 3))[..., None])


def check_masks(photos: Iterable[Photo]) -> int:
    """The number of photos with a mask.

    Raises Error for a mask that is damaged or black, or has another size than its photo.
    """
    count = 0
    for photo in photos:
        path, look = _masked(photo)
        try:
            mask, size = _load(path, min(photo.size), look)
        except Exception as error:  # decoders raise any exception type
            raise Error(
                f"{plain(path)}: this mask cannot be used: {_reason(path, error)}.\n"
                "Save it as a PNG, or remove it."
            ) from error
        if size != photo.size:
            raise Error(
                f"{plain(path)}: this mask has {size[1]} x {size[0]} pixels, its photo {photo.size[1]} x "
                f"{photo.size[0]}.\nGive a mask of the photo's size."
            )
        values = np.asarray(mask)
        if not values.any():
            raise Error(f"{plain(path)}: masks all of the photo.\nWhat is to be learnt is white or opaque.")
        count += photo.mask is not None or bool(values.min() < 255)
    return count


Look = Callable[[Image.Image], Image.Image]
"""What to take of an image."""


def _masked(photo: Photo) -> tuple[Path, Look]:
    """The file that holds a photo's mask, and what it is in that file."""
    return (photo.mask, _brightness) if photo.mask else (photo.path, _opacity)


def _fitted(path: Path, look: Look, size: Size, place: tuple[float, float], flip: bool) -> Array:
    """The image at `size` as float32 in 0..255: scaled to cover it, cropped at `place`, and mirrored."""
    height, width = size
    try:
        image, _ = _load(path, max(size), look)
    except Exception as error:  # decoders raise any exception type
        raise Error(
            f"{plain(path)}: could be read before, and cannot now: {_reason(path, error)}.\n"
            "Leave the photos of a run in their place until it ends; --resume goes on."
        ) from error
    image = ImageOps.fit(image, (width, height), Image.Resampling.LANCZOS, centering=(place[1], place[0]))
    return np.asarray(ImageOps.mirror(image) if flip else image, dtype="float32")


def _load(path: Path, side: int, look: Look | None = None) -> tuple[Image.Image, Size]:
    """What `look` takes of a file, upright, and its displayed size; default: RGB, composited on white.

    A large image is reduced; both sides stay at least `_SPARE` times `side`. Raises Pillow's exceptions.
    """
    with _opened(path) as image:
        width, height = image.size
        least = _SPARE * side
        drafted = image.draft(None, (least, least))  # JPEG decoders can reduce the size themselves
        image.load()
        if not drafted:
            width, height = image.size  # Pillow has applied a TIFF's orientation by now
        if not width * height:
            raise ValueError("no pixels")
        turn = _orientation(image)
        picture = _eight_bits(image)
        factor = min(picture.size) // least
        if factor > 1 and picture.mode in _REDUCIBLE:
            picture = picture.reduce(factor)
        picture = (look or _on_white)(picture)
        if turn in _TURNS:
            picture = picture.transpose(_TURNS[turn])
        return picture, (width, height) if turn in _SWAPS else (height, width)


@contextmanager
def _opened(path: Path) -> Iterator[Image.Image]:
    """Open an image with our pixel limit in place of Pillow's, and without Pillow's warnings."""
    before = Image.MAX_IMAGE_PIXELS
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        if re.match(_HEIC, _head(path), re.S):
            with suppress(ImportError):
                from pillow_heif import register_heif_opener

                register_heif_opener()
        try:
            Image.MAX_IMAGE_PIXELS = _MOST_PIXELS // 2  # Pillow raises above twice the limit
            with Image.open(path) as image:
                yield image
        finally:
            Image.MAX_IMAGE_PIXELS = before


def _head(path: Path) -> bytes:
    with path.open("rb") as file:
        return file.read(16)


def _orientation(image: Image.Image) -> int:
    """The EXIF orientation; 1 (upright) if there is none or it cannot be read."""
    try:
        found = image.getexif().get(_ORIENTATION, 1)
    except Exception:  # a broken tag elsewhere raises any exception type
        return 1
    return found if isinstance(found, int) else 1


def _eight_bits(image: Image.Image) -> Image.Image:
    """The image with 8 bits per value.

    Floats up to 1 are fractions of white. Larger values are taken as 8, 16 or 32 bits, whichever fits; as 16
    bits where the file says so. Raises ValueError for NaN and infinity.
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
    if _has_opacity(image):
        image = image.convert("RGBA")
        white = Image.new("RGBA", image.size, "white")
        image = Image.alpha_composite(white, image)
    return image.convert("RGB")


def _opacity(image: Image.Image) -> Image.Image:
    if _has_opacity(image):
        return image.convert("RGBA").getchannel("A")
    return Image.new("L", image.size, 255)


def _brightness(image: Image.Image) -> Image.Image:
    return image.convert("L")


def _has_opacity(image: Image.Image) -> bool:
    return "A" in image.getbands() or "transparency" in image.info
