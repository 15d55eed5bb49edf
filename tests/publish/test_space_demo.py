"""The Space's folder, and its app: started as a Space does, driven in headless Chromium on the tiny base."""

from __future__ import annotations

import json
import os
import shutil
import socket
import subprocess
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from urllib.error import URLError
from urllib.request import urlopen

import numpy as np
import pytest
import yaml
from PIL import Image
from support.checkpoints import ROOT
from support.waiting import LONG, until

import kcv2diffusers
from kcv2diffusers.publish.space import GRADIO, space
from kcv2diffusers.sources.locate import TINY

pytestmark = pytest.mark.slow

PYTHON = ROOT / ".venv-space" / "bin" / "python"
PROMPTS = ["a fox in the snow", "a red car in a meadow"]


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("space") / "pipeline"
    kcv2diffusers.convert(TINY, out=out)
    return out


def test_folder(pipeline: Path, tmp_path: Path) -> None:
    out = space(pipeline, "alice/tiny", out=tmp_path / "demo", tags=["keras-dreambooth"], prompts=PROMPTS)
    card = yaml.safe_load((out / "README.md").read_text().split("---\n")[1])
    assert card == {
        "title": "tiny", "sdk": "gradio", "sdk_version": GRADIO, "app_file": "app.py",
        "license": "apache-2.0", "models": ["alice/tiny"],
        "tags": ["stable-diffusion", "text-to-image", "keras", "keras-dreambooth"],
    }  # fmt: skip
    needs = (out / "requirements.txt").read_text().split()
    assert [line.partition(">")[0] for line in needs] == ["accelerate", "diffusers", "torch", "transformers"]
    with pytest.raises(kcv2diffusers.Error, match="exists already"):
        space(pipeline, "alice/tiny", out=out)
    space(pipeline, "alice/other", out=out, title='Foxes & "cars"', overwrite=True)
    demo = json.loads((out / "demo.json").read_text())
    assert (demo["model"], demo["title"], demo["variant"]) == ("alice/other", 'Foxes & "cars"', None)
    (out / "mine.txt").write_text("x")
    with pytest.raises(kcv2diffusers.Error, match="not an earlier output"):
        space(pipeline, "alice/other", out=out, overwrite=True)


def answers(url: str) -> bool:
    try:
        urlopen(url).close()
    except (URLError, ConnectionError):
        return False
    return True


@contextmanager
def running(folder: Path, model: Path) -> Iterator[str]:
    """The app's address, once it answers."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    environment = {
        **os.environ, "MODEL": str(model), "GRADIO_SERVER_PORT": str(port),
        "GRADIO_ANALYTICS_ENABLED": "False", "OMP_NUM_THREADS": "1",
    }  # fmt: skip
    url = f"http://127.0.0.1:{port}/"
    log = folder.parent / "app.log"
    with log.open("w") as file:
        app = subprocess.Popen([PYTHON, "app.py"], cwd=folder, env=environment, stdout=file, stderr=file)
    try:
        until(lambda: answers(url), app)
        yield url
    except BaseException:
        print(log.read_text())
        raise
    finally:
        app.terminate()
        app.wait()


@pytest.mark.skipif(
    not PYTHON.exists(), reason="needs Gradio and Playwright in .venv-space (make venv-space)"
)
@pytest.mark.skipif(shutil.which("chromium") is None, reason="needs Chromium (apt-get install chromium)")
def test_a_visitor(pipeline: Path, tmp_path: Path) -> None:
    demo = space(pipeline, "alice/tiny", out=tmp_path / "demo", title="Tiny", prompts=PROMPTS)
    seen = tmp_path / "seen"
    seen.mkdir()
    with running(demo, pipeline) as url:
        done = subprocess.run(
            [PYTHON, ROOT / "tests" / "support" / "hub" / "drive_demo.py", url, seen],
            capture_output=True, text=True, check=False, timeout=LONG,
        )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    assert json.loads(done.stdout) == {"errors": [], "title": "Tiny", "prompt": PROMPTS[0]}
    first, second, third = (
        np.asarray(Image.open(seen / f"{number}.png").convert("RGB")) for number in range(3)
    )
    assert first.shape == (64, 64, 3) and first.std() > 30
    assert np.array_equal(first, third) and not np.array_equal(first, second)
    red = (first[..., 0] > 150) & (first[..., 1] < 90)
    assert red.mean() > 0.05  # the car
    assert Image.open(seen / "page.png").size == (1200, 900)
