"""Publishing on a Hub of the test's own: what is sent, what is refused, what comes back."""

from __future__ import annotations

import filecmp
import json
import os
import re
import shutil
import signal
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest
import yaml
from support import keras_hub
from support.hub.hub import ALICE, BOB, READER, Hub

import kcv2diffusers
import kcv2diffusers.publish.push
from kcv2diffusers.errors import Error
from kcv2diffusers.hub.client import connect, redact
from kcv2diffusers.publish.card_facts import figures
from kcv2diffusers.publish.check import check
from kcv2diffusers.sources.locate import TINY, locate

pytest_plugins = ["support.hub.fixtures"]
UNET = "unet/diffusion_pytorch_model.safetensors"
TOKEN = {"HF_TOKEN": ALICE}


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("made") / "pipeline"
    kcv2diffusers.convert(TINY, out=out)
    return out


@pytest.fixture
def pipeline(made: Path, tmp_path: Path) -> Path:
    """A pipeline of the test's own."""
    return Path(shutil.copytree(made, tmp_path / "pipeline"))


def card(hub: Hub, repo: str) -> tuple[dict[str, Any], str]:
    """Metadata and text of a repository's card."""
    text = contents(hub, repo, "README.md").decode()
    _, metadata, body = text.split("---\n", 2)
    return yaml.safe_load(metadata), body


def contents(hub: Hub, repo: str, name: str, token: str = ALICE) -> bytes:
    import urllib.request

    request = urllib.request.Request(f"{hub.url}/{repo}/resolve/main/{name}")
    request.add_header("Authorization", f"Bearer {token}")
    with urllib.request.urlopen(request) as answer:
        return bytes(answer.read())


@pytest.mark.slow
def test_create_again_and_changed(hub: Hub, pipeline: Path, tmp_path: Path) -> None:
    (pipeline / "notes.txt").write_text("not of a pipeline")
    told = hub.does("push", pipeline, "alice/tiny", **TOKEN)
    assert f"14 files: {hub.url}/alice/tiny" in told and "notes.txt" in told
    weights = sum(path.stat().st_size for path in pipeline.rglob("*.safetensors"))
    assert hub.uploaded() == weights
    local = {path.relative_to(pipeline).as_posix() for path in pipeline.rglob("*.*")} - {"notes.txt"}
    assert set(hub.ask("state")["alice/tiny"]["heads"]["main"]) == {*local, "README.md"}

    commits = len(hub.ask("state")["alice/tiny"]["messages"])
    assert "Nothing had changed" in hub.does("push", pipeline, "tiny", **TOKEN)  # a name of one's own
    log = hub.log()
    assert not [entry for entry in log if entry["method"] == "PUT" or "/commit/" in entry["path"]]
    assert len(hub.ask("state")["alice/tiny"]["messages"]) == commits

    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text().replace("leading", "linspace"))
    told = json.loads(hub.does("push", pipeline, "alice/tiny", "--message", "Other steps", "--json", **TOKEN))
    assert told["changed"] == ["scheduler/scheduler_config.json"] and told["card"] == "kept"
    assert hub.uploaded() == 0
    assert hub.ask("state")["alice/tiny"]["messages"][-1] == "Other steps"

    # Back again, byte for byte.
    code = "from huggingface_hub import snapshot_download; print(snapshot_download('alice/tiny'))"
    done = subprocess.run(
        [sys.executable, "-c", code], env=hub.environment(), capture_output=True, text=True, check=True
    )
    back = Path(done.stdout.strip())
    names = [
        n
        for n in hub.ask("state")["alice/tiny"]["heads"]["main"]
        if n not in ("README.md", "conversion.json")
    ]
    assert len(names) == 12
    assert all(filecmp.cmp(pipeline / name, back / name, shallow=False) for name in names)


