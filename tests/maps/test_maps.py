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
from kcv2diffusers.maps import original, parts, tables
from kcv2diffusers.maps.sizes import Size

MAPS = parts.folders()[0]


@pytest.fixture
def raw() -> dict[str, dict[str, Any]]:
    return {p.stem: tomllib.loads(p.read_text()) for p in MAPS.glob("*.toml")}


def test_every_map_is_complete() -> None:
    """Against the state dicts of the diffusers and transformers that are installed here."""
    results = map_check.check()
    assert [(r.name, r.version, r.tensors) for r in results] == [
        ("clip_g", "any", 517),
        ("clip_l", "any", 197),
        ("mmdit", "sd3", 683),
        ("mmdit", "sd3.5-medium", 909),
        ("mmdit", "sd3.5-large", 1227),
        ("t5", "any", 219),
        ("text_encoder", "sd1", 196),
        ("text_encoder", "sd2", 372),
        ("unet", "sd1", 686),
        ("unet", "sd2", 686),
        ("vae", "any", 248),
        ("vae16", "any", 244),
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
        ("swapped", "down_blocks.0.resnets.0.norm1.weight is used twice"),
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
    results = [result for result in map_check.check() if "original" not in result.name]
    assert len(results) == 2
    for result in results:
        assert report in "\n".join(result.problems)
        assert report in result.text()


def _plant_original(data: dict[str, Any], mistake: str) -> None:
    unet, text = data["unet"]["any"], data["text_encoder"]["sd2"]
    if mistake == "swapped":  # which only diffusers' own converter tells
        unet["rows"][3][1], unet["rows"][5][1] = unet["rows"][5][1], unet["rows"][3][1]
    elif mistake == "twice":
        unet["rows"][3][1] = unet["rows"][5][1]
    elif mistake == "missing row":
        del unet["rows"][2]
    elif mistake == "typo":
        unet["rows"][2][0] = "conv_inn"
    elif mistake == "wrong leaf":
        unet["blocks"]["res_block"][0][0] = "norm3"
    elif mistake == "missing piece":
        text["blocks"]["resblock"][1][0] = "self_attn.q_proj self_attn.k_proj self_attn.x_proj"
    elif mistake == "order":  # of q, k and v, which have one shape
        text["blocks"]["resblock"][1][0] = "self_attn.k_proj self_attn.q_proj self_attn.v_proj"


@pytest.mark.parametrize(
    ("mistake", "report"),
    [
        ("swapped", "diffusers does not read down_blocks.0.resnets.0.norm1.weight"),
        ("twice", "are both input_blocks.2.0"),
        ("missing row", "no row of the original layout names conv_in.weight"),
        ("typo", "row conv_inn of the original layout names no tensor"),
        ("wrong leaf", "norm3 in block res_block of the original layout names no tensor"),
        ("missing piece", "attn.in_proj_weight: no tensor is piece 2"),
        ("order", "diffusers does not read text_model.encoder.layers.0.self_attn.q_proj.weight"),
    ],
)
def test_planted_mistakes_in_the_original_layout_are_found(monkeypatch, mistake: str, report: str) -> None:
    data = {path.stem: tomllib.loads(path.read_text()) for path in (MAPS / "original").glob("*.toml")}
    _plant_original(data, mistake)
    namings = {name: original.load(name, entry) for name, entry in data.items()}
    monkeypatch.setattr(
        map_check, "naming", lambda name, version: namings[name].get(version) or namings[name]["any"]
    )
    changed = {name: tables.tables()[name] for name in ("unet", "text_encoder")}
    monkeypatch.setattr(map_check, "tables", lambda: changed)
    found = "\n".join(problem for result in map_check.check() for problem in result.problems)
    assert report in found


def test_show_and_list() -> None:
    shown = map_check.show("unet", "sd1")
    assert "time_embedding.linear_1.weight [1280, 320]" in shown
    assert len(shown.splitlines()) == 687
    listed = map_check.listing().splitlines()
    assert [line.split()[0] for line in listed] == sorted(path.stem for path in MAPS.glob("*.toml"))
    assert next(line for line in listed if line.startswith("vae ")).split()[-3:-1] == ["SD1", "SD2"]
    assert "SD3 SD3.5-MEDIUM SD3.5-LARGE" in next(line for line in listed if line.startswith("clip_l "))
    with pytest.raises(Error, match="No map named 'nope'"):
        map_check.show("nope")
    with pytest.raises(Error, match="no version 'sd3'"):
        map_check.show("unet", "sd3")


@pytest.mark.parametrize(
    ("component", "version", "target", "name", "shape"),
    [  # as the files that Stability AI and Runway published have them
        ("unet", "sd1", "conv_in.weight", "model.diffusion_model.input_blocks.0.0.weight", (320, 4, 3, 3)),
        (
            "unet",
            "sd2",
            "down_blocks.0.attentions.1.transformer_blocks.0.attn2.to_k.weight",
            "model.diffusion_model.input_blocks.2.1.transformer_blocks.0.attn2.to_k.weight",
            (320, 1024),
        ),
        (
            "unet",
            "sd1",
            "up_blocks.0.upsamplers.0.conv.bias",
            "model.diffusion_model.output_blocks.2.1.conv.bias",
            (1280,),
        ),
        (
            "vae",
            "any",
            "decoder.mid_block.attentions.0.to_out.0.weight",
            "first_stage_model.decoder.mid.attn_1.proj_out.weight",
            (512, 512, 1, 1),
        ),
        (
            "text_encoder",
            "sd1",
            "text_model.embeddings.position_embedding.weight",
            "cond_stage_model.transformer.text_model.embeddings.position_embedding.weight",
            (77, 768),
        ),
        (
            "text_encoder",
            "sd2",
            "text_model.embeddings.position_embedding.weight",
            "cond_stage_model.model.positional_embedding",
            (77, 1024),
        ),
        (
            "text_encoder",
            "sd2",
            "text_model.encoder.layers.22.self_attn.k_proj.weight",
            "cond_stage_model.model.transformer.resblocks.22.attn.in_proj_weight",
            (3072, 1024),
        ),
    ],
)
def test_names_and_shapes_of_published_files(component, version, target, name, shape) -> None:
    shapes, _ = map_check._shapes(tables.tables()[component], version if component != "vae" else "any")
    named = original.naming(component, version)
    place = named.place(target)
    assert place is not None and (named.prefix + place.name, place.shape(shapes[target])) == (name, shape)


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
