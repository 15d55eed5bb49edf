"""Pictures of the class and of prompts are drawn some at a time, in the precision of the run."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image
from support.checkpoints import small_base

from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.dreambooth.drawings import Drawings, samples
from kcv2diffusers.dreambooth.examples import class_photos
from kcv2diffusers.models.base import Base, open_base
from kcv2diffusers.models.sampler import TextToImage

pytestmark = pytest.mark.slow

PROMPTS = ["a red car", "a tree", "a car", "a red tree", "a"]


@pytest.fixture(scope="module")
def bases() -> dict[str, Base]:
    files = open_base(small_base())
    return {precision: files.load(dtype=precision) for precision in ("float32", "mixed_bfloat16")}


@pytest.fixture
def sizes(monkeypatch: pytest.MonkeyPatch) -> list[int]:
    """How many pictures each call of the sampler drew."""
    found: list[int] = []
    denoise = TextToImage.denoise

    def noted(self: TextToImage, context: Any, noise: Any, **options: Any) -> Any:
        found.append(len(noise))
        return denoise(self, context, noise, **options)

    monkeypatch.setattr(TextToImage, "denoise", noted)
    return found


def drawn(path: Path) -> np.ndarray:
    return np.asarray(Image.open(path), dtype="float32")


def test_prompts_are_drawn_some_at_a_time(bases: dict[str, Base], sizes: list[int], tmp_path: Path) -> None:
    """And look as if all were drawn at once, each from its own noise."""
    pictures = []
    for at_once in (5, 2):
        config = Config(
            out=str(tmp_path / str(at_once)), sample_prompt=PROMPTS, sample_steps=2, sample_batch_size=at_once
        )
        Drawings(config, bases["float32"].sampler(), 64).draw(1)
        pictures.append(drawn(samples(tmp_path / str(at_once), 1)))
    assert sizes == [5, 2, 2, 1]
    # Sums in batches of another size differ in the last bits; other noise would differ by a hundred.
    assert np.abs(pictures[0] - pictures[1]).max() <= 8


def test_class_pictures_are_drawn_some_at_a_time_in_16_bits(
    bases: dict[str, Base], sizes: list[int], tmp_path: Path
) -> None:
    pictures = {}
    for precision, base in bases.items():
        config = Config(
            out=str(tmp_path / precision), class_prompt="a car", num_class_images=5, sample_batch_size=2,
            sample_steps=2, precision=precision,
        )  # fmt: skip
        photos = class_photos(config, base, [], lambda *_: None)
        pictures[precision] = np.stack([drawn(photo.path) for photo in photos])
    assert sizes == [2, 2, 1] * 2
    difference = np.abs(pictures["float32"] - pictures["mixed_bfloat16"])
    assert len(difference) == 5
    assert difference.max() > 0, "computed in float32"
    assert difference.mean() < 0.1 * pictures["float32"].std()


def test_without_the_option_it_is_the_batch_size(
    bases: dict[str, Base], sizes: list[int], tmp_path: Path
) -> None:
    config = Config(out=str(tmp_path), class_prompt="a car", num_class_images=4, batch_size=3, sample_steps=1)
    class_photos(config, bases["float32"], [], lambda *_: None)
    assert sizes == [3, 1]
