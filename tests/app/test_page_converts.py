"""The Convert and Inspect tabs in headless Chromium, from an upload to a pipeline on the Hub."""

from __future__ import annotations

import json
import os
import zipfile
from pathlib import Path
from urllib.error import HTTPError
from urllib.request import urlopen

import pytest
import yaml
from PIL import Image
from safetensors.numpy import load_file
from support.app.serving import NEEDS, serving
from support.hub.hub import ALICE, Hub
from support.loras import kohya as random_lora
from support.loras import save

import kcv2diffusers
from kcv2diffusers.publish.converter_space import converter_space
from kcv2diffusers.sources.locate import TINY, locate

pytest_plugins = ["support.hub.fixtures"]
pytestmark = NEEDS

PICTURE = "KCV2DIFFUSERS_PICTURE"  # environment variable: where to put the picture of the guide


def test_the_space_runs_its_own_copy(hub: Hub, tmp_path: Path) -> None:
    space = converter_space(tmp_path / "space", title="Ours", tags=["mine"])
    card = yaml.safe_load((space / "README.md").read_text().split("---\n")[1])
    assert {name: card[name] for name in ("title", "hf_oauth", "sdk", "app_file")} == {
        "title": "Ours", "hf_oauth": True, "sdk": "gradio", "app_file": "app.py",
    }  # fmt: skip
    assert {"read-repos", "write-repos", "manage-repos"} <= {*card["hf_oauth_scopes"]}
    assert "mine" in card["tags"]
    needs = {line.split(">")[0].split("<")[0] for line in (space / "requirements.txt").read_text().split()}
    assert {"torch", "diffusers", "keras", "huggingface-hub", "h5py"} <= needs and "gradio" not in needs
    with pytest.raises(kcv2diffusers.Error, match="exists already"):
        converter_space(space)
    page = space / "kcv2diffusers" / "app" / "page.py"
    page.write_text(page.read_text().replace('_TITLE = "kcv2diffusers"', '_TITLE = "The copy"'))
    with serving(hub, tmp_path, command=[space / "app.py"], PYTHONPATH="", NO_TRAIN="1") as app:
        config = urlopen(f"{app.url}config").read().decode()
    assert '"The copy"' in config and '"Convert"' in config and '"Train"' not in config
    converter_space(space, overwrite=True)
    (space / "mine.txt").write_text("x")
    with pytest.raises(kcv2diffusers.Error, match="not an earlier output"):
        converter_space(space, overwrite=True)


def test_from_an_upload_to_the_hub(hub: Hub, tmp_path: Path) -> None:
    tiny = locate(TINY)
    pipeline = kcv2diffusers.convert(TINY, out=tmp_path / "wanted").out
    theirs = save(random_lora(pipeline), tmp_path / "theirs.safetensors")
    lora = kcv2diffusers.convert_lora(theirs, out=tmp_path / "lora.safetensors").out
    with serving(hub, tmp_path) as app:
        told = app.drive(
            "drive_convert", tmp_path, ALICE, lora, tiny / "unet.weights.h5", tiny / "kcv2diffusers.json"
        )
        (locked,) = app.work.glob("*/.in-use")
        for path in (
            "/etc/hostname",
            locked,
            f"{app.work}/../app.log",
            locked.parent / "gradio" / ".." / ".in-use",
        ):
            with pytest.raises(HTTPError, match=r"403|404"):
                urlopen(f"{app.url}gradio_api/file={path}")
    assert (told["errors"], told["elsewhere"], told["nameless"]) == ([], [], [])
    assert max(told["over"]) <= 0, "wider than the window"
    assert told["verdict"].startswith("Verified: weights, modules, images") and "PSNR" in told["verdict"]
    assert told["recognised"].startswith("UNet SD1; ") and "\n" not in told["recognised"]
    assert "text encoder" in told["missing"] and "They would come from tiny://" in told["missing"]
    assert told["pictures"] == [64, 64, 64]
    assert f"{hub.url}/alice/from-the-page" in told["published"]
    assert len(told["inspected"].splitlines()) == 4 and "tensors" in told["details"]

    with zipfile.ZipFile(tmp_path / "pipeline.zip") as packed:
        names = packed.namelist()
        packed.extractall(tmp_path / "unpacked")
    assert "model_index.json" in names and "verification.json" not in names
    assert str(tmp_path / "work") not in (tmp_path / "unpacked" / "conversion.json").read_text()
    weights = Path("unet", "diffusion_pytorch_model.safetensors")
    assert (tmp_path / "unpacked" / weights).read_bytes() == (pipeline / weights).read_bytes()
    assert {part.part for part in kcv2diffusers.inspect(tmp_path / "model.safetensors")} >= {"unet"}

    assert load_file(tmp_path / "kohya.safetensors").keys() == load_file(theirs).keys()
    if picture := os.environ.get(PICTURE):
        Image.open(tmp_path / "convert-light.png").quantize(64).save(picture, optimize=True)

    state = hub.ask("state")
    assert "alice/from-the-page" in json.dumps(state)
    for place in (told["text"], app.log.read_text()):
        assert ALICE not in place and str(app.work) not in place and str(tiny) not in place
    assert list(app.work.iterdir()) == [], "temporary files are left"
