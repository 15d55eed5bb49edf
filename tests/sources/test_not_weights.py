"""What lies where weights should be: each is refused with what it is and what to do, in two lines."""

from __future__ import annotations

import gzip
import io
import json
import shutil
import tarfile
import zipfile
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file

from kcv2diffusers.conversion.inspection import inspect
from kcv2diffusers.conversion.to_diffusers import convert
from kcv2diffusers.errors import Error
from kcv2diffusers.hub.address import parse, readings, website
from kcv2diffusers.hub.listing import candidates
from kcv2diffusers.sources.diffusers_pipeline import read_pipeline
from kcv2diffusers.sources.locate import TINY, locate, locate_all
from kcv2diffusers.sources.open import open_sources

POINTER = (
    b"version https://git-lfs.github.com/spec/v1\n"
    b"oid sha256:4d7a214614ab2935c943f9e0ff69d22eadbb8f32b1258daaa5e2ca24d17e2393\nsize 3439088208\n"
)


def _zip(*names: str) -> bytes:
    data = io.BytesIO()
    with zipfile.ZipFile(data, "w") as archive:
        for name in names:
            archive.writestr(name, b"\x89HDF\r\n\x1a\n")
    return data.getvalue()


def _tar(mode: str) -> bytes:
    data = io.BytesIO()
    with tarfile.open(fileobj=data, mode=mode) as archive:  # type: ignore[call-overload]
        archive.addfile(tarfile.TarInfo("weights/unet.h5"), io.BytesIO())
    return data.getvalue()


FILES = [
    ("unet.h5", POINTER, "a Git LFS pointer that stands for 3,439.1 MB", "git lfs pull"),
    ("unet.keras", POINTER, "a Git LFS pointer", "git lfs pull"),
    ("unet.weights.json", POINTER, "a Git LFS pointer", "git lfs pull"),
    ("ckpt.index", POINTER, "a Git LFS pointer", "git lfs pull"),
    ("unet.h5", b"\n<!DOCTYPE html><html>", "a web page", "/resolve/"),
    ("unet.h5", b"<?xml version='1.0'?><Error><Code>AccessDenied", "a web page", "/resolve/"),
    ("unet.h5", b'{"error":"Repository not found"}', "an error message of a server", "log in"),
    ("unet.h5", b"Entry not found", "an error message of a server", "log in"),
    ("unet.h5.gz", gzip.compress(b"\x89HDF\r\n\x1a\n"), "compressed with gzip", "gunzip"),
    ("unet.tar.gz", _tar("w:gz"), "compressed with gzip", "tar xzf"),
    ("unet.tar", _tar("w"), "a tar archive with weights/unet.h5 inside", "Unpack it"),
    ("unet.zip", _zip("__MACOSX/._unet.h5", "unet.h5"), "a zip archive with unet.h5 inside", "Unpack it"),
    ("saved.zip", _zip("m/saved_model.pb"), "a zip archive with m/saved_model.pb inside", "Unpack it"),
    ("unet.pt", _zip("archive/data.pkl"), "PyTorch's pickled weights", "never opened"),
    ("unet.bin", b"\x80\x02}q\x00.", "a pickle", "never opened"),
    ("._unet.h5", b"\0\x05\x16\x07\0\x02\0\0Mac OS X", "what macOS notes beside a file", "the file itself"),
    (".DS_Store", b"\0\0\0\x01Bud1", "a .DS_Store of macOS", "the file itself"),
    ("unet.h5.crdownload", b"\x89HDF\r\n\x1a\n", "a download that was not finished", "Download it again"),
    ("ab12.incomplete", b"\x89HDF\r\n\x1a\n", "a download that was not finished", "Download it again"),
]


@pytest.mark.parametrize(
    ("name", "data", "cause", "remedy"), FILES, ids=[f"{name}, {cause}" for name, _, cause, _ in FILES]
)
def test_a_file_is_named_as_what_it_is(
    tmp_path: Path, name: str, data: bytes, cause: str, remedy: str
) -> None:
    (tmp_path / name).write_bytes(data)
    for source in (tmp_path / name, tmp_path):
        if source == tmp_path and name.startswith("."):
            continue
        with pytest.raises(Error) as refused:
            open_sources(source)
        first, second = str(refused.value).splitlines()
        assert str(tmp_path / name) in first and cause in first
        assert remedy in second


