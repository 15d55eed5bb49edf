"""Photos as people have them: turned, transparent, grey, broken; and the sizes they are trained at."""

from __future__ import annotations

import os
import struct
import subprocess
import sys
import warnings
import zlib
from pathlib import Path

import numpy as np
import pytest
from PIL import Image, ImageFile, ImageOps

from kcv2diffusers.dreambooth.examples import usable_photos
from kcv2diffusers.dreambooth.photos import Photo, bucket_of, buckets, find_photos, read_photo
from kcv2diffusers.errors import Error


def only(folder: Path) -> Photo:
    found = find_photos(folder)
    assert len(found.found) == 1 and not found.skipped
    return found.found[0]


def test_a_turned_photo_is_upright(tmp_path: Path) -> None:
    image = Image.new("RGB", (120, 60), "blue")
    image.paste("red", (0, 0, 60, 60))
    exif = Image.Exif()
    exif[0x0112] = 6  # the camera was turned: show it rotated to the right
    image.save(tmp_path / "turned.jpg", exif=exif, quality=95)
    photo = only(tmp_path)
    assert photo.size == (120, 60)
    values = read_photo(photo, (128, 64))
    assert values.shape == (128, 64, 3)
    assert values[20, 32, 0] > 0.9 and values[20, 32, 2] < -0.9  # red above
    assert values[100, 32, 2] > 0.9


@pytest.mark.parametrize("mode", ["L", "LA", "RGBA", "P", "CMYK", "1", "I;16"])
def test_every_mode_becomes_rgb(tmp_path: Path, mode: str) -> None:
    if mode == "I;16":
        Image.fromarray(np.full((64, 64), 40000, "uint16")).save(tmp_path / "a.png")
    else:
        image = Image.new("RGB", (64, 64), (200, 200, 200)).convert(mode)
        image.save(tmp_path / ("a.tif" if mode == "CMYK" else "a.png"))
    values = read_photo(only(tmp_path), (64, 64))
    assert values.shape == (64, 64, 3) and values.dtype == np.float32
    wanted = 40000 / 65535 * 2 - 1 if mode == "I;16" else 200 / 127.5 - 1
    assert abs(float(values.mean()) - wanted) < (0.5 if mode == "1" else 0.02)


def test_what_is_transparent_is_white(tmp_path: Path) -> None:
    Image.new("RGBA", (64, 64), (255, 0, 0, 0)).save(tmp_path / "a.png")
    assert read_photo(only(tmp_path), (64, 64)).min() > 0.99


def test_what_is_no_picture_is_named(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "good.png")
    (tmp_path / "notes.txt").write_text("a dog")
    (tmp_path / "empty.jpg").write_bytes(b"")
    noise = np.random.default_rng(0).integers(0, 255, (64, 64, 3), "uint8")
    Image.fromarray(noise).save(tmp_path / "cut.png")
    (tmp_path / "cut.png").write_bytes((tmp_path / "cut.png").read_bytes()[:4000])
    (tmp_path / "folder").mkdir()
    found = find_photos(tmp_path)
    assert [photo.path.name for photo in found.found] == ["good.png"]
    assert [line.split(" ")[0] for line in found.skipped] == ["cut.png", "empty.jpg", "notes.txt", "folder/"]
    assert "not a picture" in found.skipped[2]


def test_no_folder(tmp_path: Path) -> None:
    with pytest.raises(Error, match="no such folder"):
        find_photos(tmp_path / "missing")


@pytest.mark.parametrize("resolution", [64, 256, 512, 768])
def test_buckets(resolution: int) -> None:
    sizes = buckets(resolution)
    assert (resolution, resolution) in sizes
    for height, width in sizes:
        assert height % 64 == width % 64 == 0
        assert height * width <= resolution**2
        assert max(height, width) <= 2 * resolution
    assert len({width for _, width in sizes}) == len(sizes)
    assert all((width, height) in sizes for height, width in sizes if height * width > 0.95 * resolution**2)


@pytest.mark.parametrize(
    ("size", "wanted"),
    [
        ((3000, 3000), (512, 512)),
        ((3000, 4000), (448, 576)),
        ((4000, 3000), (576, 448)),
        ((100, 900), (256, 1024)),
    ],
)
def test_bucket_of(size: tuple[int, int], wanted: tuple[int, int]) -> None:
    assert bucket_of(size, 512) == wanted