@pytest.mark.slow
def test_card(hub: Hub, pipeline: Path) -> None:
    hub.does("push", pipeline, "alice/card", "--trained-with", "linear-betas", **TOKEN)
    metadata, body = card(hub, "alice/card")
    assert metadata == {
        "license": "apache-2.0",  # the tiny base's own
        "library_name": "diffusers",
        "pipeline_tag": "text-to-image",
        "tags": ["stable-diffusion", "stable-diffusion-diffusers", "text-to-image", "diffusers", "keras"],
        "inference": True,
    }
    assert "trained with linear betas" in body and "approximation of the GELU" in body
    assert 'from_pretrained("alice/card")' in body
    digest = subprocess.run(
        ["sha256sum", locate(TINY) / "unet.weights.h5"], capture_output=True, text=True, check=True
    )
    assert f"| UNet | unet.weights.h5 (.weights.h5) | `{digest.stdout.split()[0]}` |" in body
    published = json.loads(contents(hub, "alice/card", "conversion.json"))
    assert "path" in json.loads((pipeline / "conversion.json").read_text())["parts"]["unet"]["files"][0]
    assert not re.search(r'"(path|modified)"|"/|\.\./', json.dumps(published))
    # Stated on the command line, and over what is there only if asked for.
    options = ("--license", "mit", "--base-model", "bob/base", "--trained-with", "old-image-encoder")
    assert "README.md was kept" in hub.does("push", pipeline, "alice/card", *options, **TOKEN)
    assert card(hub, "alice/card")[0] == metadata
    hub.does("push", pipeline, "alice/card", *options, "--overwrite-card", **TOKEN)
    changed, body = card(hub, "alice/card")
    assert (changed["license"], changed["base_model"]) == ("mit", "bob/base") and "linear betas" not in body
    (pipeline / "README.md").write_text("---\nlicense: mit\n---\nMine.\n")
    hub.does("push", pipeline, "alice/mine", **TOKEN)
    assert card(hub, "alice/mine") == ({"license": "mit"}, "Mine.\n")
    dry = hub.does("push", pipeline, "alice/dry", "--dry-run", "--overwrite-card")
    assert (
        "license: apache-2.0" in dry
        and "nothing was published" in dry
        and "alice/dry" not in hub.ask("state")
    )


@pytest.mark.slow
def test_stable_diffusion_3(hub: Hub, tmp_path: Path) -> None:
    """The card names its class, and what it lacks; the pipeline comes back as it is."""
    made = kcv2diffusers.convert(keras_hub.models() / "sd35l" / "task", out=tmp_path / "dog").out
    assert "license is not known" in hub.refuses("push", made, "alice/dog", **TOKEN)
    hub.does("push", made, "alice/dog", "--license", "other", **TOKEN)
    metadata, body = card(hub, "alice/dog")
    assert metadata["tags"][:3] == ["stable-diffusion", "sd3", "sd3-diffusers"]
    assert "A Stable Diffusion 3.5 large pipeline for diffusers" in body
    loading = 'StableDiffusion3Pipeline.from_pretrained("alice/dog", text_encoder_3=None, tokenizer_3=None)'
    assert loading in body and "from diffusers import StableDiffusion3Pipeline" in body
    assert "| MMDiT | model.weights.h5 (.weights.h5) | `" in body
    for file in made.glob("*/*"):
        assert contents(hub, "alice/dog", file.relative_to(made).as_posix()) == file.read_bytes()
    (made / "tokenizer_2" / "vocab.json").unlink()
    assert "tokenizer_2" in hub.refuses("push", made, "alice/dog", "--license", "other", **TOKEN)


