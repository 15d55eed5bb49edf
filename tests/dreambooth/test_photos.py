"""Photos as people have them: turned, transparent, grey, broken; and the sizes they are trained at."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from PIL import Image

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
    assert [line.split(" ")[0] for line in found.skipped] == ["cut.png", "empty.jpg", "notes.txt"]
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
