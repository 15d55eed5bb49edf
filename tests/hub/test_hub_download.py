"""hf:// sources: genuine KerasCV checkpoints in the layouts that are found on the Hub, over real HTTP."""

from __future__ import annotations

import filecmp
import hashlib
import json
import shutil
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
from support.checkpoints import Checkpoints
from support.checkpoints import cached as make_once
from support.hub.hub import ALICE, BOB, Hub
from support.loras import kohya, save

import kcv2diffusers
from kcv2diffusers.errors import Error
from kcv2diffusers.hub.address import Address, cached, parse
from kcv2diffusers.hub.listing import candidates, chosen, pipeline_files, unsafe
from kcv2diffusers.maps.parts import families, family_of
from kcv2diffusers.publish.card import model_card
from kcv2diffusers.publish.card_facts import gather
from kcv2diffusers.publish.check import Checked
from kcv2diffusers.sources.diffusers_pipeline import read_pipeline
from kcv2diffusers.sources.locate import TINY, locate

PARTS = families()[0].parts

pytestmark = pytest.mark.slow

pytest_plugins = ["support.hub.fixtures"]


@pytest.fixture(scope="module")
def files(checkpoints: Checkpoints) -> dict[str, Path]:
    """Keras 2 files of each part: a folder with legacy.h5, saved_model, ..."""
    wanted = ["--parts", "text_encoder", "--versions", "1", "--vocabulary", "49408"]
    text = make_once("sprint", "make_checkpoints.py", *wanted, "--containers", "legacy.h5", "saved_model")
    return {part: checkpoints("sprint", part) for part in PARTS} | {
        "text_encoder": text / "text_encoder-sd1-float32"
    }