def test_license_is_never_invented(hub: Hub, pipeline: Path) -> None:
    record = json.loads((pipeline / "conversion.json").read_text())
    for origins, message in (
        ([], "none of its sources states one"),
        (
            [{"source": "a", "license": "mit"}, {"source": "b", "license": "other"}],
            "its sources state mit, other",
        ),
    ):
        (pipeline / "conversion.json").write_text(json.dumps(record | {"origins": origins}))
        refused = hub.refuses("push", pipeline, "alice/unlicensed", **TOKEN)
        assert message in refused and "--license ID" in refused
    refused = hub.refuses("push", pipeline, "alice/unlicensed", "--license", "nonsense", **TOKEN)
    assert "not a license that the Hub has an identifier for" in refused
    (pipeline / "conversion.json").unlink()  # a pipeline of somebody else's making
    hub.does("push", pipeline, "alice/unlicensed", "--license", "mit", **TOKEN)
    assert "## Conversion" not in card(hub, "alice/unlicensed")[1]


@pytest.mark.parametrize(
    ("name", "text", "message"),
    [
        ("conversion.json", "{", "not what `convert` writes"),
        ("conversion.json", '{"parts": {"unet": []}}', "not what `convert` writes"),
        ("conversion.json", '["../../etc/passwd"]', "not what `convert` writes"),
        ("dreambooth.toml", "steps = ", "not a TOML file"),
        ("dreambooth.toml", "sample_prompt = 3", "sample_prompt is 3"),
        ("dreambooth.toml", "colour = 3", "unknown options colour"),
    ],
)
def test_damaged_records(pipeline: Path, name: str, text: str, message: str) -> None:
    (pipeline / name).write_text(text)
    with pytest.raises(kcv2diffusers.Error, match=message):
        kcv2diffusers.publish.push.push(pipeline, "alice/x", license="mit", dry_run=True)


def test_nothing_in_a_card_is_markup(pipeline: Path) -> None:
    record = json.loads((pipeline / "conversion.json").read_text())
    record["parts"]["unet"]["files"][0]["name"] = "a|b<script>`x`"
    record["parts"]["unet"]["files"][0]["sha256"] = "`<i>"
    record["loras"] = [{"name": "dog|<b>", "strength": 0.8, "bytes": 1, "sha256": "`<u>"}]
    record["tool"] = f"tool {ALICE}"
    (pipeline / "conversion.json").write_text(json.dumps(record))
    (pipeline / "dreambooth.toml").write_text('instance_prompt = "a \\"b\\": <i>"\nsample_prompt = ["x|y"]')
    text = kcv2diffusers.publish.push.push(pipeline, "alice/x", license="mit", dry_run=True).card
    assert "| dog\\|&lt;b> | 0.8 | `'&lt;u>` |" in text
    assert not re.search(r"<(i|b|u)>", text.split("## Conversion")[1])
    assert "<script>" not in text and "a\\|b&lt;script>" in text and ALICE not in text
    assert yaml.safe_load(text.split("---\n")[1])["instance_prompt"] == 'a "b": <i>'
    assert 'pipeline("a \\"b\\": <i>").images' in text


def test_verification_figures(hub: Hub, pipeline: Path) -> None:
    pictures = [{"stock": {"psnr": 41.26, "ssim": 0.9987}}, {"stock": {"psnr": 44.0, "ssim": 0.99}}]
    report = {
        "passed": True, "reason": "verified", "command": "/home/somebody/secret",
        "weights": {"tensors": {"unet": 686, "vae_decoder": 140}},
        "modules": [{"name": "UNet", "stock": 1.28e-4}],
        "images": {"runs": pictures},
    }  # fmt: skip
    (pipeline / "verification.json").write_text(json.dumps(report))
    hub.does("push", pipeline, "alice/verified", **TOKEN)
    body = card(hub, "alice/verified")[1]
    for row in ("verdict | passed", "tensors compared | 826", "UNet | 1.3e-04", "PSNR 41.3 dB, SSIM 0.9900"):
        assert row in body
    assert "verification.json" not in hub.ask("state")["alice/verified"]["heads"]["main"]  # it holds paths
    report["images"] = {"runs": [{"stock": {"psnr": "infinite", "ssim": 1.0}}]}
    (pipeline / "verification.json").write_text(json.dumps(report))
    assert figures(pipeline / "verification.json")[-1][1] == "PSNR inf dB, SSIM 1.0000"
    for damaged in ("{", "[]", "{}", '{"passed": true, "modules": [{}]}'):
        (pipeline / "verification.json").write_text(damaged)
        assert figures(pipeline / "verification.json") == []