def test_safetensors_files_in_a_folder_are_not_taken_for_its_checkpoints(tmp_path: Path) -> None:
    (tmp_path / "unet.safetensors").write_bytes((70).to_bytes(8, "little") + b"{}")
    with pytest.raises(Error, match=r"unet\.safetensors: a \.safetensors file.*\n.*--base"):
        open_sources(tmp_path)
    with pytest.raises(Error, match=r"damaged \.safetensors file"):
        open_sources(tmp_path / "unet.safetensors")


@pytest.fixture(scope="module")
def keras_tiny() -> Path:
    """KerasCV files of the tiny base."""
    return locate(TINY)


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(TINY, out=tmp_path_factory.mktemp("tiny") / "pipeline").out


@pytest.fixture
def tiny(pipeline: Path, tmp_path: Path) -> Path:
    """A copy of the tiny pipeline to spoil."""
    return Path(shutil.copytree(pipeline, tmp_path / "tiny"))


def test_foreign_files_do_not_decide_over_a_folder(keras_tiny: Path, tmp_path: Path) -> None:
    folder = Path(shutil.copytree(keras_tiny, tmp_path / "folder"))
    expected = [found.part for found in inspect(keras_tiny)]
    for name, data, *_ in FILES:
        if not name.endswith((".h5", ".keras", ".json", ".index")) or name.startswith("."):
            (folder / name).write_bytes(data)
    (folder / "faiss.index").write_bytes(b"IxF2" + bytes(100))
    with h5py.File(folder / "latents.h5", "w") as file:
        file["latents"] = np.zeros((2, 4, 8, 8), "f4")
    (folder / "__MACOSX").mkdir()
    (folder / "__MACOSX" / "._unet.weights.h5").write_bytes(b"\0\x05\x16\x07")
    (folder / ".git").mkdir()
    (folder / ".git" / "saved_model.pb").write_bytes(b"")
    assert [found.part for found in inspect(folder)] == expected


def test_a_pointer_in_the_place_of_a_part_does_decide(keras_tiny: Path, tmp_path: Path) -> None:
    """It would be filled in for from elsewhere without a word."""
    folder = Path(shutil.copytree(keras_tiny, tmp_path / "folder"))
    (folder / "text_encoder.weights.h5").write_bytes(POINTER)
    with pytest.raises(Error, match=r"text_encoder\.weights\.h5: a Git LFS pointer"):
        inspect(folder)


@pytest.mark.parametrize("name", ["variables.index", "variables.data-00000-of-00001"])
def test_pointers_in_a_saved_model(checkpoints, tmp_path: Path, name: str) -> None:
    model = checkpoints("keras3", "text_encoder", 1) / "export"
    folder = Path(shutil.copytree(model, tmp_path / "model"))
    (folder / "variables" / name).write_bytes(POINTER)
    with pytest.raises(Error, match=rf"{name}: a Git LFS pointer.*\nFetch the file: git lfs pull"):
        inspect(folder)


@pytest.mark.parametrize(
    "name", ["unet/diffusion_pytorch_model.safetensors", "unet/config.json", "vae/config.json"]
)
def test_pointers_in_a_pipeline(tiny: Path, name: str) -> None:
    (tiny / name).write_bytes(POINTER)
    with pytest.raises(Error, match=rf"{name}: a Git LFS pointer"):
        read_pipeline(tiny)


def test_a_pointer_in_a_base(keras_tiny: Path, tiny: Path, tmp_path: Path) -> None:
    (tiny / "vae" / "diffusion_pytorch_model.safetensors").write_bytes(POINTER)
    with pytest.raises(Error, match="a Git LFS pointer"):
        convert(keras_tiny / "unet.weights.h5", base=tiny, out=tmp_path / "out")
    assert not (tmp_path / "out").exists()


def _change_config(path: Path, **entries: object) -> None:
    path.write_text(json.dumps(json.loads(path.read_text()) | entries))


@pytest.mark.parametrize(
    ("entries", "channels", "family"),
    [
        ({"in_channels": 9}, 9, "an inpainting model"),
        ({"in_channels": 5}, 5, "a depth model"),
        ({"in_channels": 8}, 8, "an InstructPix2Pix model"),
    ],
)
def test_other_unets(tiny: Path, entries: dict[str, object], channels: int, family: str) -> None:
    weights = tiny / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights)
    shape = tensors["conv_in.weight"].shape
    tensors["conv_in.weight"] = np.zeros((shape[0], channels, *shape[2:]), "f4")
    save_file(tensors, weights)
    _change_config(tiny / "unet" / "config.json", **entries)
    with pytest.raises(Error, match=rf"of {family}.*\nThe pipelines of Stable Diffusion 1, 2 and 3"):
        read_pipeline(tiny)


