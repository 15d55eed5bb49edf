"""The weight maps: read, expanded, checked; planted mistakes are found."""

from __future__ import annotations

import copy
import tomllib
from typing import Any

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kcv2diffusers.conversion import map_check
from kcv2diffusers.errors import Error
from kcv2diffusers.maps import parts, tables
from kcv2diffusers.maps.tables import Size


@pytest.fixture
def raw() -> dict[str, dict[str, Any]]:
    return {p.stem: tomllib.loads(p.read_text()) for p in parts.folders()[0].glob("*.toml")}


def test_every_map_is_complete() -> None:
    """Against the state dicts of the diffusers and transformers that are installed here."""
    results = map_check.check()
    assert [(r.name, r.version, r.tensors) for r in results] == [
        ("text_encoder", "sd1", 196),
        ("text_encoder", "sd2", 372),
        ("unet", "sd1", 686),
        ("unet", "sd2", 686),
        ("vae", "any", 248),
        ("text_encoder, original layout", "sd1", 196),
        ("text_encoder, original layout", "sd2", 372),
        ("unet, original layout", "sd1", 686),
        ("unet, original layout", "sd2", 686),
        ("vae, original layout", "any", 248),
    ]
    assert all(result.compared and not result.problems for result in results)


def _plant(data: dict[str, Any], mistake: str) -> None:
    rows = data["parts"]["unet"]["rows"]
    if mistake == "swapped":
        rows[3][1], rows[5][1] = rows[5][1], rows[3][1]
        rows[3][1] = rows[5][1]
    elif mistake == "missing row":
        del rows[10]
    elif mistake == "typo":
        rows[1][1] = "conv_inn"
    elif mistake == "wrong size":
        rows[4][2] = "c1"
    elif mistake == "wrong layout":
        data["blocks"]["res_block"]["leaves"][2][2] = "dense_no_bias"
    elif mistake == "source twice":
        data["blocks"]["res_block"]["leaves"][3][0] = "entry_flow/group_normalization"
    elif mistake == "unused block":
        data["blocks"]["extra"] = {"params": [], "leaves": []}
    elif mistake == "undefined size":
        rows[1][2] = "3 latnet c0"


@pytest.mark.parametrize(
    ("mistake", "report"),
    [
        ("swapped", "produced twice"),
        ("missing row", "nothing produces down_blocks.1"),
        ("typo", "the library has no conv_inn.weight"),
        ("wrong size", "shape"),
        ("wrong layout", "nothing produces down_blocks.0.resnets.0.time_emb_proj.bias"),
        ("source twice", "is used twice"),
        ("unused block", "block extra is used by no row"),
        ("undefined size", "size latnet is not defined"),
    ],
)
def test_planted_mistakes_are_found(raw, monkeypatch, mistake: str, report: str) -> None:
    data = copy.deepcopy(raw["unet"])
    _plant(data, mistake)
    table = tables._load("unet", data)
    monkeypatch.setattr(map_check, "tables", lambda: {"unet": table})
    monkeypatch.setattr(map_check, "specs", lambda: [tables.Spec("unet", v, table) for v in table.versions])
    for result in map_check.check():
        assert report in "\n".join(result.problems)
        assert report in result.text()


def test_show_and_list() -> None:
    shown = map_check.show("unet", "sd1")
    assert "time_embedding.linear_1.weight [1280, 320]" in shown
    assert len(shown.splitlines()) == 687
    assert [line.split()[0] for line in map_check.listing().splitlines()] == ["text_encoder", "unet", "vae"]
    with pytest.raises(Error, match="No map named 'nope'"):
        map_check.show("nope")
    with pytest.raises(Error, match="no version 'sd3'"):
        map_check.show("unet", "sd3")


symbols = st.sampled_from(["c0", "c1", "width"])


@given(st.lists(st.tuples(st.integers(1, 9), symbols), min_size=1, max_size=4), st.integers(0, 9))
def test_sizes(terms: list[tuple[int, str]], constant: int) -> None:
    dims = {"c0": 3, "c1": 5, "width": 7}
    size = Size.parse("+".join([*(f"{count}*{symbol}" for count, symbol in terms), str(constant)]))
    assert size.value(dims) == sum(count * dims[symbol] for count, symbol in terms) + constant
    assert Size.parse(str(size)).value(dims) == size.value(dims)
    outer = Size.parse("2*x+c0").substitute({"x": size})
    assert outer.value(dims) == 2 * (size.value(dims) or 0) + 3
    assert size.value({}) is None


@pytest.mark.parametrize("text", ["", "c0-1", "a b", "*c0", "c0*", "x.y"])
def test_what_is_not_a_size(text: str) -> None:
    with pytest.raises(ValueError):
        Size.parse(text)