@pytest.mark.slow
def test_private_revision_and_pull_request(hub: Hub, pipeline: Path) -> None:
    hub.does("push", pipeline, "alice/hidden", "--private", **TOKEN)
    assert hub.ask("state")["alice/hidden"]["private"]
    hub.does("push", pipeline, "alice/open", **TOKEN)
    assert "exists already and is public" in hub.refuses("push", pipeline, "alice/open", "--private", **TOKEN)
    hub.does("push", pipeline, "alice/open", "--revision", "epoch/2", "--overwrite-card", **TOKEN)
    scheduler = pipeline / "scheduler" / "scheduler_config.json"
    scheduler.write_text(scheduler.read_text() + "\n")
    hub.does("push", pipeline, "alice/open", "--revision", "fp32", **TOKEN)
    told = hub.does("push", pipeline, "alice/open", "--create-pr", HF_TOKEN=BOB)  # anybody may propose
    assert f"1 files: {hub.url}/alice/open/discussions/1" in told.replace("1 file:", "1 files:")
    heads = hub.ask("state")["alice/open"]["heads"]
    assert set(heads) == {"main", "epoch/2", "fp32", "refs/pr/1"} and UNET in heads["refs/pr/1"]
    both = ("--create-pr", "--revision", "x")
    assert "Omit --revision or --create-pr" in hub.refuses("push", pipeline, "alice/open", *both, **TOKEN)
    assert "no such repository" in hub.refuses("push", pipeline, "alice/none", "--create-pr", **TOKEN)


@pytest.mark.slow
def test_who_may_not(hub: Hub, pipeline: Path) -> None:
    hub.seed("alice/hers", pipeline)
    hub.seed("alice/secret", pipeline, private=True)
    for repo, token, message in (
        ("alice/x", "", "publishing needs a login"),
        ("alice/x", "hf_wrongToken", "does not accept this token (401"),
        ("alice/x", "hf wrong token", "holds a space"),
        ("alice/x", READER, "has no right to do this (403"),
        ("bob/x", ALICE, "has no right to do this (403"),
        ("alice/hers", BOB, "has no right to do this (403"),
        ("alice/secret", BOB, "the name is taken by a repository that you cannot see"),
        ("alice/a/b", ALICE, "alice/a/b: Repo id must"),
        ("../x", ALICE, "Repo id must"),
    ):
        given = ("--token", token) if token else ()
        refused = hub.refuses("push", pipeline, repo, *given)
        assert message in refused and len(refused.strip().splitlines()) == 2, refused
    assert hub.uploaded() == 0


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"method": "POST", "path": "/api/repos/create", "status": 429}, "rate limit is reached (429"),
        ({"method": "POST", "path": "/commit/", "status": 409}, "somebody else changes the repository"),
        ({"method": "POST", "path": "/api/repos/create", "status": 500}, "has an internal error (500"),
        ({"method": "GET", "path": "/api/whoami", "status": 502}, "has an internal error (502"),
        ({"method": "POST", "path": "/commit/", "status": 500}, "has an internal error (500"),
        (
            {"method": "POST", "path": "/commit/", "status": 403, "message": "no hf_aliceWriteToken0000"},
            "(403, no <token>)",
        ),
    ],
)
def test_a_hub_that_fails(hub: Hub, pipeline: Path, rule: dict[str, Any], message: str) -> None:
    hub.fail(rule)
    refused = hub.refuses("push", pipeline, "alice/failing", **TOKEN)
    assert message in refused and len(refused.strip().splitlines()) == 2


