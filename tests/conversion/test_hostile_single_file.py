"""Damaged and hostile single files: each is read or refused with an `Error`, and nothing is left behind."""

from __future__ import annotations

import json
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from safetensors.numpy import load_file
from support.random_pipelines import TOKENIZER, random_pipeline

from kcv2diffusers import convert, inspect
from kcv2diffusers.errors import Error, SourceError

Header = dict[str, Any]
NAME = "model.diffusion_model.input_blocks.0.0.bias"
OTHER = "model.diffusion_model.out.2.bias"


@pytest.fixture(scope="module")
def file(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A sound file. Tests do not change it."""
    folder = tmp_path_factory.mktemp("sound")
    convert(random_pipeline(folder / "pipeline"), out=folder / "sound.safetensors", dtype="fp16")
    return folder / "sound.safetensors"


def parts_of(content: bytes) -> tuple[Header, bytes]:
    """The header of a file, and the bytes behind it."""
    end = 8 + int.from_bytes(content[:8], "little")
    return json.loads(content[8:end]), content[end:]


def whole(text: bytes, rest: bytes, length: int | None = None) -> bytes:
    return (len(text) if length is None else length).to_bytes(8, "little") + text + rest


def refused(content: bytes, folder: Path) -> str:
    """What is said of a file of these bytes; it must be two lines, from `inspect` and `convert` alike."""
    damaged = folder / "damaged.safetensors"
    damaged.write_bytes(content)
    with pytest.raises(SourceError) as inspected:
        inspect(damaged)
    with pytest.raises(SourceError) as converted:
        convert(damaged, out=folder / "out", tokenizer=TOKENIZER)
    with pytest.raises(SourceError):
        convert(damaged, out=folder / "out.safetensors")
    message = str(inspected.value)
    assert message == str(converted.value)
    assert len(message.splitlines()) == 2 and message.isprintable() is False  # a line break and no more
    assert all(line.isprintable() for line in message.splitlines())
    assert [path.name for path in folder.iterdir()] == [damaged.name]
    return message


def entry(**values: Any) -> Callable[[Header], None]:
    """A change of the entry of one tensor."""
    return lambda header: header[NAME].update(values)


def same_place(header: Header) -> None:
    header[OTHER] = dict(header[NAME], shape=header[OTHER]["shape"])
    header[OTHER]["data_offsets"] = [header[NAME]["data_offsets"][0]] * 2
    header[OTHER]["data_offsets"][1] += 2 * header[OTHER]["shape"][0]


CHANGES: dict[str, Callable[[Header], None]] = {
    "offsets that overlap": same_place,
    "offsets the wrong way round": lambda h: h[NAME]["data_offsets"].reverse(),
    "offsets behind the end": entry(data_offsets=[1 << 40, (1 << 40) + 16]),
    "negative offsets": entry(data_offsets=[-16, 0]),
    "offsets that are no numbers": entry(data_offsets=["a", "b"]),
    "a gap": lambda h: h.pop(NAME) and None,
    "a size that lies": entry(shape=[9]),
    "a size of all memory": entry(shape=[1 << 62, 4]),
    "a negative size": entry(shape=[-8]),
    "a size that is no number": entry(shape=["8"]),
    "a shape that is none": entry(shape=8),
    "an unknown dtype": entry(dtype="F7"),
    "a dtype that lies": entry(dtype="F64"),
    "a dtype that no model has": lambda h: h[NAME].update(dtype="BOOL", shape=[16]),
    "no dtype": lambda h: h[NAME].pop("dtype") and None,
    "an entry that is none": lambda h: h.update({NAME: []}),
    "metadata that are none": lambda h: h.update(__metadata__=[1]),
    "metadata of numbers": lambda h: h.update(__metadata__={"a": 1}),
    "metadata of ours that are none": lambda h: h["__metadata__"].update(kcv2diffusers="[]"),
    "nothing": lambda h: h.clear(),
}


@pytest.mark.parametrize("change", CHANGES)
def test_headers_that_lie(change: str, file: Path, tmp_path: Path) -> None:
    header, rest = parts_of(file.read_bytes())
    CHANGES[change](header)
    if change == "metadata of ours that are none":  # the weights are sound, and inspect shows them
        (tmp_path / "file.safetensors").write_bytes(whole(json.dumps(header).encode(), rest))
        with pytest.raises(SourceError, match="not what convert writes"):
            convert(tmp_path / "file.safetensors", out=tmp_path / "out", tokenizer=TOKENIZER)
        return
    refused(whole(json.dumps(header).encode(), rest), tmp_path)


def test_a_name_that_is_there_twice(file: Path, tmp_path: Path) -> None:
    """Each with the same place, so that the safetensors library sees nothing wrong."""
    content = file.read_bytes()
    header, rest = parts_of(content)
    text = json.dumps(header)
    twice = text[:-1] + f", {json.dumps(NAME)}: {json.dumps(header[NAME])}}}"
    assert f"{NAME} is there twice" in refused(whole(twice.encode(), rest), tmp_path)


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"\0",
        b"\0" * 8,
        whole(b"{}", b""),
        whole(b"[]", b""),
        whole(b"{", b""),
        whole(b"{}", b"", length=1 << 62),
        whole(b"{}", b"", length=(1 << 64) - 1),
        whole(b"{}", b"", length=200_000_000),
        whole(b"\xff" * 100, b""),
        whole(b'{"a":' * 50_000 + b"1" + b"}" * 50_000, b""),
        whole(b"[" * 100_000, b""),
        whole(b'{"a":{"dtype":"F32","shape":[],"data_offsets":[0,' + b"9" * 5000 + b"]}}", b""),
        whole(b'{"a":{"dtype":"F32","shape":[NaN],"data_offsets":[0,4]}}', b"\0" * 4),
        whole(b'{"\\u001b[31m\\n":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
        whole(b'{"\\ud800":{"dtype":"F32","shape":[1],"data_offsets":[0,4]}}', b"\0" * 4),
    ],
    ids=str,
)
def test_what_is_no_file(content: bytes, tmp_path: Path) -> None:
    refused(content, tmp_path)


@pytest.mark.slow
def test_more_tensors_than_any_model_has(tmp_path: Path) -> None:
    """Of no bytes each, in a header of some megabytes."""
    names = (f"model.diffusion_model.input_blocks.0.{n}.weight" for n in range(100_000))
    empty = {name: {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for name in names}
    assert "more than any model here has" in refused(whole(json.dumps(empty).encode(), b""), tmp_path)


@pytest.mark.slow
def test_as_many_layers_as_it_claims_are_not_expected(tmp_path: Path) -> None:
    layer = "cond_stage_model.transformer.text_model.encoder.layers.{}.layer_norm1.weight"
    empty = {layer.format(n): {"dtype": "F32", "shape": [0], "data_offsets": [0, 0]} for n in range(19_000)}
    refused(whole(json.dumps(empty).encode(), b""), tmp_path)


def test_truncated_files(file: Path, tmp_path: Path) -> None:
    content = file.read_bytes()
    chosen = random.Random(0)
    for size in [*range(0, 24, 4), *(chosen.randrange(len(content)) for _ in range(40)), len(content) - 1]:
        refused(content[:size], tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("seed", range(4))
def test_mutated_files(seed: int, file: Path, tmp_path: Path) -> None:
    """Bytes of the header changed, a thousand times in all: a file that is read has the tensors of the sound
    one, any other is refused.
    """
    content = file.read_bytes()
    end = 8 + int.from_bytes(content[:8], "little")
    sound = load_file(file)
    chosen = random.Random(seed)
    read = 0
    for _ in range(250):
        damaged = bytearray(content)
        for _ in range(chosen.choice([1, 1, 2, 5])):
            damaged[chosen.randrange(end)] = chosen.choice([0, 0x22, 0x2C, 0x30, 0x39, 0x5B, 0x7B, 0xFF])
        path = tmp_path / "damaged.safetensors"
        path.write_bytes(damaged)
        try:
            convert(path, out=tmp_path / "out.safetensors", allow_nonfinite=True)
        except Error as error:
            assert str(error)
        else:
            read += 1
            made = load_file(tmp_path / "out.safetensors")
            assert {name: t.shape for name, t in made.items()} == {name: t.shape for name, t in sound.items()}
            (tmp_path / "out.safetensors").unlink()
        assert [left.name for left in tmp_path.iterdir()] == [path.name]
    assert read < 150  # changes in the metadata harm nothing


def test_a_file_that_is_cut_while_it_is_read(file: Path, tmp_path: Path) -> None:
    """After its header was read: the end is missed, and nothing is left."""
    from kcv2diffusers.conversion import to_single_file

    copy = tmp_path / "copy.safetensors"
    content = file.read_bytes()
    copy.write_bytes(content)
    original = to_single_file.modelspec

    def cut(**arguments: Any) -> dict[str, str]:
        copy.write_bytes(content[: len(content) // 2])
        return original(**arguments)

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(to_single_file, "modelspec", cut)
        with pytest.raises(Error):
            convert(copy, out=tmp_path / "out.safetensors")
    assert [left.name for left in tmp_path.iterdir()] == [copy.name]
