"""Text files that an editor on Windows has saved begin with a byte-order mark; they are read all the same."""

from __future__ import annotations

import codecs
import json
import shutil
from collections.abc import Iterable
from pathlib import Path

import pytest
from support.checkpoints import small_base

from kcv2diffusers import backend, convert, inspect, to_keras
from kcv2diffusers.dreambooth.config import make_config
from kcv2diffusers.json_text import parse_object
from kcv2diffusers.pipeline.record import license_of, read
from kcv2diffusers.pipeline.tokenizer_files import find_tokenizer
from kcv2diffusers.publish.card_facts import figures

TEXTS = (".json", ".txt", ".toml", ".md")


def mark(folder: Path) -> list[str]:
    """Put the mark before every text file of a folder; their names."""
    found = [path for path in sorted(folder.rglob("*")) if path.is_file() and path.suffix in TEXTS]
    for path in found:
        path.write_bytes(codecs.BOM_UTF8 + path.read_bytes())
    return [path.relative_to(folder).as_posix() for path in found]


def contents(folder: Path, names: Iterable[str]) -> dict[str, bytes]:
    return {name: (folder / name).read_bytes() for name in names}


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("pipeline") / "plain"
    convert(small_base(), out=folder)
    return folder


def test_a_pipeline(pipeline: Path, tmp_path: Path) -> None:
    marked = tmp_path / "marked"
    shutil.copytree(pipeline, marked)
    names = mark(marked)
    assert {"model_index.json", "unet/config.json", "scheduler/scheduler_config.json"} <= set(names)
    assert {"tokenizer/vocab.json", "tokenizer/merges.txt", "conversion.json"} <= set(names)
    assert find_tokenizer(marked).vocab == find_tokenizer(pipeline).vocab
    assert find_tokenizer(marked).merges == find_tokenizer(pipeline).merges
    assert read(marked) == read(pipeline)
    for folder in (pipeline, marked):
        to_keras(folder, out=tmp_path / f"keras-{folder.name}")
    kept = [path.name for path in (tmp_path / "keras-plain").glob("*.json")]
    assert kept
    assert contents(tmp_path / "keras-plain", kept) == contents(tmp_path / "keras-marked", kept)


def test_what_is_written_has_no_mark(pipeline: Path, tmp_path: Path) -> None:
    """transformers reads no file with one: what comes from the base is written without."""
    marked = tmp_path / "marked"
    shutil.copytree(pipeline, marked)
    mark(marked)
    to_keras(marked, out=tmp_path / "keras")
    convert(small_base() / "unet.weights.h5", out=tmp_path / "out", base=marked)
    for folder in ("keras", "out"):
        written = [path for path in (tmp_path / folder).rglob("*") if path.suffix in TEXTS]
        assert len(written) > 3
        assert not [path for path in written if path.read_bytes().startswith(codecs.BOM_UTF8)]


def test_checkpoints(tmp_path: Path) -> None:
    """With the kcv2diffusers.json and the tokenizer beside them."""
    marked = tmp_path / "marked"
    shutil.copytree(small_base(), marked)
    assert "kcv2diffusers.json" in mark(marked)
    convert(marked, out=tmp_path / "out")
    assert len(inspect(marked)) == 4


def test_a_vocabulary_of_one_file(tmp_path: Path) -> None:
    """`tokenizer.json`, which transformers 5 saves, and other files beside vocab.json."""
    files = find_tokenizer(small_base() / "tokenizer")
    model = {"vocab": files.vocab, "merges": [merge.split(" ") for merge in files.merges]}
    (tmp_path / "tokenizer.json").write_text(json.dumps({"model": model}))
    mark(tmp_path)
    assert find_tokenizer(tmp_path).vocab == files.vocab


def test_other_files(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    (tmp_path / "run.toml").write_text(
        'instance_images = "a"\ninstance_prompt = "b"\nbase = "tiny"\nout = "o"\n', newline="\r\n"
    )
    (tmp_path / "verification.json").write_text('{"passed": true}')
    (tmp_path / "keras.json").write_text('{"backend": "jax"}')
    (tmp_path / "README.md").write_text("---\nlicense: mit\n---\n")
    assert len(mark(tmp_path)) == 4
    assert make_config({}, tmp_path / "run.toml").instance_prompt == "b"
    assert figures(tmp_path / "verification.json") == [("verdict", "passed")]
    assert license_of(tmp_path) == {"license": "mit"}
    monkeypatch.setenv("KERAS_HOME", str(tmp_path))
    assert backend._configured() == "jax"


@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-32"])
def test_encodings(encoding: str) -> None:
    assert parse_object('{"a": "ä"}'.encode(encoding)) == {"a": "ä"}


@pytest.mark.parametrize("data", [b"", b"\xef\xbb\xbf", b"[]", b"null", b"{", b"\xff\xfe", b"[" * 100_000])
def test_what_is_no_object(data: bytes) -> None:
    assert parse_object(data) is None