def test_the_hub_is_down(hub: Hub, pipeline: Path) -> None:
    refused = hub.refuses("push", pipeline, "alice/x", HF_ENDPOINT="http://127.0.0.1:9", **TOKEN)
    assert "127.0.0.1:9 cannot be reached" in refused
    refused = hub.refuses("push", pipeline, "alice/x", HF_HUB_OFFLINE="1", **TOKEN)
    assert "HF_HUB_OFFLINE is set" in refused


@pytest.mark.slow
def test_a_broken_push_goes_on(hub: Hub, pipeline: Path) -> None:
    """The connection breaks in the UNet, again and again; what had arrived is not sent again."""
    sizes = {p.relative_to(pipeline).as_posix(): p.stat().st_size for p in pipeline.rglob("*.safetensors")}
    digest = subprocess.run(["sha256sum", pipeline / UNET], capture_output=True, text=True, check=True)
    hub.fail({"method": "PUT", "path": digest.stdout.split()[0], "drop": True})
    refused = hub.refuses("push", pipeline, "alice/broken", **TOKEN)
    assert "what has been transferred is kept" in refused and len(refused.strip().splitlines()) == 2
    assert UNET not in hub.ask("state")["alice/broken"]["heads"]["main"]  # all or nothing
    hub.fail()
    hub.log()
    hub.does("push", pipeline, "alice/broken", **TOKEN)
    assert hub.uploaded() == sizes[UNET]
    assert contents(hub, "alice/broken", UNET) == (pipeline / UNET).read_bytes()


@pytest.mark.slow
def test_interrupted(hub: Hub, pipeline: Path) -> None:
    """At once, not when the upload is through; with a line, and to be gone on with."""
    hub.fail({"sleep": 100})
    command = [sys.executable, "-m", "kcv2diffusers", "push", str(pipeline), "alice/interrupted"]
    with subprocess.Popen(command, env=hub.environment(**TOKEN), stderr=subprocess.PIPE, text=True) as push:
        while not any(entry["method"] == "PUT" for entry in hub.log()):
            assert push.poll() is None
            time.sleep(0.1)
        push.send_signal(signal.SIGINT)
        assert push.wait(timeout=90) == 130
        assert push.stderr is not None
        assert push.stderr.read() == "kcv2diffusers: interrupted; what has been transferred is kept.\n"
    hub.fail()
    hub.does("push", pipeline, "alice/interrupted", **TOKEN)


def spoil(path: Path, change: Callable[[np.ndarray], Any]) -> None:
    """Change the values of a file of float16 tensors, as the tiny base's, in place."""
    data = bytearray(path.read_bytes())
    start = 8 + int.from_bytes(data[:8], "little")
    values = np.frombuffer(data, "float16", offset=start).copy()
    change(values)
    data[start:] = values.tobytes()
    path.write_bytes(data)


def set_json(path: Path, **entries: Any) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


def nan(folder: Path) -> None:
    spoil(folder / UNET, lambda values: values.__setitem__(12345, np.nan))


def infinite_text_encoder(folder: Path) -> None:
    spoil(folder / "text_encoder" / "model.safetensors", lambda values: values.__setitem__(-1, np.inf))


def cut_short(folder: Path) -> None:
    (folder / UNET).write_bytes((folder / UNET).read_bytes()[:-8])


def pickled(folder: Path) -> None:
    (folder / UNET).rename(folder / "unet" / "diffusion_pytorch_model.bin")


def link_out(folder: Path) -> None:
    (folder / "vae" / "config.json").rename(folder.parent / "config.json")
    (folder / "vae" / "config.json").symlink_to(folder.parent / "config.json")


