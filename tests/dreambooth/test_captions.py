"""Captions and masks beside photos are found, checked and belong to their photo; several subjects as well."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from kcv2diffusers.dreambooth.batches import Batches, Examples
from kcv2diffusers.dreambooth.config import Config, make_config
from kcv2diffusers.dreambooth.examples import subject_photos
from kcv2diffusers.dreambooth.photos import Photo, check_masks, find_photos, read_mask, read_photo
from kcv2diffusers.errors import Error


def draw(path: Path, size: tuple[int, int] = (64, 64), mode: str = "RGB", seed: int = 0) -> Path:
    """Width and height in `size`, as Pillow has them."""
    path.parent.mkdir(parents=True, exist_ok=True)
    channels = len(Image.new(mode, (1, 1)).getbands())
    shape = (*size[::-1], channels) if channels > 1 else size[::-1]
    values = np.random.default_rng(seed).integers(1, 255, shape, "uint8")
    Image.fromarray(values, mode).save(path)
    return path


@pytest.fixture
def folder(tmp_path: Path) -> Path:
    for name in ("a.png", "b.jpg", "c.png", "2_dog/d.png"):
        draw(tmp_path / name)
    return tmp_path


def prompts(folder: Path) -> dict[str, str]:
    return {photo.path.name: photo.prompt for photo in find_photos(folder).found}


def test_captions(folder: Path) -> None:
    """A text beside the photo goes before the metadata file, of the folder or of the one above."""
    (folder / "a.txt").write_text("\ufeffa sks dog\n  on a beach\n", encoding="utf-8")
    (folder / "b.txt").write_text(" \n")
    listed = {"b.jpg": "listed \u2028b", "a.png": "no", "2_dog/d.png": "d"}
    lines = [json.dumps({"file_name": n, "text": t, "n": 1}, ensure_ascii=False) for n, t in listed.items()]
    (folder / "metadata.jsonl").write_text("\n\n".join(lines))
    own = {"a.png": "a sks dog on a beach"}
    assert prompts(folder) == own | {"b.jpg": "listed b", "c.png": "", "d.png": "d"}
    assert find_photos(folder).skipped == []
    (folder / "2_dog" / "metadata.jsonl").write_text('{"file_name": "d.png", "text": "nearer"}\n')
    assert prompts(folder)["d.png"] == "nearer"


def test_captions_of_no_photo_are_named(folder: Path) -> None:
    (folder / "notes.txt").write_text("a dog")
    (folder / "metadata.jsonl").write_text('{"file_name": "gone\\u001b.png", "text": "gone"}')
    assert find_photos(folder).skipped == [
        "notes.txt (not a picture)",
        r"1 captions in metadata.jsonl of other pictures (gone\x1b.png)",
    ]


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.txt", b"\xff\xfe", "a caption that is not UTF-8"),
        ("a.txt", b"a" * 70_000, "this caption cannot be read: larger than 65536 bytes"),
        ("metadata.jsonl", b'{"file_name": "a.png"}\n{"text": "b"}', "line 2 is not the caption"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": 3}', "line 1 is not the caption"),
        ("metadata.jsonl", b'{"file_name": "a.png", "text": "\\ud800"}', "line 1 is not the caption"),
        ("metadata.jsonl", b"[" * 100_000, "line 1 is not the caption"),
        ("metadata.jsonl", b"[]", "line 1 is not the caption"),
    ],
)
def test_a_bad_caption(folder: Path, name: str, content: bytes, message: str) -> None:
    (folder / name).write_bytes(content)
    with pytest.raises(Error, match=message) as raised:
        find_photos(folder)
    assert len(str(raised.value).split("\n")) == 2


def test_prompts_of_subjects(folder: Path) -> None:
    other = draw(folder / "other" / "e.png").parent
    (folder / "a.txt").write_text("a sks dog on a beach")
    subject = {"instance_images": str(other), "instance_prompt": "a zwx cat"}
    needed = {"base": ["tiny"], "out": "run", "subjects": [subject]}
    own = {"instance_images": str(folder), "instance_prompt": "a sks dog"}
    notes: list[str] = []
    found = subject_photos(make_config(needed | own), notes)
    assert [(photo.path.name, photo.prompt, photo.repeats) for photo in found] == [
        ("a.png", "a sks dog on a beach", 1), ("b.jpg", "a sks dog", 1), ("c.png", "a sks dog", 1),
        ("d.png", "a sks dog", 2), ("e.png", "a zwx cat", 1),
    ]  # fmt: skip
    assert "1 of 5 photos have captions." in notes
    found = subject_photos(make_config(needed | own | {"captions": False}), [])
    assert {photo.prompt for photo in found} == {"a sks dog", "a zwx cat"}
    assert [photo.path.name for photo in subject_photos(make_config(needed), [])] == ["e.png"]


@pytest.mark.parametrize(
    ("subjects", "message"),
    [
        ('subjects = ["dog"]', r"subjects is \['dog'\]"),
        ("[subjects]\na = 1", "subjects is {'a': 1}"),
        ("[[subjects]]\nphotos = 'x'", "unknown entry photos of a subject"),
        ("[[subjects]]\ninstance_images = 1", "instance_images of a subject is 1"),
        ("[[subjects]]\ninstance_images = 'x'", "Subject 1 has no instance_prompt"),
        ("[[subjects]]\ninstance_prompt = 'x'", "Subject 1 has no instance_images"),
        (
            "[[subjects]]\ninstance_images = 'x'\ninstance_prompt = 'x'\nclass_images = 'x'",
            "Subject 1 has class_images and no class_prompt",
        ),
        (
            "instance_images = 'y'\n[[subjects]]\ninstance_images = 'x'\ninstance_prompt = 'x'",
            "--instance-prompt is needed",
        ),
    ],
)
def test_bad_subjects(tmp_path: Path, subjects: str, message: str) -> None:
    (tmp_path / "run.toml").write_text(subjects)
    with pytest.raises(Error, match=message) as raised:
        make_config({"base": ["tiny"], "out": "run"}, tmp_path / "run.toml")
    assert len(str(raised.value).split("\n")) == 2


def test_subjects_are_recorded(tmp_path: Path) -> None:
    """With their folders in the run, without them in what is published."""
    text = 'base = "tiny"\nout = "run"\n[[subjects]]\ninstance_images = "~/dog"\nclass_prompt = "a dog"\n'
    (tmp_path / "run.toml").write_text(text + 'instance_prompt = "a \\"sks\\" dog"\n')
    config = make_config({}, tmp_path / "run.toml")
    assert config.prior_preservation and config.subjects[0].instance_images == str(Path.home() / "dog")
    (tmp_path / "record.toml").write_text(config.toml())
    assert make_config({}, tmp_path / "record.toml") == config
    assert config.toml(public=True) == (
        'subjects = [{instance_prompt = "a \\"sks\\" dog", class_prompt = "a dog"}]\n'
    )


def test_masks_are_found_and_shown_as_their_photo(tmp_path: Path) -> None:
    """A photo of colours and a mask of its brightness: cropped, scaled and flipped alike."""
    photo, mask = draw(tmp_path / "a.png", (130, 70), "L"), tmp_path / "a-mask.png"
    mask.write_bytes(photo.read_bytes())
    draw(tmp_path / "b.png")
    draw(tmp_path / "b-mask.jpg")
    found = find_photos(tmp_path)
    assert [(each.path.name, each.mask) for each in found.found] == [
        ("a.png", mask), ("b-mask.jpg", None), ("b.png", None),
    ]  # fmt: skip
    size = (64, 128)
    for view in ({}, {"place": (0.1, 0.9)}, {"flip": True}):
        pixels = (read_photo(found.found[0], size, **view)[..., 0] + 1) / 2
        expected = [[pixels[y : y + 8, x : x + 8].mean() for x in range(0, 128, 8)] for y in range(0, 64, 8)]
        weights = read_mask(found.found[0], size, **view)
        assert weights.shape == (8, 16, 1)
        np.testing.assert_allclose(weights[..., 0], expected, atol=1e-6)
    assert (read_mask(found.found[1], (64, 64)) == 1).all()
    assert check_masks(found.found) == 1


def test_opacity_is_a_mask(tmp_path: Path) -> None:
    values = np.zeros((64, 64, 4), "uint8")
    values[16:48, :32] = 255
    Image.fromarray(values).save(tmp_path / "a.png")
    Image.fromarray(values).convert("P").save(tmp_path / "b.png", transparency=0)
    photos = find_photos(tmp_path).found
    weights = read_mask(photos[0], (64, 64))[..., 0]
    assert (weights[2:6, :4] == 1).all() and weights.sum() == 16
    assert check_masks(photos) == 2


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda path: draw(path, (64, 65)), "this mask has 64 x 65 pixels, its photo 64 x 64"),
        (lambda path: Image.new("L", (64, 64)).save(path), "masks all of the photo"),
        (lambda path: path.write_bytes(b"mask"), "this mask cannot be used: not a picture"),
    ],
    ids=["size", "black", "damaged"],
)
def test_a_bad_mask(tmp_path: Path, make: Any, message: str) -> None:
    draw(tmp_path / "a.png")
    make(tmp_path / "a-mask.png")
    config = Config(instance_images=str(tmp_path), instance_prompt="a dog")
    notes: list[str] = []
    subject_photos(config, notes)
    assert notes == ["1 of 1 photos have masks, which are not used without --masks."]
    with pytest.raises(Error, match=message) as raised:
        subject_photos(Config(instance_images=str(tmp_path), instance_prompt="a dog", masks=True), [])
    assert len(str(raised.value).split("\n")) == 2


def examples(count: int, **options: Any) -> Examples:
    photos = [Photo(Path(f"{number}.png"), (64, 64), prompt="sks") for number in range(count)]
    found = Examples(photos, {"": np.zeros(1), "sks": np.ones(1)}, None, 64, **options)
    found._moments = {(number, (64, 64), False): np.zeros((8, 8, 8), "float32") for number in range(count)}
    return found


def test_caption_dropout_is_a_function_of_seed_and_step() -> None:
    """The share is right, other draws stay as they were, and a resumed run drops the same."""
    made = {
        share: Batches(examples(4), examples(3), batch_size=4, steps=200, seed=3, caption_dropout=share)
        for share in (0.0, 0.25, 1.0)
    }
    kept = np.concatenate([made[0.25].step(number)["condition"][:, 0] for number in range(200)])
    assert 0.7 < kept.mean() < 0.8 and set(kept) == {0, 1}
    assert 0.65 < kept.reshape(200, 8)[:, :4].mean() < 0.85  # of the photos as well as of the class
    assert all((made[share].step(5)["condition"] == 1 - share).all() for share in (0.0, 1.0))
    for name in ("latents", "noise", "timesteps"):
        np.testing.assert_array_equal(made[0.25].step(7)[name], made[0.0].step(7)[name])
    resumed = Batches(
        examples(4), examples(3), batch_size=4, steps=200, start=7, seed=3, caption_dropout=0.25
    )
    np.testing.assert_array_equal(resumed[0][0]["condition"], made[0.25].step(7)["condition"])


def test_masks_have_mean_1(tmp_path: Path) -> None:
    """Of a crop that is masked all of it nothing is learnt; class images have no masks."""
    half = np.zeros((64, 64), "uint8")
    half[:, 40:] = 200
    Image.fromarray(half).save(tmp_path / "a-mask.png")
    photo = Photo(tmp_path / "a.png", (64, 64), mask=tmp_path / "a-mask.png", prompt="sks")
    mine = examples(1, masked=True)
    mine.photos = [photo]
    step = Batches(mine, examples(1), batch_size=1, steps=1).step(0)
    assert step["mask"].shape == (2, 8, 8, 1) and step["mask"].dtype == np.float32
    expected = np.tile([0, 0, 0, 0, 0, 8 / 3, 8 / 3, 8 / 3], (8, 1))
    np.testing.assert_allclose(step["mask"][0, :, :, 0], expected, rtol=1e-6)
    assert (step["mask"][1] == 1).all()
    mine.cache = False
    assert (mine.mask(0, (64, 64), (True, (0.5, 0.5)))[:, :3] > 0).all()
    Image.fromarray(0 * half).save(tmp_path / "a-mask.png")
    assert (mine.mask(0, (64, 64), (False, (0.5, 0.5))) == 0).all()
