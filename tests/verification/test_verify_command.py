"""`kcv2diffusers verify` as it is run: processes, exit code, report, and what it imports."""

from __future__ import annotations

import json
import os
import re
import signal
import subprocess
import sys
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.checkpoints import ROOT, cached
from support.frameworks import HEAVY
from support.waiting import LONG, until

from kcv2diffusers import convert, verify
from kcv2diffusers.errors import Error
from kcv2diffusers.verification import exchange
from kcv2diffusers.verification.chart import log_chart
from kcv2diffusers.verification.exchange import run_side

ENVIRONMENT = {**os.environ, "KERAS_BACKEND": "torch", "COLUMNS": "80"}
HOSTILE = "<img src=x onerror=alert(1)>"


def cli(*arguments: str | Path, **environment: str) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [sys.executable, "-m", "kcv2diffusers", *map(str, arguments)],
        cwd=ROOT,
        env=ENVIRONMENT | environment,
        capture_output=True,
        text=True,
        check=False,
    )


@pytest.fixture(scope="module")
def tiny(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("tiny") / "pipeline"
    convert("tiny://", out=folder)
    return folder


class Page(HTMLParser):
    """What a page holds and what it would fetch."""

    def __init__(self, text: str) -> None:
        super().__init__()
        self.tags: list[str] = []
        self.links: list[str] = []
        self.text = ""
        self.feed(text)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.tags.append(tag)
        self.links += [value or "" for name, value in attrs if name in ("src", "href", "srcset", "data")]
        assert not any(name.startswith("on") for name, _ in attrs)

    def handle_data(self, data: str) -> None:
        self.text += data


@pytest.mark.slow
def test_to_the_pictures_with_a_report(tiny: Path, tmp_path: Path) -> None:
    report = tmp_path / "report"
    prompts = ["a red car in a meadow", "a panda in the snow"]
    chosen = [word for prompt in prompts for word in ("--prompt", prompt)]
    arguments = ["verify", tiny, "tiny://", *chosen, "--steps", "3", "--seeds", "1", "--guidance", "5"]
    done = cli(*arguments, "--json", "--report", report)
    assert done.returncode == 0, done.stderr
    told = json.loads(done.stdout)
    assert told["passed"] and told["reason"] == "verified: weights, modules, images"
    assert told["images"]["runs"][1]["prompt"] == prompts[1]
    assert json.loads((report / "report.json").read_text()) == told
    assert "Keras side: steps 3/3" in done.stderr and "diffusers side: steps 6/6" in done.stderr
    assert {"keras", "Keras backend", "torch", "diffusers", "kcv2diffusers"} <= told["versions"].keys()
    hashes = {Path(entry["path"]).name: entry["sha256"] for entry in told["inputs"]}
    assert re.fullmatch("[0-9a-f]{64}", hashes["unet.weights.h5"]) and "model_index.json" in hashes

    text = (report / "report.html").read_text()
    page = Page(text)
    assert page.tags.count("img") == 6 and page.tags.count("polyline") == 2
    assert all(link.startswith("data:image/png;base64,") for link in page.links) and len(page.links) == 6
    assert not {"script", "link", "iframe", "object"} & set(page.tags)
    assert "url(" not in text and "@import" not in text and "default-src 'none'" in text
    assert "prefers-color-scheme: dark" in text and "width=device-width" in text
    for words in (
        "Verified",
        *prompts,
        "kcv2diffusers verify …/",
        "down_blocks.0.attentions.0",
        hashes["unet.weights.h5"],
    ):
        assert words in page.text, words
    places = {str(path) for path in (tmp_path, tiny.parent, Path(sys.prefix), ROOT)}
    assert not [place for place in places if place in text]
    # The command is the one that was given.
    again = cli(*told["command"].split()[1:4], "--level", "weights")
    assert again.returncode == 0 and "Verified: weights" in again.stdout


def test_a_failure_is_one_line_and_escaped(tiny: Path, tmp_path: Path) -> None:
    """Names come from files that anybody may have made."""
    pipeline = tmp_path / HOSTILE.replace("/", "") / "pipeline"
    convert("tiny://", out=pipeline)
    file = pipeline / "unet/diffusion_pytorch_model.safetensors"
    save_file({**load_file(file), HOSTILE: np.zeros(2, "float32")}, file, {"format": "pt"})
    done = cli("verify", pipeline, "tiny://", "--level", "weights", "--report", tmp_path / "report")
    assert done.returncode == 1
    *_, last = done.stderr.splitlines()
    assert last == f"kcv2diffusers: not verified: weights: unet: {HOSTILE}: has no source"
    text = (tmp_path / "report" / "report.html").read_text()
    assert HOSTILE not in text and "img" not in Page(text).tags and HOSTILE in Page(text).text


def test_weights_import_no_framework(tiny: Path) -> None:
    code = f"""
import sys
from kcv2diffusers import verify
assert verify({str(tiny)!r}, "tiny://", level="weights").passed
print(sorted({{name.partition(".")[0] for name in sys.modules}} & {{*{HEAVY!r}, "skimage", "jinja2", "PIL"}}))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"


@pytest.mark.slow
def test_convert_verifies(tmp_path: Path) -> None:
    report = tmp_path / "report"
    out = tmp_path / "out"
    text = ROOT / "kcv2diffusers" / "tiny" / "text_encoder.weights.h5"
    done = cli("convert", text, "--base", "none", "--out", out, "--verify", "--report", report)
    assert done.returncode == 0, done.stderr
    assert "Verified: weights, modules" in done.stdout and (report / "report.html").is_file()
    refused = cli("convert", text, "--base", "none", "--out", tmp_path / "x", "--report", report)
    assert refused.returncode == 1 and "give that as well" in refused.stderr
    refused = cli(
        "convert", text, "--base", "none", "--out", tmp_path / "x", "--verify", "--report", __file__
    )
    assert refused.returncode == 1 and "is a file" in refused.stderr
    assert not (tmp_path / "x").exists()


def test_what_is_missing_is_said(tiny: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """Before anything takes long: a package, or a folder that is none."""
    with monkeypatch.context() as patch:
        patch.setattr(exchange, "find_spec", lambda name: None if name == "skimage" else object())
        with pytest.raises(Error) as missing:
            verify(tiny, "tiny://")
    assert str(missing.value) == "scikit-image is not installed.\npip install 'kcv2diffusers[verify]'"
    done = cli("verify", tiny, "tiny://", "--report", __file__)
    assert done.returncode == 1 and "is a file" in done.stderr and len(done.stderr.splitlines()) == 2


@pytest.mark.slow
def test_an_interrupted_run_leaves_nothing(tiny: Path, tmp_path: Path) -> None:
    environment = ENVIRONMENT | {"TMPDIR": str(tmp_path), "PYTHONUNBUFFERED": "1"}
    command = [sys.executable, "-m", "kcv2diffusers", "verify", str(tiny), "tiny://", "--steps", "500"]
    child = subprocess.Popen(command, cwd=ROOT, env=environment, stderr=subprocess.PIPE, text=True)
    assert child.stderr is not None
    for line in child.stderr:
        if line.startswith("Keras side: parts"):
            break
    (side,) = Path(f"/proc/{child.pid}/task/{child.pid}/children").read_text().split()
    child.send_signal(signal.SIGTERM)
    assert child.wait(LONG) == 128 + signal.SIGTERM
    until(lambda: not Path(f"/proc/{side}").exists())
    assert not list(tmp_path.glob("kcv2diffusers-verify-*"))


@pytest.mark.parametrize(
    ("code", "kind", "message"),
    [
        ("import os, signal; os.kill(os.getpid(), signal.SIGKILL)", Error, "lack of memory"),
        ("raise ValueError('of a library')", RuntimeError, "ValueError: of a library"),
    ],
)
def test_a_side_that_dies(
    code: str, kind: type[Exception], message: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    start = subprocess.Popen
    command = [sys.executable, "-c", code]
    monkeypatch.setattr(subprocess, "Popen", lambda _, **options: start(command, **options))
    with pytest.raises(kind, match=message):
        run_side("keras_side", "Keras side", tmp_path, lambda *_: None)


def test_chart() -> None:
    """Whole powers of ten; what is off the scale lies on its edge."""
    chart = log_chart({"one": [1e-6, 1e-4], "other": [0.0, float("inf")]})
    assert [label for _, label in chart.y_ticks] == [f"1e{n}" for n in range(-8, 3)]
    points = [tuple(map(float, point.split(","))) for point in chart.lines["other"].split()]
    assert points == [(chart.left, chart.bottom), (chart.right, chart.top)]
    assert log_chart({"one": [1e-5]}).x_ticks == [(342.0, "1")]


@pytest.mark.slow
def test_kerascv_as_the_reference(bpe: Path, tmp_path: Path) -> None:
    """`--reference keras-cv` with small models of KerasCV's own blocks in place of its classes, whose one
    size takes minutes: KerasCV's loop, tokenizer and blocks against stock diffusers.
    """
    source = cached("keras3-torch", "sample.py", "1", str(bpe)) / "parts"
    convert(source, out=tmp_path / "pipeline", tokenizer=bpe)
    code = f"""
import sys
sys.path[:0] = [{str(ROOT / "tests" / "support" / "kerascv")!r}]
from functools import partialmethod
import stack
from keras_cv.src.models.stable_diffusion.stable_diffusion import StableDiffusionBase
from kcv2diffusers import verify
from kcv2diffusers.verification import diffusers_side, keras_side, kerascv, run
from kcv2diffusers.verification.request import Request

embedding = StableDiffusionBase._get_timestep_embedding
StableDiffusionBase._get_timestep_embedding = partialmethod(embedding, dim=32)
kerascv.build = lambda side, size: stack.build(side.part, 1, size=size, vocabulary=49408)
run._check_reference = lambda *_: None
sides = {{"keras_side": keras_side, "diffusers_side": diffusers_side}}
run.run_side = lambda name, _, folder, progress, __: sides[name].run(folder, Request.load(folder), progress)
options = dict(reference="keras-cv", size=128, steps=3, seeds=1)
result = verify({str(tmp_path / "pipeline")!r}, {str(source)!r}, **options)
assert result.passed and len(result.modules) == 4 and "keras-cv" in result.versions, result.reason
assert result.images.runs[0].attributed.psnr > 61 and len(result.images.runs[0].stock.steps) == 3
"""
    environment = {**ENVIRONMENT, "TF_CPP_MIN_LOG_LEVEL": "3"}
    done = subprocess.run(
        [sys.executable, "-c", code], env=environment, capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr[-3000:]
