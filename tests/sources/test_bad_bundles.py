"""Damaged shards, TensorFlow checkpoints and SavedModels are refused."""

from __future__ import annotations

import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
from support.bad_input import LAST_NORM, Cli, alone, bundle

from kcv2diffusers.sources.open import open_sources

pytest_plugins = ["support.bad_input"]


# Shards, bundles and SavedModels.


def test_a_missing_shard(cli: Cli, copy: Callable[..., Path], home: Path) -> None:
    path = copy("sharded.weights.json")
    path.with_name("sharded_00001.weights.h5").unlink()
    message = cli.refuses(*alone(path, home), watch=home, names=path)
    assert "its shard sharded_00001.weights.h5 is missing." in message


def test_a_damaged_shard_is_named(cli: Cli, copy: Callable[..., Path], home: Path) -> None:
    path = copy("sharded.weights.json")
    shard = path.with_name("sharded_00001.weights.h5")
    shard.write_bytes(shard.read_bytes()[:-100])
    assert "cut short" in cli.refuses(*alone(path, home), watch=home, names=shard)


@pytest.mark.parametrize("name", ["../evil.weights.h5", "/etc/passwd", "..", "", ".", None, 3, ["a", "../b"]])
def test_a_shard_elsewhere(cli: Cli, copy: Callable[..., Path], home: Path, name: object) -> None:
    path = copy("sharded.weights.json")
    shutil.copy(path.with_name("sharded_00001.weights.h5"), path.parent.parent / "evil.weights.h5")
    index = json.loads(path.read_text())
    index["weight_map"][LAST_NORM] = name
    path.write_text(json.dumps(index))
    message = cli.refuses(*alone(path, home), watch=home, names=path)
    assert "is not a file beside it" in message or "its shard a is missing" in message


@pytest.mark.parametrize("text", ["", "{", "[]", "{}", '{"weight_map": []}', "[" * 100_000, '{"a": NaN}'])
def test_a_bad_index_of_shards(cli: Cli, copy: Callable[..., Path], home: Path, text: str) -> None:
    path = copy("sharded.weights.json")
    path.write_text(text)
    cli.refuses(*alone(path, home), watch=home, names=path)


@pytest.mark.parametrize("container", ["export", "checkpoint"])
def test_a_tensor_with_a_wrong_checksum(
    cli: Cli, copy: Callable[..., Path], home: Path, container: str
) -> None:
    path = copy(container)
    _, data = bundle(path)
    tensor = next(t for source in open_sources(path) for t in source.tensors if t.nbytes > 5000)
    stored = bytearray(data.read_bytes())
    stored[tensor.offset + 1234] ^= 4
    data.write_bytes(stored)
    message = cli.refuses(*alone(path, home), watch=home, names=data)
    assert "the checksum does not match, the file is damaged." in message.replace(";", ",")


@pytest.mark.parametrize("container", ["export", "checkpoint"])
@pytest.mark.parametrize("damage", ["no data", "no index", "data cut", "index cut", "index byte", "empty"])
def test_damaged_bundles(
    cli: Cli, copy: Callable[..., Path], home: Path, container: str, damage: str
) -> None:
    path = copy(container)
    index, data = bundle(path)
    culprit = index if "index" in damage or damage == "empty" else data
    if damage.startswith("no "):
        culprit.unlink()
    elif damage == "empty":
        culprit.write_bytes(b"")
    elif damage == "index byte":
        stored = bytearray(culprit.read_bytes())
        stored[100] ^= 1
        culprit.write_bytes(stored)
    else:
        culprit.write_bytes(culprit.read_bytes()[:-1000])
    named = path if damage == "no index" else culprit
    cli.refuses(*alone(path, home), watch=home, names=named)