def test_xl(tiny: Path) -> None:
    weights = tiny / "unet" / "diffusion_pytorch_model.safetensors"
    tensors = load_file(weights) | {"add_embedding.linear_1.weight": np.zeros((4, 4), "f4")}
    del tensors["conv_in.bias"]
    save_file(tensors, weights)
    _change_config(tiny / "unet" / "config.json", addition_embed_type="text_time")
    with pytest.raises(Error, match="of Stable Diffusion XL, which is not read here"):
        read_pipeline(tiny)


def test_a_pipeline_without_any_known_component(tmp_path: Path) -> None:
    (tmp_path / "prior").mkdir()
    (tmp_path / "model_index.json").write_text('{"_class_name": "PixArtAlphaPipeline"}')
    with pytest.raises(Error, match=r"a pipeline of another family \(PixArtAlphaPipeline\)"):
        read_pipeline(tmp_path)


def test_an_unmerged_lora(tiny: Path) -> None:
    weights = tiny / "unet" / "diffusion_pytorch_model.safetensors"
    renamed = {}
    for name, tensor in load_file(weights).items():
        if ".to_q.weight" in name:
            stem = name.removesuffix(".weight")
            renamed[f"{stem}.base_layer.weight"] = tensor
            renamed[f"{stem}.lora_A.default.weight"] = np.zeros((4, tensor.shape[1]), "f4")
            renamed[f"{stem}.lora_B.default.weight"] = np.zeros((tensor.shape[0], 4), "f4")
        else:
            renamed[name] = tensor
    save_file(renamed, weights)
    with pytest.raises(Error, match=r"a LoRA that is not merged \(base_layer\)\.\nMerge it first"):
        read_pipeline(tiny)


@pytest.mark.parametrize(
    ("url", "address"),
    [
        ("https://huggingface.co/user/repo", "hf://user/repo"),
        ("https://huggingface.co/user/repo/", "hf://user/repo"),
        ("http://www.hf.co/user/repo?library=keras", "hf://user/repo"),
        ("huggingface.co/user/repo", "hf://user/repo"),
        ("https://huggingface.co/user/repo/tree/main", "hf://user/repo"),
        ("https://huggingface.co/user/repo/tree/v2", "hf://user/repo@v2"),
        ("https://huggingface.co/user/repo/blob/main/a/unet.h5", "hf://user/repo/a/unet.h5"),
        ("https://huggingface.co/user/repo/resolve/v2/unet.h5?download=true", "hf://user/repo/unet.h5@v2"),
    ],
)
def test_urls_of_the_hub(url: str, address: str) -> None:
    assert str(website(url)) == address
    for pipelines in (False, True):
        with pytest.raises(Error) as refused:
            locate_all(url, pipelines=pipelines)
        assert str(refused.value) == f"{url}: a web address, which is not read.\nWrite {address} for it."


def test_other_urls() -> None:
    with pytest.raises(Error, match=r"a web address, which is not read\.\nDownload it"):
        locate_all("https://example.org/unet.h5")


def test_a_branch_with_a_slash() -> None:
    """The Hub says which of them it has; the plain reading is asked for first."""
    assert [(a.revision, a.path) for a in readings(parse("hf://user/repo@feature/x"))] == [
        ("feature", "x"),
        ("feature/x", ""),
    ]
    assert [(a.revision, a.path) for a in readings(parse("hf://user/repo@feature/x/unet.h5"))] == [
        ("feature", "x/unet.h5"),
        ("feature/x", "unet.h5"),
        ("feature/x/unet.h5", ""),
    ]
    assert [(a.revision, a.path) for a in readings(parse("hf://user/repo/unet.h5"))] == [(None, "unet.h5")]


def test_foreign_files_of_a_repository_are_no_checkpoints() -> None:
    listing = dict.fromkeys(
        ["unet.h5", "._unet.h5", "__MACOSX/._unet.h5", ".cache/x.h5", "faiss.index", ".DS_Store"], 10
    )
    assert [c.path for c in candidates(listing, "user/repo")] == ["unet.h5"]