@pytest.mark.parametrize(
    ("damage", "message"),
    [
        (nan, "NaN or infinite"),
        (infinite_text_encoder, "NaN or infinite"),
        (cut_short, "damaged"),
        (pickled, "only pickled weights"),
        (link_out, "a link out of the folder"),
        (lambda f: shutil.rmtree(f / "vae"), "model_index.json names vae, not there"),
        (lambda f: (f / "model_index.json").unlink(), "not a diffusers pipeline"),
        (lambda f: (f / "unet" / "config.json").unlink(), "no such file"),
        (lambda f: (f / "scheduler" / "scheduler_config.json").write_text("{"), "not a JSON object"),
        (lambda f: shutil.rmtree(f / "scheduler"), "model_index.json names scheduler, not there"),
        (
            lambda f: set_json(f / "unet" / "config.json", cross_attention_dim=768),
            "cross_attention_dim is 768",
        ),
        (lambda f: set_json(f / "unet" / "config.json", layers_per_block=1), "layers_per_block is 1"),
        (lambda f: set_json(f / "text_encoder" / "config.json", vocab_size=7), "vocab_size is 7"),
        (lambda f: set_json(f / "model_index.json", unet=["os", "system"]), "unet is not diffusers.UNet2D"),
    ],
)
def test_a_broken_pipeline_is_never_published(
    pipeline: Path, tmp_path: Path, damage: Callable[[Path], Any], message: str
) -> None:
    check(pipeline)
    damage(pipeline)
    with pytest.raises(kcv2diffusers.Error, match=message):
        check(pipeline)


def test_a_variant_beside_the_plain_weights(pipeline: Path) -> None:
    """Both are checked and published."""
    half = pipeline.parent / "half"
    kcv2diffusers.convert(TINY, out=half, dtype="float16", variant="fp16")
    for name in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model", "text_encoder/model"):
        shutil.copy(half / f"{name}.fp16.safetensors", pipeline / name.split("/")[0])
    assert sum(name.endswith(".safetensors") for name in check(pipeline).files) == 6
    path = pipeline / "unet" / "diffusion_pytorch_model.fp16.safetensors"
    data = bytearray(path.read_bytes())
    data[-2:] = b"\x00\x7c"  # infinity
    path.write_bytes(data)
    with pytest.raises(kcv2diffusers.Error, match="NaN or infinite"):
        check(pipeline)


@pytest.mark.slow
def test_convert_and_push(hub: Hub, made: Path, tmp_path: Path) -> None:
    """The license and the base model are those of the base on the Hub."""
    hub.seed("bob/base", made, files={"README.md": "---\nlicense: creativeml-openrail-m\n---\n"})
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("unet.weights.h5", "text_encoder.weights.h5", "kcv2diffusers.json"):
        shutil.copy(locate(TINY) / name, mine)
    arguments = ["convert", mine, "--base", "hf://bob/base", "--out", tmp_path / "out", "--push-to-hub"]
    assert "publishing needs a login" in hub.refuses(*arguments, "alice/mine2")
    assert not (tmp_path / "out").exists()  # told before the work
    told = hub.does(*arguments, "alice/mine2", "--private", **TOKEN)
    assert f"14 files: {hub.url}/alice/mine2" in told
    metadata, body = card(hub, "alice/mine2")
    assert (metadata["license"], metadata["base_model"]) == ("creativeml-openrail-m", "bob/base")
    assert re.search(r"\| VAE decoder \| hf://bob/base/vae/\S+@[0-9a-f]{40} .* \| `[0-9a-f]{64}` \|", body)
    assert hub.ask("state")["alice/mine2"]["private"]
    weights = ("--base", "hf://bob/base", "--level", "weights")
    assert "Verified: weights" in hub.does("verify", "hf://alice/mine2", mine, *weights, **TOKEN)
    assert "Verified: weights" in hub.does("verify", "hf://bob/base", TINY, "--level", "weights")