def test_a_photo_is_cropped_not_squashed(tmp_path: Path) -> None:
    """A circle stays one, and `place` chooses what is cut."""
    y, x = np.mgrid[:100, :300]
    image = np.where(((y - 50) ** 2 + (x - 150) ** 2 < 900)[..., None], 255, 0).astype("uint8").repeat(3, 2)
    image[:, :20] = (255, 0, 0)
    Image.fromarray(image).save(tmp_path / "a.png")
    photo = only(tmp_path)
    middle = read_photo(photo, (64, 64))[..., 1] > 0
    assert abs(int(middle.any(0).sum()) - int(middle.any(1).sum())) <= 1
    left = read_photo(photo, (64, 64), place=(0.5, 0.0))
    assert left[32, 2, 0] > 0.9
    np.testing.assert_array_equal(read_photo(photo, (64, 64), place=(0.5, 0.0), flip=True), left[:, ::-1])


SHORT, ASCII, DOUBLE = (3, struct.pack("<HH", 6, 0)), (2, b"72\0\0"), (12, b"\0\0\0\0\0\0\0@")
RESOLUTION_UNIT, X_RESOLUTION, YCBCR_POSITIONING, WIDTH, ORIENTATION = 296, 282, 531, 256, 274


def exif(*tags: tuple[int, tuple[int, bytes]]) -> bytes:
    """EXIF data of tags, each with a type and value, whether or not they belong together."""
    after = 8 + 2 + 12 * len(tags) + 4
    entries, data = b"", b""
    for tag, (kind, value) in sorted(tags):
        place = struct.pack("<L", after + len(data)) if len(value) > 4 else value
        entries += struct.pack("<HHL", tag, kind, 3 if kind == 2 else 1) + place
        data += value if len(value) > 4 else b""
    return b"Exif\0\0II*\0\x08\0\0\0" + struct.pack("<H", len(tags)) + entries + bytes(4) + data


