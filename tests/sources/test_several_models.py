"""Checkpoints of several models, and of what holds a model: a trainer, another model, tf.train.Checkpoint.

Every network in them is found and converted bit for bit, and every other tensor is named or refused.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Callable
from pathlib import Path

import h5py
import numpy as np
import pytest
from support.checkpoints import cached

from kcv2diffusers.conversion.inspection import inspect
from kcv2diffusers.conversion.to_diffusers import convert
from kcv2diffusers.errors import Error, PlanError
from kcv2diffusers.sources.diffusers_pipeline import read_safetensors
from kcv2diffusers.sources.gather import add_part
from kcv2diffusers.sources.leftovers import kind_of
from kcv2diffusers.sources.locate import TINY, locate
from kcv2diffusers.sources.open import open_sources
from kcv2diffusers.sources.recognise import Match, recognise_all
from kcv2diffusers.sources.tensor import Tensor
from kcv2diffusers.targets.safetensors import common_dtype, diffusers_entries, write_safetensors
from kcv2diffusers.targets.stream import run

STACKS = ("keras3", "keras2", "sprint")
TEXT, BOTH = {"text_encoder": ""}, {"text_encoder": "", "vae_encoder": ""}
ALL = {"unet": "", **BOTH}
# The networks in each wrapping of support/kerascv/make_wrappers.py, with the suffix of what they must become.
LIGHT = {
    "one": TEXT,
    "functional": TEXT,
    "nested": BOTH,
    "deep": TEXT,
    "pair": BOTH,
    "frozen": {"text_encoder": "", "vae_encoder": "-8"},
}
REFUSED = ("ema", "twice", "stranger")
CONTAINERS = {
    "keras3": {"weights.weights.h5", "model.keras", "export", "manager"},
    "keras2": {"weights.weights.h5", "model.keras", "legacy.h5", "saved_model", "tf", "manager"},
    "sprint": {"weights.weights.h5", "legacy.h5", "saved_model", "tf", "manager"},
}
UNET_CONTAINERS = {
    "keras3-torch": {"weights.weights.h5"},
    "keras2": {"weights.weights.h5", "legacy.h5", "tf", "manager"},
}


def wrapped(stack: str, name: str) -> Path:
    """The folder of one wrapping in every container; a container may be a folder with a checkpoint."""
    return cached(stack, "make_wrappers.py", *LIGHT, *REFUSED) / name


def with_a_unet(stack: str) -> Path:
    """The same of what holds a UNet; Keras 3 builds it faster on PyTorch, which writes no SavedModel."""
    beside = ["side-by-side"] if stack == "keras2" else []
    return cached(stack, "make_wrappers.py", "three", *beside)


def checkpoints_of(folder: Path) -> dict[str, Path]:
    found = {}
    for path in folder.iterdir():
        index = [] if (path / "saved_model.pb").exists() else sorted(path.glob("*.index"))
        found[path.name] = index[0].with_suffix("") if index else path
    return found


def digests(match: Match, out: Path) -> dict[str, list[object]]:
    entries = diffusers_entries(match.require_complete())
    assert run(write_safetensors(out, entries, common_dtype(entry.tensor for entry in entries))) == []
    data = out.read_bytes()
    return {
        t.name: [list(t.shape), hashlib.sha256(data[t.offset : t.offset + t.nbytes]).hexdigest()]
        for t in read_safetensors(out)
    }


def check(folder: Path, name: str, networks: dict[str, str], out: Path) -> None:
    """Each network once, bit for bit, and nothing that is not of a known kind."""
    path = checkpoints_of(folder)[name]
    matches = recognise_all(open_sources(path))
    assert sorted(match.part for match in matches) == sorted(networks)
    expected = {
        part: json.loads((folder.parent / f"expected-{part}{suffix}.json").read_text())
        for part, suffix in networks.items()
    }
    for match in matches:
        assert digests(match, out) == expected[match.part], (name, match.place)
        trained = {"optimizer state"} if folder.name == "pair" else set()
        assert match.leftovers.keys() <= trained | ({"counters"} if name == "manager" else set())
        if trained and name in ("weights.weights.h5", "manager", "tf"):
            assert len(match.leftovers["optimizer state"]) >= 2 * sum(map(len, expected.values()))
    if name == "manager":
        assert all(len(match.leftovers["counters"]) == 2 for match in matches)  # step and save_counter


@pytest.mark.slow
@pytest.mark.parametrize("name", LIGHT)
@pytest.mark.parametrize("stack", STACKS)
def test_every_network_is_found(stack: str, name: str, tmp_path: Path) -> None:
    folder = wrapped(stack, name)
    containers = {*checkpoints_of(folder)} - {"model.h5"}
    assert containers >= CONTAINERS[stack] - ({"model.keras"} if stack == "sprint" else set())
    for container in checkpoints_of(folder):
        check(folder, container, LIGHT[name], tmp_path / "out.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("stack", UNET_CONTAINERS)
def test_a_trainer_with_a_unet(stack: str, tmp_path: Path) -> None:
    folder = with_a_unet(stack) / "three"
    assert {*checkpoints_of(folder)} >= UNET_CONTAINERS[stack]
    for container in UNET_CONTAINERS[stack]:
        check(folder, container, ALL, tmp_path / "out.safetensors")


@pytest.mark.slow
@pytest.mark.parametrize("stack", ["keras3", "keras2"])
def test_networks_without_a_model_around_them(stack: str) -> None:
    """In Keras 3 TensorFlow does not see what a layer of the UNet keeps in a list."""
    made = with_a_unet(stack) if stack == "keras2" else cached(stack, "make_wrappers.py", "side-by-side")
    beside = recognise_all(open_sources(made / "side-by-side" / "ckpt"))
    assert {match.part for match in beside} == ({"text_encoder"} if stack == "keras3" else {*ALL})
    assert [*beside[0].leftovers] == ["counters"]


@pytest.mark.slow
@pytest.mark.parametrize("stack", STACKS)
def test_a_moving_average_is_left_out(stack: str, tmp_path: Path) -> None:
    """Where a container keeps its name; else there are two, and neither is taken."""
    folder = wrapped(stack, "ema")
    named = {"weights.weights.h5", "manager", "tf", "saved_model"} & {*checkpoints_of(folder)}
    for name in named:
        (match, *others) = recognise_all(open_sources(checkpoints_of(folder)[name]))
        if others:
            assert "ema" not in match.source.inside
            continue
        expected = json.loads((folder.parent / "expected-text_encoder.json").read_text())
        assert len(match.leftovers["EMA copies"]) == len(expected)
        assert digests(match, tmp_path / "out.safetensors") == expected


@pytest.mark.parametrize("stack", STACKS)
def test_two_of_a_part_are_refused(stack: str) -> None:
    for path in checkpoints_of(wrapped(stack, "twice")).values():
        first, second = recognise_all(open_sources(path))
        assert first.place != second.place
        with pytest.raises(Error, match=r"Two text encoders: .* and .*\.\nSave the one that is wanted"):
            parts: dict[str, Match] = {}
            add_part(parts, first)
            add_part(parts, second)


@pytest.mark.parametrize("stack", STACKS)
def test_a_network_of_no_part_is_refused(stack: str) -> None:
    for path in checkpoints_of(wrapped(stack, "stranger")).values():
        (match,) = recognise_all(open_sources(path))
        with pytest.raises(PlanError, match=r"(belong to no part|unexpected) \(4\)"):
            match.require_complete()
        (seen,) = inspect(path)
        assert seen.problems is not None and "[3, 5]" in seen.problems


# A trainer of the tiny base, put together without Keras.


@pytest.fixture(scope="module")
def plain(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return convert(TINY, out=tmp_path_factory.mktemp("plain") / "pipeline").out


Make = Callable[..., Path]


@pytest.fixture
def trainer(tmp_path: Path) -> Make:
    """A .weights.h5 with files of the tiny base at the places given, and other tensors."""

    def make(places: dict[str, str], **others: list[int]) -> Path:
        path = tmp_path / "trainer.weights.h5"
        with h5py.File(path, "w") as file:
            for place, part in places.items():
                with h5py.File(locate(TINY) / f"{part}.weights.h5") as source:
                    source.copy("layers", file, f"{place}/layers")
            for name, shape in others.items():
                file[name.replace("__", "/")] = np.ones(shape, "f4")
        (tmp_path / "kcv2diffusers.json").write_bytes((locate(TINY) / "kcv2diffusers.json").read_bytes())
        return path

    return make


def test_convert_names_what_it_leaves_out(trainer: Make, plain: Path, tmp_path: Path) -> None:
    places = {"a/unet": "unet", "b/c/d/text": "text_encoder", "ema_unet": "unet"}
    path = trainer(places, optimizer__vars__0=[3], optimizer__vars__1=[4, 4], step__vars__0=[1])
    done = convert(path, out=tmp_path / "out", base=TINY)
    for name in ("unet/diffusion_pytorch_model.safetensors", "text_encoder/model.safetensors"):
        assert (tmp_path / "out" / name).read_bytes() == (plain / name).read_bytes()
    (note,) = (note for note in done.notes if note.startswith("Left out of"))
    assert "EMA copies (" in note and "optimizer state (2 tensors" in note and "counters (1 tensor," in note
    assert "trainer.weights.h5 (a/unet)" in done.parts["unet"]
    record = json.loads((tmp_path / "out" / "conversion.json").read_text())["parts"]
    assert record["unet"]["inside"] == "a/unet" and record["text_encoder"]["inside"] == "b/c/d/text"
    assert record["unet"]["left_out"] == {"EMA copies": 688, "optimizer state": 2, "counters": 1}
    assert "left_out" not in record["vae_decoder"]


def test_inspect_names_what_is_not_a_part(trainer: Make) -> None:
    path = trainer({"model": "text_encoder"}, optimizer__vars__0=[3])
    (seen,) = inspect(path)
    assert (seen.part, seen.inside, seen.problems) == ("text_encoder", "model", None)
    assert seen.left_out == {"optimizer state": 1} == seen.to_dict()["left_out"]
    assert f"{path} (model)\n" in seen.text()
    assert "not a part: optimizer state (1 tensor, 0.00 MB)" in seen.text()


def test_an_average_that_is_alone_is_the_model(trainer: Make) -> None:
    (match,) = recognise_all(open_sources(trainer({"ema_model": "text_encoder"})))
    assert match.part == "text_encoder" and not match.problems and not match.leftovers


def test_strangers_are_refused(trainer: Make, tmp_path: Path) -> None:
    path = trainer({"model": "text_encoder"}, head__vars__0=[3, 9])
    with pytest.raises(PlanError) as refused:
        convert(path, out=tmp_path / "out", base=TINY)
    assert "head/vars/0 [3, 9]" in str(refused.value) and "belong to no part (1)" in str(refused.value)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("optimizer/vars/3", "optimizer state"),
        ("optimizer_weights/Adam/m/dense/kernel:0", "optimizer state"),
        ("a/kernel/.OPTIMIZER_SLOT/opt/m/.ATTRIBUTES/VARIABLE_VALUE", "optimizer state"),
        ("unet_optimizer/_variables/3/.ATTRIBUTES/VARIABLE_VALUE", "optimizer state"),
        ("loss_scale/current_loss_scale/.ATTRIBUTES/VARIABLE_VALUE", "optimizer state"),
        ("ema/layers/dense/vars/0", "EMA copies"),
        ("unet_ema/dense/kernel", "EMA copies"),
        ("loss_tracker/vars/0", "metrics"),
        ("layers/dropout/seed_generator/vars/0", "random seeds"),
        ("save_counter/.ATTRIBUTES/VARIABLE_VALUE", "counters"),
        ("global_step", "counters"),
        ("time_embedding/steps_embedding/vars/0", None),
        ("layers/schema/vars/0", None),
        ("classifier/kernel:0", None),
        ("cadam/kernel:0", None),
    ],
)
def test_kinds_of_leftovers(name: str, kind: str | None) -> None:
    assert kind_of(Tensor(name, (4, 4), np.dtype("f4"), Path("x"), 0)) == kind
