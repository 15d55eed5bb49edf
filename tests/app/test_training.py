"""What the Train tab shows: the costs of presets, photos in their buckets, the losses of a run."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any
from xml.etree import ElementTree

import pytest
from PIL import Image

from kcv2diffusers.app.loss_chart import loss_chart
from kcv2diffusers.app.presets import PRESETS, cost, duration, memory
from kcv2diffusers.app.training_run import Training, options, progress
from kcv2diffusers.dreambooth.config import make_config
from kcv2diffusers.sources.locate import TINY

UNET, TEXT_ENCODER, DECODER = 859_520_964, 123_060_480, 49_490_199  # weights of Stable Diffusion 1.5
NEEDED = {"base": ["tiny"], "instance_images": "x", "instance_prompt": "x", "out": "x"}


def test_memory_is_that_of_the_released_model() -> None:
    models = 4 * (UNET + TEXT_ENCODER + DECODER)
    assert memory(PRESETS["All weights"], "") == models + 3 * 4 * UNET
    assert memory(PRESETS["All weights, little memory"], "") == models + 1.5 * 4 * UNET
    both = memory(PRESETS["All weights and the text encoder"], "")
    assert both == models + 3 * 4 * (UNET + TEXT_ENCODER)
    assert models < memory(PRESETS["LoRA"], "") < models + 50e6
    assert 50e6 < memory(PRESETS["Tiny base"], TINY) < 200e6


@pytest.mark.parametrize("name", PRESETS)
def test_presets_are_options(name: str) -> None:
    assert make_config({**NEEDED, **PRESETS[name].options}).steps == PRESETS[name].options["steps"]
    said = cost(PRESETS[name], "", 400, None)
    assert len(said.splitlines()) == 3 and "GB" in said and "from the first steps on" in said
    assert "about 13 min" in cost(PRESETS[name], "", 400, 0.5)


def test_durations() -> None:
    assert [duration(s) for s in (5.2, 120, 7200)] == ["5 s", "2 min", "2.0 h"]


def test_words() -> None:
    training = Training(Path("x"), {"base": ["tiny://"], "sample_prompt": ["-a", "b"], "seed": 0}, 50)
    assert training.words(resume=True, export=True) == [
        "dreambooth", "--base=tiny://", "--sample-prompt=-a", "--sample-prompt=b", "--seed=0", "--steps=50",
        "--out=run", "--sample-every=10", "--resume", "--export", "pipeline", "--json",
    ]  # fmt: skip
    assert options({"a_b": True, "c": False, "d": "", "e": None, "f": 1.5}) == ["--a-b", "--f=1.5"]


def test_losses_go_on_after_the_log(tmp_path: Path) -> None:
    training = Training(tmp_path, {}, 50)
    said = [
        "Drawing the class 4/4",
        "Training 2/50 loss 0.9  1.00 steps/s",
        "Training 9/50 loss 0.2  2.50 steps/s",
    ]
    assert training.losses(said) == [(2, 0.9), (9, 0.2)] and training.step == 0
    run = tmp_path / "run"
    (run / "checkpoints" / "step-000004").mkdir(parents=True)
    (run / "checkpoints" / ".step-000009.tmp-1").mkdir()
    (run / "log.csv").write_text("step,loss,seconds\n3,0.5,1\n4,0.25,2\n")
    assert training.losses(said) == [(3, 0.5), (4, 0.25), (9, 0.2)] and training.step == 4
    (run / "log.csv").write_text("step,loss,seconds\n3,")
    assert training.losses() == []
    found = progress(said[-1])
    assert found is not None and (found.steps, found.rate) == (50, 2.5)
    assert progress("Training") is None


def test_the_chart() -> None:
    assert loss_chart([]) == loss_chart([(1, 0.5)]) == ""
    picture = ElementTree.fromstring(loss_chart([(step, 1 / step) for step in range(1, 5001)]))
    assert picture.attrib["aria-label"].startswith("Loss from step 9 to 5000, now 0.0002")
    line = picture.find("polyline")
    assert line is not None and 250 <= len(line.attrib["points"].split()) <= 300
    assert "nan" not in loss_chart([(1, 0.0), (2, 0.0)])


def shown(folder: Path, side: int = 512) -> Any:
    done = subprocess.run(
        [sys.executable, "-m", "kcv2diffusers.app.photos", "photos", "shown", str(side)],
        cwd=folder, env=os.environ, capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout)


def test_photos_are_upright_and_cropped(tmp_path: Path) -> None:
    (tmp_path / "photos").mkdir()
    exif = Image.Exif()
    exif[0x0112] = 6
    picture = Image.new("RGB", (1200, 800), "blue")
    picture.paste("red", (0, 0, 600, 800))
    picture.save(tmp_path / "photos" / "a.jpg", exif=exif)
    Image.new("RGB", (640, 640)).save(tmp_path / "photos" / "b.png")
    (tmp_path / "photos" / "b.txt").write_text("a sks dog")
    (tmp_path / "photos" / "c.png").write_bytes(b"x")
    found = shown(tmp_path)
    assert [each["caption"] for each in found["photos"]] == [
        "a.jpg: 800 x 1200, trained at 384 x 640, 10% cropped",
        "b.png: 640 x 640, trained at 512 x 512; a sks dog",
    ]
    assert found["count"] == 2 and found["skipped"] == ["c.png (not a picture)"]
    small = Image.open(tmp_path / found["photos"][0]["file"]).convert("RGB")
    assert small.height > small.width
    top: Any = small.getpixel((small.width // 2, 5))
    assert top[0] > 200 and top[2] < 60, "the left of the file is the top of the photo"