@pytest.fixture(scope="module")
def four(files: dict[str, Path], heads: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """One .h5 to each part."""
    folder = tmp_path_factory.mktemp("four")
    for part, source in files.items():
        shutil.copy(source / "legacy.h5", folder / f"{part}.h5")
    shutil.copy(heads / "kcv2diffusers.json", folder)
    return folder


@pytest.fixture(scope="module")
def expected(four: Path, bpe: Path, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """What all layouts must become: converted from this machine's files."""
    out = tmp_path_factory.mktemp("expected") / "pipeline"
    kcv2diffusers.convert(four, out=out, tokenizer=bpe)
    return out


@pytest.fixture(scope="module")
def tiny_pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    out = tmp_path_factory.mktemp("tiny") / "pipeline"
    kcv2diffusers.convert(TINY, out=out)
    return out


def same(one: Path, other: Path, *folders: str) -> bool:
    """Whether the weights and configs of these folders (all by default) are equal byte for byte."""
    names = [
        p.relative_to(one) for f in folders or ("unet", "text_encoder", "vae") for p in (one / f).iterdir()
    ]
    assert names
    return all(filecmp.cmp(one / name, other / name, shallow=False) for name in names)


def downloaded(hub: Hub) -> set[str]:
    """Paths in repositories whose contents were sent since the last look at the log."""
    paths = [e["path"].split("/resolve/")[1].partition("/")[2] for e in hub.log() if e.get("sent")]
    return set(paths)


def test_one_file_a_part(hub: Hub, four: Path, expected: Path, bpe: Path, tmp_path: Path) -> None:
    hub.seed("alice/parts", four, files={"notes.txt": "x", "logs/events.out": "x" * 1000})
    told = hub.does("convert", "hf://alice/parts", "--tokenizer", bpe, "--out", tmp_path / "out")
    assert "unet: hf://alice/parts/unet.h5@" in told.lower()
    assert same(expected, tmp_path / "out")
    assert downloaded(hub) == {*(f"{part}.h5" for part in PARTS), "kcv2diffusers.json"}
    hub.does("convert", "hf://alice/parts", "--tokenizer", bpe, "--out", tmp_path / "again")
    assert downloaded(hub) == set()
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    [file] = record["parts"]["unet"]["files"]
    assert file["name"].startswith("hf://alice/parts/unet.h5@") and len(file["sha256"]) == 64
    assert str(tmp_path) not in json.dumps(record)
    # Without the Hub its cache answers; what is not there is refused in a line.
    arguments = ("convert", "hf://alice/parts", "--tokenizer", bpe, "--out")
    hub.does(*arguments, tmp_path / "offline", HF_HUB_OFFLINE="1")
    assert same(expected, tmp_path / "offline")
    hub.does(*arguments, tmp_path / "down", HF_ENDPOINT="http://127.0.0.1:9")
    assert same(expected, tmp_path / "down")


def test_path_and_revision(hub: Hub, four: Path, expected: Path, heads: Path, tmp_path: Path) -> None:
    hub.seed("alice/epochs", four, at="weights/", branch="epoch/2")
    source = "hf://alice/epochs/weights/unet.h5@epoch/2"
    told = json.loads(hub.does("inspect", source, "--json"))
    assert [found["part"] for found in told] == ["unet"]
    hub.does("convert", source, "--base", "none", "--out", tmp_path / "out")
    assert same(expected, tmp_path / "out", "unet")
    assert downloaded(hub) == {"weights/unet.h5", "weights/kcv2diffusers.json"}
    folder = json.loads(hub.does("inspect", "hf://alice/epochs@epoch%2F2/weights", "--json"))
    assert {found["part"] for found in folder} == set(PARTS)
    for source, message in (
        ("hf://alice/epochs/weights/other.h5@epoch/2", "no such file or folder in the repository"),
        ("hf://alice/epochs/unet.h5", "no such file or folder in the repository"),
        ("hf://alice/epochs@v9", "no such revision"),
        ("hf://alice/nothing", "no such repository, or it is private"),
        ("hf://alice", "not an address on the Hub"),
        ("hf://datasets/alice/epochs", "a dataset, not a model repository"),
        ("hf://alice/epochs", "no checkpoint that is read here"),
    ):
        assert message in hub.refuses("inspect", source)


def test_a_single_file(hub: Hub, tiny_pipeline: Path, tmp_path: Path) -> None:
    """By its path: a repository of community checkpoints holds many."""
    kcv2diffusers.convert(tiny_pipeline, out=tmp_path / "dog.safetensors")
    (tmp_path / "merges").mkdir()
    (tmp_path / "dog.safetensors").rename(tmp_path / "merges" / "dog.safetensors")
    hub.seed("alice/merges", tmp_path / "merges", at="v2/")
    source = "hf://alice/merges/v2/dog.safetensors"
    told = json.loads(hub.does("inspect", source, "--json"))
    assert {found["part"] for found in told} == set(PARTS)
    assert told[0]["metadata"]["modelspec.title"] == "dog"
    tokenizer = tiny_pipeline / "tokenizer"
    hub.does("convert", source, "--tokenizer", tokenizer, "--out", tmp_path / "out")
    assert same(tiny_pipeline, tmp_path / "out")
    assert downloaded(hub) == {"v2/dog.safetensors"}
    assert "no checkpoint that is read here" in hub.refuses("inspect", "hf://alice/merges")


def test_a_lora(hub: Hub, tiny_pipeline: Path, tmp_path: Path) -> None:
    """Of a repository with one file or with diffusers' name, and by its path; merged as a local one."""
    folder = tmp_path / "loras"
    folder.mkdir()
    file = save(kohya(tiny_pipeline, rank=1), folder / "dog.safetensors")
    kcv2diffusers.convert(base=tiny_pipeline, out=tmp_path / "here", lora=f"{file}:0.5")
    hub.seed("alice/dog-lora", folder, at="v2/", files={"README.md": "---\nlicense: mit\n---\n"})
    hub.log()
    arguments = ("convert", "--base", tiny_pipeline, "--lora", "hf://alice/dog-lora:0.5", "--out")
    hub.does(*arguments, tmp_path / "out")
    assert same(tmp_path / "here", tmp_path / "out")
    assert downloaded(hub) == {"v2/dog.safetensors"}
    [lora] = json.loads((tmp_path / "out" / "conversion.json").read_text())["loras"]
    assert lora["name"].startswith("hf://alice/dog-lora/v2/dog.safetensors@") and lora["strength"] == 0.5
    assert lora["sha256"] == hashlib.sha256(file.read_bytes()).hexdigest()
    hub.does(*arguments, tmp_path / "offline", HF_HUB_OFFLINE="1")
    assert same(tmp_path / "here", tmp_path / "offline")
    save(kohya(tiny_pipeline, rank=2), folder / "cat.safetensors")
    hub.seed("alice/loras", folder)
    refused = hub.refuses("convert-lora", "hf://alice/loras", "--out", tmp_path / "lora.safetensors")
    assert (
        "2 .safetensors files; give one by name" in refused and "hf://alice/loras/cat.safetensors" in refused
    )
    shutil.copy(file, folder / "pytorch_lora_weights.safetensors")
    hub.seed("alice/loras", folder)
    hub.log()
    for number, source in enumerate(("hf://alice/loras", "hf://alice/loras/cat.safetensors")):
        hub.does("convert-lora", source, "--out", tmp_path / f"{number}.safetensors")
    assert downloaded(hub) == {"pytorch_lora_weights.safetensors", "cat.safetensors"}
    hub.seed("alice/none", tmp_path / "nothing", files={"README.md": "no weights"})
    for source, message in (
        ("hf://alice/none", "no .safetensors file there"),
        ("hf://alice/loras/v9", "no .safetensors file there"),
        ("hf://alice/nothing", "no such repository, or it is private"),
        ("alice/loras", "hf://user/repo for the Hub"),
        ("https://huggingface.co/alice/loras", "Write hf://alice/loras for it"),
    ):
        assert message in hub.refuses("convert-lora", source, "--out", tmp_path / "lora.safetensors")


def saved_model(hub: Hub, repo: str, files: dict[str, Path], heads: Path, part: str) -> None:
    hub.seed(repo, files[part] / "saved_model")
    hub.seed(repo, heads)


def test_saved_model_in_the_root(
    hub: Hub, files: dict[str, Path], four: Path, expected: Path, heads: Path, bpe: Path, tmp_path: Path
) -> None:
    saved_model(hub, "alice/sprint", files, heads, "unet")
    hub.does("convert", "hf://alice/sprint", "--base", "none", "--out", tmp_path / "unet")
    assert same(expected, tmp_path / "unet", "unet")
    # A SavedModel and an .h5
    hub.seed("alice/both", files["unet"] / "saved_model")
    hub.seed("alice/both", heads, files={})
    folder = tmp_path / "text"
    folder.mkdir()
    shutil.copy(four / "text_encoder.h5", folder)
    hub.seed("alice/both", folder)
    rest = ["--base", four / "vae_decoder.h5", "--base", four / "vae_encoder.h5", "--tokenizer", bpe]
    hub.does("convert", "hf://alice/both", *rest, "--out", tmp_path / "both")
    assert same(expected, tmp_path / "both")


def test_sibling(
    hub: Hub, files: dict[str, Path], four: Path, expected: Path, heads: Path, bpe: Path, tmp_path: Path
) -> None:
    saved_model(hub, "alice/corgi", files, heads, "unet")
    saved_model(hub, "alice/corgi-text-encoder", files, heads, "text_encoder")
    arguments = ["convert", "hf://alice/corgi", "--base", four / "vae_decoder.h5"]
    arguments += ["--base", four / "vae_encoder.h5", "--tokenizer", bpe, "--out"]
    refused = hub.refuses(*arguments, tmp_path / "out")
    assert "hf://alice/corgi-text-encoder" in refused and "--with-sibling" in refused
    hub.does(*arguments, tmp_path / "out", "--with-sibling")
    assert same(expected, tmp_path / "out")
    told = hub.does("convert", "hf://alice/corgi", "--base", "none", "--out", tmp_path / "alone")
    assert "hf://alice/corgi-text-encoder exists: --with-sibling" in told
    saved_model(hub, "alice/lonely", files, heads, "unet")
    refused = hub.refuses("convert", "hf://alice/lonely", "--with-sibling", "--out", tmp_path / "x")
    assert "no hf:// source has a text encoder in a repository beside it" in refused
    hub.fail({"method": "*", "path": "lonely-text", "status": 503})  # then nobody knows whether there is one
    refused = hub.refuses("convert", "hf://alice/lonely", "--with-sibling", "--out", tmp_path / "x")
    hub.fail()
    assert "503" in refused and "beside it" not in refused


def test_several_candidates(
    hub: Hub, four: Path, files: dict[str, Path], heads: Path, tmp_path: Path
) -> None:
    folder = tmp_path / "epochs"
    folder.mkdir()
    for epoch in (1, 2):
        shutil.copy(four / "unet.h5", folder / f"unet_{epoch}.h5")
    hub.seed("alice/several", folder)
    saved_model(hub, "alice/several", files, heads, "unet")
    refused = hub.refuses("convert", "hf://alice/several", "--base", "none", "--out", tmp_path / "out")
    assert "3 checkpoints for the UNet; give one by name" in refused
    for name in ("unet_1.h5", "unet_2.h5", "saved_model.pb"):
        assert f"hf://alice/several/{name}" in refused
        source = f"hf://alice/several/{name}"
        hub.does("convert", source, "--base", "none", "--out", tmp_path / name)
    assert same(tmp_path / "unet_1.h5", tmp_path / "saved_model.pb", "unet")


def test_only_what_is_needed_of_a_pipeline(hub: Hub, tiny_pipeline: Path, tmp_path: Path) -> None:
    """A repository as they are: pickles, half precision, non-EMA weights beside the plain ones."""
    hub.seed(
        "alice/tiny", tiny_pipeline, files={"README.md": "---\nlicense: mit\n---\n", "unet/x.bin": "pickle"}
    )
    for variant in ("fp16", "non_ema"):
        for at in ("unet/diffusion_pytorch_model", "vae/diffusion_pytorch_model"):
            hub.ask("seed", {"repo": "alice/tiny", "folder": str(tmp_path / "none"),
                             "files": {f"{at}.{variant}.safetensors": "y" * 100}})  # fmt: skip
    mine = tmp_path / "mine"
    mine.mkdir()
    for name in ("unet.weights.h5", "text_encoder.weights.h5", "kcv2diffusers.json"):
        shutil.copy(locate(TINY) / name, mine)
    hub.does("convert", mine, "--base", "hf://alice/tiny", "--out", tmp_path / "out")
    assert same(tiny_pipeline, tmp_path / "out")
    got = downloaded(hub)
    assert "vae/diffusion_pytorch_model.safetensors" in got and "tokenizer/vocab.json" in got
    assert [name for name in sorted(got) if name.endswith((".safetensors", ".bin"))] == [
        "text_encoder/model.safetensors",  # a model of unusual widths: the base's states its heads
        "unet/diffusion_pytorch_model.safetensors",
        "vae/diffusion_pytorch_model.safetensors",
    ]
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())
    assert record["origins"][0]["license"] == "mit" and record["bases"][0].startswith("hf://alice/tiny@")
    hub.does("to-keras", "hf://alice/tiny", "--out", tmp_path / "keras")
    for name in ("unet.weights.h5", "vae_encoder.weights.h5"):
        assert kcv2diffusers.inspect(tmp_path / "keras" / name)[0].problems is None
    hub.home = tmp_path / "another cache"
    hub.log()
    assert "Give it with --base" in hub.refuses("convert", "hf://alice/tiny", "--out", tmp_path / "no")
    assert downloaded(hub) == set()


def test_card_of_a_checkpoint_of_the_sprint(expected: Path) -> None:
    """What its weights do not tell is said to be possible, or, where the publisher knows, a fact."""
    parts = {p: m for c in read_pipeline(expected).values() for p, m in c.parts.items()}
    files = ["unet/diffusion_pytorch_model.safetensors"]
    checked = Checked(expected, files, [], parts, family_of(parts))
    text = model_card(gather(checked, license="mit"), "a/b")
    assert "written by Keras 2.12 or older" in text and "approximation of the GELU" in text
    stated = gather(checked, license="mit", trained_with=frozenset(["old-image-encoder"]))
    assert "It was trained with the image encoder of KerasCV before 0.5" in model_card(stated, "a/b")
    assert "written by Keras 2.12" not in model_card(stated, "a/b")


DEFAULT = """
import sys
from kcv2diffusers.sources import recognise
from kcv2diffusers.cli import main
# The tiny base passes for Stable Diffusion 1, whose own weights are 4 GB.
recognise.Match.known = property(lambda self: True)
main()
"""


def default_base(hub: Hub, *arguments: str | Path, **extra: str) -> subprocess.CompletedProcess[str]:
    command = [sys.executable, "-c", DEFAULT, *map(str, arguments)]
    return subprocess.run(command, env=hub.environment(**extra), capture_output=True, text=True, check=False)


def test_the_default_base(hub: Hub, tiny_pipeline: Path, tmp_path: Path) -> None:
    sd15 = "stable-diffusion-v1-5/stable-diffusion-v1-5"
    parts = [locate(TINY) / name for name in ("unet.weights.h5", "text_encoder.weights.h5")]
    arguments = ("convert", *parts, "--out", tmp_path / "out")
    for extra, reason in (
        ({"HF_HUB_OFFLINE": "1"}, "HF_HUB_OFFLINE is set"),
        ({"HF_ENDPOINT": "http://127.0.0.1:9"}, "127.0.0.1:9 cannot be reached"),
    ):
        done = default_base(hub, *arguments, **extra)
        assert done.returncode == 1 and len(done.stderr.strip().splitlines()) == 2
        message = " ".join(done.stderr.split())
        assert "still needs: VAE decoder, VAE encoder" in message and reason in message
        for way in ("--base PIPELINE", "--vae-decoder SRC --vae-encoder SRC", "once online"):
            assert way in message
    hub.seed(sd15, tiny_pipeline, files={"README.md": "---\nlicense: creativeml-openrail-m\n---\n"})
    hub.log()
    done = default_base(hub, *arguments)
    assert done.returncode == 0, done.stderr
    assert f"VAE decoder, VAE encoder: from the default --base, hf://{sd15}." in done.stdout
    assert {n for n in downloaded(hub) if n.endswith(".safetensors")} == {
        "vae/diffusion_pytorch_model.safetensors"
    }
    assert same(tiny_pipeline, tmp_path / "out", "unet", "vae")
    done = default_base(hub, *arguments[:-1], tmp_path / "offline", HF_HUB_OFFLINE="1")
    assert done.returncode == 0, done.stderr
    done = default_base(hub, "convert", parts[0], "--out", tmp_path / "less", HF_HUB_OFFLINE="1")
    assert "still needs: text encoder, VAE decoder, VAE encoder" in done.stderr  # half of it is not enough


def test_a_broken_download_goes_on(hub: Hub, four: Path) -> None:
    """Once: where it broke. For good: a line, and whole files are there the next time."""
    hub.seed("alice/cut", four)
    size = (four / "unet.h5").stat().st_size
    hub.log()
    hub.fail({"path": r"/resolve/.*/unet\.h5", "cut": size - 1000, "times": 1})
    assert "UNet" in hub.does("inspect", "hf://alice/cut/unet.h5")
    sent = [entry["sent"] for entry in hub.log() if entry.get("sent") and "unet.h5" in entry["path"]]
    assert sent[0] == size - 1000 and 1000 <= sent[1] < size / 2  # the library keeps blocks of 10 MB
    hub.fail({"path": r"/resolve/.*/vae_encoder\.h5", "status": 503})
    assert "has an internal error (503" in hub.refuses("inspect", "hf://alice/cut")
    hub.fail()
    hub.log()
    assert "UNet" in hub.does("inspect", "hf://alice/cut")
    assert downloaded(hub) == {"vae_encoder.h5"}


def test_private_needs_a_token(hub: Hub, four: Path) -> None:
    hub.seed("alice/secret", four, private=True)
    no_token: dict[str, str] = {}
    for extra in (no_token, {"HF_TOKEN": BOB}):
        refused = hub.refuses("inspect", "hf://alice/secret", **extra)
        assert "no such repository, or it is private" in refused
    for wrong in ("hf_nobodysToken", "hf nobody's"):
        assert "token" in hub.refuses("inspect", "hf://alice/secret", HF_TOKEN=wrong)
    assert "UNet" in hub.does("inspect", "hf://alice/secret", HF_TOKEN=ALICE)


@pytest.mark.parametrize(
    ("rule", "message"),
    [
        ({"status": 429}, "rate limit is reached (429"),
        ({"status": 500}, "has an internal error (500"),
    ],
)
def test_refusals(hub: Hub, four: Path, rule: dict[str, Any], message: str) -> None:
    hub.seed("alice/parts2", four)
    hub.fail({"path": "/api/models/alice/parts2", **rule})
    assert message in hub.refuses("inspect", "hf://alice/parts2")


def test_hub_extra_is_missing(four: Path, monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    """Nothing else needs huggingface_hub; hf:// says what to install."""
    code = f"""
import sys
sys.modules["huggingface_hub"] = None
from kcv2diffusers import Error, convert, inspect
convert({str(four / "unet.h5")!r}, out={str(tmp_path / "out")!r}, base="none")
try:
    inspect("hf://alice/parts")
except Error as error:
    print(error)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout == "huggingface_hub is not installed.\npip install 'kcv2diffusers[hub]'\n"


def test_addresses() -> None:
    assert parse("hf://a/b") == Address("a/b")
    assert parse("hf://a/b/") == Address("a/b")
    assert parse("hf://a/b/c/d.h5@v1") == parse("hf://a/b@v1/c/d.h5") == Address("a/b", "c/d.h5", "v1")
    assert parse("hf://a/b/c.h5@refs/pr/3") == Address("a/b", "c.h5", "refs/pr/3")
    assert str(Address("a/b", "c.h5", "v1")) == "hf://a/b/c.h5@v1"
    for wrong in ("hf://", "hf://a", "hf://a/b@", "hf://a/b//c"):
        with pytest.raises(Error):
            parse(wrong)
    path = Path("/x/hub/models--a--b--c/snapshots/0123/unet/w.safetensors")
    assert cached(path) == (Address("a/b--c", "unet/w.safetensors", "0123"), path.parents[1])
    assert cached(Path("/x/models/unet.h5")) is None


def test_listings() -> None:
    """Names and sizes of a listing, no download."""
    mb = 1_000_000
    listing = {
        "epoch-9.h5": 3438 * mb,
        "clip.h5": 5,
        "vae_enc.h5": 137 * mb,
        "notes.h5": 7,
        "dec/model.keras": 99 * mb,
    }
    assert {c.path: c.part for c in candidates(listing, "a/b")} == {
        "epoch-9.h5": "unet", "clip.h5": "text_encoder", "vae_enc.h5": "vae_encoder", "notes.h5": None,
        "dec/model.keras": "vae_decoder",
    }  # fmt: skip
    assert [c.path for c in chosen(candidates(listing, "a/b"), ["unet"], Address("a/b"))] == [
        "epoch-9.h5",
        "notes.h5",
    ]
    bundle = {f"variables/variables.{end}": 9 for end in ("index", "data-00000-of-00001")} | {
        "saved_model.pb": 1
    }
    assert [c.part for c in candidates(bundle, "a/dog-text-encoder")] == ["text_encoder"]
    assert [c.part for c in candidates(bundle, "a/dog")] == ["unet"]
    shards = {
        "m.weights.json": 1,
        "m_00000.weights.h5": 9,
        "m_00001.weights.h5": 9,
        "ckpt.index": 1,
        "ckpt.data-00000-of-00001": 9,
    }
    assert {c.path: len(c.files) for c in candidates(shards, "a/b")} == {"m.weights.json": 3, "ckpt": 2}
    pickled = {"model_index.json": 1, "vae/config.json": 1, "vae/diffusion_pytorch_model.bin": 9}
    with pytest.raises(Error, match="pickled weights are not read"):
        pipeline_files(pickled, "", ["vae_decoder"], None, Address("a/b"))
    variants = {"vae/config.json": 1, "vae/diffusion_pytorch_model.fp16.safetensors": 9}
    plain = variants | {"vae/diffusion_pytorch_model.safetensors": 9}
    for has, variant, name in ((variants, None, "fp16."), (plain, None, ""), (plain, "fp16", "fp16.")):
        wanted = f"vae/diffusion_pytorch_model.{name}safetensors"
        assert wanted in pipeline_files(has, "", None, variant, Address("a/b"))
    index, shard = "model.safetensors.index.json", "model-{}-of-00002.safetensors"
    sharded = dict.fromkeys(("config.json", index, shard.format("00001"), shard.format("00002")), 1)
    sharded = {f"text_encoder/{name}": size for name, size in sharded.items()}
    assert set(sharded) == set(pipeline_files(sharded, "", ["text_encoder"], None, Address("a/b")))
    assert all(map(unsafe, ("../x", "/etc/x", "a/../../x", "", "a\\..\\x"))) and not unsafe("a/b.h5")