def lower_half_red(size: tuple[int, int] = (80, 60)) -> Image.Image:
    image = Image.new("RGB", size, "blue")
    image.paste("red", (0, 0, size[0] // 2, size[1]))  # left, which Orientation 6 turns up
    return image


@pytest.mark.parametrize(
    ("tag", "value"),
    [
        (RESOLUTION_UNIT, DOUBLE),
        (RESOLUTION_UNIT, ASCII),
        (X_RESOLUTION, ASCII),
        (YCBCR_POSITIONING, ASCII),
        (WIDTH, ASCII),
    ],
)
@pytest.mark.parametrize("suffix", ["jpg", "webp", "png"])
def test_an_odd_tag_does_not_matter(tmp_path: Path, tag: int, value: tuple[int, bytes], suffix: str) -> None:
    data = exif((tag, value), (ORIENTATION, SHORT))
    lower_half_red().save(tmp_path / f"a.{suffix}", exif=data, quality=95)
    photo = only(tmp_path)
    assert photo.size == (80, 60)
    values = read_photo(photo, (128, 64))
    assert values[20, 32, 0] > 0.9 and values[100, 32, 2] > 0.9


@pytest.mark.parametrize(
    "data",
    [
        exif((ORIENTATION, ASCII)),
        exif((ORIENTATION, (3, struct.pack("<HH", 9, 0)))),
        exif((ORIENTATION, SHORT))[:16],
        b"Exif\0\0nonsense",
        b"Exif\0\0II*\0\xff\xff\xff\xff",
    ],
)
def test_an_orientation_that_cannot_be_read(tmp_path: Path, data: bytes) -> None:
    lower_half_red().save(tmp_path / "a.jpg", exif=data)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert only(tmp_path).size == (60, 80)


@pytest.mark.parametrize("turn", range(1, 9))
@pytest.mark.parametrize("suffix", ["jpg", "tif"])
def test_every_orientation(tmp_path: Path, turn: int, suffix: str) -> None:
    """As a viewer turns it, whether Pillow does that by itself, as for TIFF, or not."""
    image = Image.fromarray(np.random.default_rng(turn).integers(0, 255, (3, 4, 3), "uint8"))
    image = image.resize((80, 60), Image.Resampling.NEAREST)
    tags = Image.Exif()
    tags[ORIENTATION] = turn
    image.save(tmp_path / f"a.{suffix}", exif=tags, quality=100, subsampling=0)
    with Image.open(tmp_path / f"a.{suffix}") as opened:
        upright = ImageOps.exif_transpose(opened)
    photo = only(tmp_path)
    assert photo.size == upright.size[::-1]
    values = read_photo(photo, photo.size)
    assert np.abs((values + 1) * 127.5 - np.asarray(upright, "float32")).max() < 1


@pytest.mark.parametrize(
    "error",
    [
        zlib.error("Error -3"),
        SyntaxError("broken PNG file (chunk b'\\x00')"),
        EOFError(),
        struct.error("unpack requires"),
        TypeError("an integer is required"),
        KeyError("mode"),
        MemoryError(),
        Image.DecompressionBombError("a bomb"),
        OverflowError("too large"),
        AssertionError(),
    ],
    ids=lambda error: type(error).__name__,
)
def test_whatever_a_decoder_raises_only_that_photo_is_skipped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, error: Exception
) -> None:
    for name in ("bad.png", "good.png"):
        Image.new("RGB", (64, 64)).save(tmp_path / name)
    load = ImageFile.ImageFile.load

    def broken(self):
        if "bad" in str(self.filename):
            raise error
        return load(self)

    monkeypatch.setattr(ImageFile.ImageFile, "load", broken)
    found = find_photos(tmp_path)
    assert [photo.path.name for photo in found.found] == ["good.png"]
    assert len(found.skipped) == 1 and found.skipped[0].startswith("bad.png (")
    assert str(error).strip("'") in found.skipped[0] or isinstance(error, Image.DecompressionBombError)
    assert not found.skipped[0].endswith("()")


@pytest.mark.parametrize("suffix", ["png", "jpg", "gif", "bmp", "webp", "tif", "tga", "ico", "ppm"])
def test_bytes_that_were_changed_are_no_traceback(tmp_path: Path, suffix: str) -> None:
    rng = np.random.default_rng(0)
    Image.fromarray(rng.integers(0, 255, (32, 32, 3), "uint8")).save(tmp_path / f"a.{suffix}")
    whole = (tmp_path / f"a.{suffix}").read_bytes()
    for number in range(60):
        data = bytearray(whole)
        for place in rng.integers(0, min(len(data), 300), 3):
            data[place] = rng.integers(0, 256)
        (tmp_path / f"a.{suffix}").write_bytes(data[: rng.integers(1, len(data) + 1)] if number % 2 else data)
        found = find_photos(tmp_path)
        assert len(found.found) + len(found.skipped) == 1


def test_a_photo_that_is_damaged_during_the_run(tmp_path: Path) -> None:
    Image.new("RGB", (64, 64)).save(tmp_path / "a.png")
    photo = only(tmp_path)
    (tmp_path / "a.png").write_bytes(b"")
    with pytest.raises(Error, match=r"a\.png: could be read before, and cannot now"):
        read_photo(photo, (64, 64))


HEIC = b"\0\0\0\x18ftypheic\0\0\0\0mif1heic"


@pytest.mark.parametrize(
    ("data", "reason"),
    [
        (HEIC, "HEIC; pip install 'kcv2diffusers[heic]' to use it"),
        (HEIC.replace(b"heic", b"avif"), "AVIF, damaged or too new"),
        (b"\xff\x0a\xfa\x1f", "JPEG XL, which is not read; save it as PNG"),
        (b"II*\0\x08\0\0\0", "a TIFF or a camera's raw file"),
    ],
)
def test_formats_that_need_something(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, data: bytes, reason: str
) -> None:
    monkeypatch.setitem(sys.modules, "pillow_heif", None)  # not installed, nor left by another test
    monkeypatch.setattr(Image, "ID", [name for name in Image.ID if name != "HEIF"])
    monkeypatch.delitem(Image.OPEN, "HEIF", raising=False)
    for registry in (Image.OPEN, Image.EXTENSION):
        monkeypatch.delitem(registry, "HEIF", raising=False)
    (tmp_path / "a.heic").write_bytes(data)
    assert reason in find_photos(tmp_path).skipped[0]


def test_heic(tmp_path: Path) -> None:
    heif = pytest.importorskip("pillow_heif")
    heif.from_pillow(lower_half_red((128, 64))).save(tmp_path / "a.heic", quality=90)
    (tmp_path / "b.heic").write_bytes((tmp_path / "a.heic").read_bytes()[:40])
    found = find_photos(tmp_path)
    assert found.skipped == ["b.heic (HEIC, damaged)"]
    values = read_photo(found.found[0], (64, 128))
    assert values[32, 20, 0] > 0.9 and values[32, 100, 2] > 0.9


@pytest.mark.parametrize(
    ("values", "grey"),
    [
        (np.linspace(0, 1, 64 * 64, dtype="float32"), 127.5),
        (np.linspace(0, 255, 64 * 64, dtype="float32"), 127.5),
        (np.full(64 * 64, 0.25, "float32"), 63.75),
        (np.full(64 * 64, 51, "float32"), 51),
        (np.linspace(0, 65535, 64 * 64, dtype="float32"), 127.5),
        (np.full(64 * 64, 200 * 257, "uint16"), 200),
        (np.full(64 * 64, 257, "uint16"), 1),  # dark, and not a picture of bytes
        (np.full(64 * 64, 200, "int32"), 200),
        (np.full(64 * 64, 200 * 257, "int32"), 200),
    ],
)
def test_numbers_that_are_not_bytes(tmp_path: Path, values: np.ndarray, grey: float) -> None:
    Image.fromarray(values.reshape(64, 64)).save(tmp_path / "a.tif")
    seen = (read_photo(only(tmp_path), (64, 64)) + 1) * 127.5
    assert abs(float(seen.mean()) - grey) < 0.3


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_numbers_that_are_none(tmp_path: Path, value: float) -> None:
    values = np.full((64, 64), 0.5, "float32")
    values[3, 3] = value
    Image.fromarray(values).save(tmp_path / "a.tif")
    assert find_photos(tmp_path).skipped == ["a.tif (some of its values are NaN or infinite)"]


def test_folders_as_kohya_has_them(tmp_path: Path) -> None:
    for name in ("c.png", "10_sks dog/a.png", "2_other/b.png", "2_other/deep/d.png", "more/e.png"):
        path = tmp_path / name
        path.parent.mkdir(exist_ok=True)
        Image.new("RGB", (64, 64)).save(path)
    (tmp_path / "10_sks dog" / "a.txt").write_text("a caption")
    (tmp_path / ".thumbnails").mkdir()
    found = find_photos(tmp_path)
    assert [(photo.path.name, photo.repeats) for photo in found.found] == [
        ("c.png", 1),
        ("a.png", 10),
        ("b.png", 2),
    ]
    assert [photo.prompt for photo in found.found] == ["", "a caption", ""]
    assert found.skipped == [
        "2_other/deep/ (a folder)",
        "more/ (a folder; give it, or name it 1_more)",
    ]
    notes: list[str] = []
    assert len(usable_photos(tmp_path, notes)) == 3
    assert notes[:2] == ["10_sks dog: 1 photo, 10 times an epoch.", "2_other: 1 photo, 2 times an epoch."]


def test_a_folder_with_folders_only_says_so(tmp_path: Path) -> None:
    (tmp_path / "img" / "10_sks dog").mkdir(parents=True)
    with pytest.raises(Error, match=r"(?s)no picture in this folder.*img/ \(a folder; give it, or name it"):
        usable_photos(tmp_path, [])


@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_a_photo_of_108_million_pixels(tmp_path: Path, suffix: str) -> None:
    """A phone's, in a process of its own: no warning, and of a JPEG never all pixels in memory."""
    size = (12000, 9000)
    path = tmp_path / f"a.{suffix}"
    if suffix == "jpg":
        tags = Image.Exif()
        tags[ORIENTATION] = 6
        Image.new("RGB", size, (200, 100, 50)).save(path, exif=tags, quality=50)
    else:
        Image.new("L", size, 100).save(path, compress_level=1)
    code = f"""
from pathlib import Path
from kcv2diffusers.dreambooth.photos import find_photos, read_photo
def peak():  # of ru_maxrss the process before this one would be a part
    status = Path("/proc/self/status")
    return int(status.read_text().split("VmHWM:")[1].split()[0]) * 1024 if status.exists() else 0
before = peak()
photo, = find_photos(Path({str(tmp_path)!r})).found
values = read_photo(photo, (576, 448))
print(photo.size, values.shape, round(float(values[..., 0].mean()), 2))
print(peak() - before)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    said, more = done.stdout.splitlines()
    if suffix == "jpg":
        assert said == "(12000, 9000) (576, 448, 3) 0.55"
        assert int(more) < 100e6
    else:
        assert said == "(9000, 12000) (576, 448, 3) -0.22"
        assert int(more) < 250e6


def test_a_large_photo_comes_as_a_small_one_does(tmp_path: Path) -> None:
    """What is read smaller, by JPEG's decoder or by averaging, is what scaling all of it gives."""
    y, x = np.mgrid[:1200, :1600] / 100
    waves = np.stack([np.sin(x), np.sin(y), np.sin(x + y)], -1)
    image = Image.fromarray(((waves + 1) * 127).astype("uint8"))
    wanted = np.asarray(ImageOps.fit(image, (128, 64), Image.Resampling.LANCZOS), "float32") / 127.5 - 1
    for name in ("a.jpg", "a.png"):
        image.save(tmp_path / name, quality=98, subsampling=0)
        size = tmp_path / name
        photo = Photo(size, (1200, 1600))
        assert np.abs(read_photo(photo, (64, 128)) - wanted).max() < 0.03


def test_a_bomb(tmp_path: Path) -> None:
    """A file of a few bytes that claims 900 million pixels."""
    data = b"\x89PNG\r\n\x1a\n"
    for chunk in (
        b"IHDR" + struct.pack(">LLBBBBB", 30000, 30000, 8, 2, 0, 0, 0),
        b"IDAT" + zlib.compress(bytes(9)),
    ):
        data += struct.pack(">L", len(chunk) - 4) + chunk + struct.pack(">L", zlib.crc32(chunk))
    (tmp_path / "a.png").write_bytes(data)
    assert find_photos(tmp_path).skipped == ["a.png (more than 300 million pixels)"]
    assert Image.MAX_IMAGE_PIXELS and Image.MAX_IMAGE_PIXELS < 100e6  # as others set it


def test_names_are_told_on_one_line(tmp_path: Path) -> None:
    (tmp_path / "a\x1b[2J\nkcv2diffusers: done\u202e.jpg").write_bytes(b"")
    notes: list[str] = []
    with pytest.raises(Error) as error:
        usable_photos(tmp_path, notes)
    assert "a\\x1b[2J\\nkcv2diffusers: done\\u202e.jpg (not a picture)" in notes[0]
    assert len(str(error.value).splitlines()) == 2


def test_what_is_no_file_or_no_folder(tmp_path: Path) -> None:
    os.mkfifo(tmp_path / "pipe.jpg")
    (tmp_path / "link.jpg").symlink_to("nowhere")
    assert find_photos(tmp_path).skipped == ["link.jpg (not a file)", "pipe.jpg (not a file)"]
    (tmp_path / "dog.jpg").write_bytes(b"")
    with pytest.raises(Error, match=r"dog.jpg: a file, not a folder\.\nGive the folder"):
        find_photos(tmp_path / "dog.jpg")


def test_a_folder_that_may_not_be_read(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(path):
        raise PermissionError(13, "Permission denied", str(path))

    for name in ("is_dir", "iterdir"):  # of its parent, of itself
        with monkeypatch.context() as patch, pytest.raises(Error) as error:
            patch.setattr(Path, name, refuse)
            find_photos(tmp_path)
        assert str(error.value).startswith(f"{tmp_path}: cannot be read: Permission denied.\n")


def test_a_picture_without_pixels(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    Image.new("RGB", (8, 8)).save(tmp_path / "a.png")
    monkeypatch.setattr(Image, "open", lambda path: Image.new("RGB", (0, 8)))
    assert find_photos(tmp_path).skipped == ["a.png (no pixels)"]


@pytest.mark.parametrize("size", [(1, 1), (1, 2000), (2000, 1), (3, 2)])
@pytest.mark.parametrize("suffix", ["jpg", "png"])
def test_tiny_and_long_photos(tmp_path: Path, size: tuple[int, int], suffix: str) -> None:
    Image.new("RGB", size, (200, 200, 200)).save(tmp_path / f"a.{suffix}")
    photo = only(tmp_path)
    assert photo.size == size[::-1]
    bucket = bucket_of(photo.size, 128)
    values = read_photo(photo, bucket, place=(0.9, 0.1))
    assert values.shape == (*bucket, 3) and abs(float(values.mean()) - (200 / 127.5 - 1)) < 0.02
