"""The Train tab in headless Chromium: the tiny base trained, stopped, resumed and exported."""

from __future__ import annotations

import re
import shutil
from pathlib import Path

from PIL import Image
from support.app.serving import NEEDS, serving
from support.hub.hub import Hub

import kcv2diffusers
from kcv2diffusers.sources.locate import TINY, locate

pytest_plugins = ["support.hub.fixtures"]
pytestmark = NEEDS


def test_from_photos_to_a_single_file(hub: Hub, tmp_path: Path) -> None:
    photos = [
        Path(shutil.copy(path, tmp_path)) for path in sorted((locate(TINY) / "subject").glob("*.png"))[:3]
    ]
    turned = tmp_path / "turned.jpg"
    exif = Image.Exif()
    exif[0x0112] = 6
    Image.new("RGB", (300, 100), "red").save(turned, exif=exif)
    broken = tmp_path / "broken.png"
    broken.write_bytes(b"no picture")
    with serving(hub, tmp_path) as app:
        told = app.drive("drive_train", tmp_path, *photos, turned, broken)
    assert (told["errors"], told["elsewhere"], told["nameless"]) == ([], [], [])
    assert max(told["over"]) <= 0, "wider than the window"
    assert "Memory for Stable Diffusion 1: 4." in told["cost"] and " MB of weights" in told["tiny"]
    photos_said = told["photos"].splitlines()
    assert photos_said[:2] == ["4 photos.", "Not used: broken.png (not a picture)."]
    assert photos_said[-1] == "turned.jpg: 100 x 300, trained at 64 x 64, 67% cropped", "upright"
    stopped = re.fullmatch(r"Stopped after step (\d+)\. Resume goes on\. Export .*", told["stopped"])
    assert stopped and int(stopped[1]) > 0
    assert told["finished"].startswith(f"Finished after step {int(stopped[1]) + 10}.")
    assert told["verdict"].startswith("Verified: weights, modules, images")
    assert told["waits"] == "" and len(told["theirs"].splitlines()) == 4, "it ran after the training"
    assert told["files"] == [[200, 404], [404, 200]], "each visitor's files are theirs"
    parts = {part.part: part for part in kcv2diffusers.inspect(tmp_path / "model.safetensors")}
    assert {"unet", "text_encoder", "vae_decoder"} <= parts.keys()
    assert list(app.work.iterdir()) == [], "temporary files are left"