SAME = """
import sys
import numpy as np
import torch
from diffusers import StableDiffusionPipeline

pictures = []
for source in sys.argv[1:]:
    pipeline = StableDiffusionPipeline.from_pretrained(source)
    pipeline.set_progress_bar_config(disable=True)
    latents = torch.from_numpy(np.random.default_rng(5).standard_normal((1, 4, 8, 8), "float32"))
    drawn = pipeline("a sks cat", latents=latents, num_inference_steps=4, output_type="np")
    pictures.append(drawn.images[0])
assert pictures[0].shape == (64, 64, 3) and pictures[0].std() > 0.05
print(np.array_equal(*pictures))
"""


@pytest.mark.slow
def test_from_photos_to_the_hub_and_back(hub: Hub, tmp_path: Path) -> None:
    """dreambooth -> export -> push -> from_pretrained from the Hub: the picture of the local pipeline."""
    arguments = [
        "dreambooth", "--base", "tiny", "--instance-images", locate(TINY) / "subject",
        "--instance-prompt", "a sks cat", "--steps", "2", "--sample-prompt", "a sks cat in the snow",
        "--sample-steps", "2", "--out", tmp_path / "run", "--export", tmp_path / "tiger",
        "--push-to-hub", "alice/tiger",
    ]  # fmt: skip
    assert "publishing needs a login" in hub.refuses(*arguments)
    assert not (tmp_path / "run").exists()
    told = hub.does(*arguments, **TOKEN)
    assert f"16 files: {hub.url}/alice/tiger" in told
    metadata, body = card(hub, "alice/tiger")
    assert metadata["license"] == "apache-2.0" and "dreambooth" in metadata["tags"]
    assert metadata["instance_prompt"] == "a sks cat"
    assert metadata["widget"] == [{"text": "a sks cat"}, {"text": "a sks cat in the snow"}]
    assert "| `steps` | 2 |" in body and "![samples](samples.png)" in body
    assert "approximation of the GELU" not in body  # it was trained with the exact one
    assert str(tmp_path) not in body
    assert str(tmp_path) not in contents(hub, "alice/tiger", "dreambooth.toml").decode()
    done = subprocess.run(
        [sys.executable, "-c", SAME, str(tmp_path / "tiger"), "alice/tiger"],
        env=hub.environment(), capture_output=True, text=True, check=False,
    )  # fmt: skip
    assert done.stdout.strip() == "True", done.stderr


def test_tokens_are_never_told(monkeypatch: pytest.MonkeyPatch) -> None:
    for text in (f"Bearer {ALICE}", "b'Bearer secret'", f"x{BOB}y", "https://user:my-token@hub"):
        assert not re.search("Token0|secret|my-token", redact(text, "my-token"))
    monkeypatch.setenv("HF_TOKEN", "hf_with space")
    with pytest.raises(kcv2diffusers.Error) as refused:
        connect()
    assert "hf_with" not in str(refused.value)
    assert os.environ["HF_TOKEN"] not in repr(refused.value)


@pytest.mark.parametrize("dry", [True, False])
@pytest.mark.parametrize(
    ("repository", "license", "message"),
    [
        ("me/dog--1", None, "Cannot have -- or .."),
        ("me/dog/x", None, "Repo id must be in the form"),
        ("hf://me/dog", None, "Repo id must"),
        ("me/dog", "creativml-openrail-m", r"Did you mean creativeml-openrail-m\?"),
        ("me/dog", "MIT", r"Did you mean mit\?"),
    ],
)
def test_names_come_first(
    tmp_path: Path, repository: str, license: str | None, message: str, dry: bool
) -> None:
    """Before the folder is looked at, which is none here."""
    with pytest.raises(Error, match=message) as refused:
        kcv2diffusers.publish.push.push(tmp_path, repository, license=license, dry_run=dry)
    assert len(str(refused.value).splitlines()) == 2


def test_names_come_before_long_work(hub: Hub, tmp_path: Path) -> None:
    options = ["--push-to-hub", "alice/x", "--license", "mitt"]
    out = tmp_path / "out"
    assert "Did you mean mit?" in hub.refuses("convert", "tiny", "--out", out, *options, **TOKEN)
    assert not out.exists()
