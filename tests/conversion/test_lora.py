"""LoRA files: both spellings into each other, and merged into weights."""

from __future__ import annotations

import hashlib
import json
import random
import re
import subprocess
import sys
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import google_crc32c
import numpy as np
import pytest
from safetensors import safe_open
from safetensors.numpy import load_file
from support.loras import KOHYA, WEIGHTS, Tensors, kernels, kohya, save
from support.random_pipelines import random_pipeline

from kcv2diffusers import convert, convert_lora, extract_lora, generate, inspect, to_keras
from kcv2diffusers.errors import Error
from kcv2diffusers.maps.original import naming
from kcv2diffusers.sources.lora import read_lora
from kcv2diffusers.sources.lora_names import parse_name
from kcv2diffusers.sources.tensor import Tensor
from kcv2diffusers.targets.lora_merge import _load, parse_strength

VERSIONS = ("sd1", "sd2")


@pytest.fixture(scope="module")
def pipelines(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """A small pipeline of each version. Tests do not change them."""
    folder = tmp_path_factory.mktemp("pipelines")
    return {version: random_pipeline(folder / version, version) for version in VERSIONS}


def same(one: Tensors, other: Tensors) -> bool:
    return one.keys() == other.keys() and all(
        (tensor.dtype, tensor.shape, tensor.tobytes())
        == (other[name].dtype, other[name].shape, other[name].tobytes())
        for name, tensor in one.items()
    )


def metadata_of(file: Path) -> dict[str, str]:
    with safe_open(file, framework="numpy") as opened:
        return dict(opened.metadata())


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("alpha", [4, 3, 0.1])
@pytest.mark.parametrize("version", VERSIONS)
def test_round_trip_is_identity(version: str, alpha: float, dtype: str, pipelines, tmp_path: Path) -> None:
    """kohya -> diffusers -> kohya: every layer of the UNet and the text encoder, convolutions too."""
    tensors = kohya(pipelines[version], alpha=alpha, dtype=dtype)
    save(tensors, tmp_path / "kohya.safetensors", {"ss_tag_frequency": "sks dog"})
    there = convert_lora(tmp_path / "kohya.safetensors", out=tmp_path / "diffusers.safetensors")
    back = convert_lora(there.out, out=tmp_path / "back.safetensors")
    assert (there.source_format, there.format, back.format) == ("kohya", "diffusers", "kohya")
    assert same(load_file(back.out), tensors)
    assert metadata_of(back.out)["ss_tag_frequency"] == "sks dog"
    again = convert_lora(back.out, out=tmp_path / "again.safetensors")
    assert again.out.read_bytes() == there.out.read_bytes()
    names = {f"{c}.{m}.lora_{f}.weight" for c, m in kernels(pipelines[version]) for f in "AB"}
    assert load_file(there.out).keys() == names
    assert ("lora_adapter_metadata" in metadata_of(there.out)) == (alpha != 4)
    assert back.to_dict()["modules"] == {
        component: sum(c == component for c, _ in kernels(pipelines[version])) for component in KOHYA
    }


OLDER: list[tuple[str, Callable[[str, str], str]]] = [
    ("lora.down and lora.up", lambda m, f: f"{m}.lora.{f}.weight"),
    ("lora_linear_layer", lambda m, f: f"{m}.lora_linear_layer.{f}.weight"),
    ("kohya's factors", lambda m, f: f"{m}.lora_{f}.weight"),
    ("PEFT's own", lambda m, f: f"{m}.lora_{'A' if f == 'down' else 'B'}.default.weight"),
    (
        "attention processors",
        lambda m, f: f"{processor(m)}_lora.{f}.weight" if re.search(r"attn", m) else f"{m}.lora.{f}.weight",
    ),
]


def processor(module: str) -> str:
    """How diffusers named the projections of attention in 2023."""
    if module.startswith("text_encoder"):
        return (
            module.replace("out_proj", "to_out")
            .replace("_proj", "")
            .replace("attn.", "attn.to_")
            .replace("to_to_", "to_")
        )
    return re.sub(r"(attn\d)\.(to_\w+)(\.0)?", r"\1.processor.\2", module)


@pytest.mark.parametrize(("_", "name"), OLDER, ids=[name for name, _ in OLDER])
def test_older_spellings_are_read(_, name: Callable[[str, str], str], pipelines, tmp_path: Path) -> None:
    modern = kohya(pipelines["sd1"], alpha=4)
    save(modern, tmp_path / "kohya.safetensors")
    older = {}
    for component, module in kernels(pipelines["sd1"]):
        flat = KOHYA[component] + module.replace(".", "_")
        for factor in ("down", "up"):
            older[name(f"{component}.{module}", factor)] = modern[f"{flat}.lora_{factor}.weight"]
    save(older, tmp_path / "older.safetensors")
    convert_lora(tmp_path / "older.safetensors", out=tmp_path / "out.safetensors", format="kohya")
    assert same(load_file(tmp_path / "out.safetensors"), modern)


def test_a_file_of_the_unet_alone_may_go_without_a_prefix(pipelines, tmp_path: Path) -> None:
    modern = {n: t for n, t in kohya(pipelines["sd1"], alpha=4).items() if n.startswith("lora_unet_")}
    save(modern, tmp_path / "kohya.safetensors")
    convert_lora(tmp_path / "kohya.safetensors", out=tmp_path / "diffusers.safetensors")
    bare = {n.removeprefix("unet."): t for n, t in load_file(tmp_path / "diffusers.safetensors").items()}
    save(bare, tmp_path / "bare.safetensors")
    convert_lora(tmp_path / "bare.safetensors", out=tmp_path / "out.safetensors")
    assert same(load_file(tmp_path / "out.safetensors"), modern)


def test_kohya_names_are_those_that_diffusers_reads(pipelines, tmp_path: Path) -> None:
    """Its own conversion gives every factor the module that ours gives it."""
    from diffusers.loaders.lora_conversion_utils import _convert_non_diffusers_lora_to_diffusers

    save(kohya(pipelines["sd1"], alpha=2), tmp_path / "kohya.safetensors")
    convert_lora(tmp_path / "kohya.safetensors", out=tmp_path / "diffusers.safetensors")
    convert_lora(tmp_path / "diffusers.safetensors", out=tmp_path / "back.safetensors")
    theirs, alphas = _convert_non_diffusers_lora_to_diffusers(dict(load_file(tmp_path / "back.safetensors")))
    save(theirs, tmp_path / "theirs.safetensors")
    ours = load_file(tmp_path / "diffusers.safetensors")
    read = read_lora(tmp_path / "theirs.safetensors").updates
    assert {f"{c}.{m}.lora_A.weight" for c, m in read} == {n for n in ours if ".lora_A." in n}
    for (component, module), update in read.items():
        assert np.array_equal(theirs[update.down.name], ours[f"{component}.{module}.lora_A.weight"])
        assert np.array_equal(theirs[update.up.name], ours[f"{component}.{module}.lora_B.weight"])
    assert set(alphas.values()) == {2.0}


@pytest.mark.parametrize(
    ("name", "module"),
    [
        ("lora_unet_time_embed_0", "unet.time_embedding.linear_1"),
        ("lora_unet_input_blocks_0_0", "unet.conv_in"),
        ("lora_unet_input_blocks_3_0_op", "unet.down_blocks.0.downsamplers.0.conv"),
        (
            "lora_unet_input_blocks_4_1_transformer_blocks_0_attn1_to_q",
            "unet.down_blocks.1.attentions.0.transformer_blocks.0.attn1.to_q",
        ),
        ("lora_unet_input_blocks_4_0_skip_connection", "unet.down_blocks.1.resnets.0.conv_shortcut"),
        ("lora_unet_middle_block_2_emb_layers_1", "unet.mid_block.resnets.1.time_emb_proj"),
        ("lora_unet_output_blocks_2_1_conv", "unet.up_blocks.0.upsamplers.0.conv"),
        ("lora_unet_output_blocks_11_1_proj_out", "unet.up_blocks.3.attentions.2.proj_out"),
        ("diffusion_model.output_blocks.11.1.proj_out", "unet.up_blocks.3.attentions.2.proj_out"),
        ("lora_unet_out_2", "unet.conv_out"),
        ("lora_te1_text_model_encoder_layers_1_mlp_fc2", "text_encoder.text_model.encoder.layers.1.mlp.fc2"),
        (
            "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
            "text_encoder.text_model.encoder.layers.0.self_attn.q_proj",
        ),
        (
            "lora_te_transformer_resblocks_22_mlp_c_fc",
            "text_encoder.text_model.encoder.layers.22.mlp.fc1",
        ),
    ],
)
def test_names_of_the_original_layout(name: str, module: str) -> None:
    found = parse_name(f"{name}.lora_down.weight")
    assert found is not None and (f"{found.component}.{'+'.join(found.modules)}", found.role) == (
        module,
        "down",
    )


@pytest.mark.parametrize("version", VERSIONS)
def test_files_of_the_original_layout(version: str, pipelines, tmp_path: Path) -> None:
    """Every layer, under the name that it has in a single file. SD2's attention is stored as one layer."""
    usual = kohya(pipelines[version], alpha=4)
    original: Tensors = {}
    places = {(c, m): naming(c, version).place(f"{m}.weight") for c, m in kernels(pipelines[version])}
    for (component, module), place in sorted(places.items(), key=lambda item: item[1].piece):
        stored = re.sub(r"\.weight$|_weight$", "", place.name).replace(".", "_")
        name, new = KOHYA[component] + module.replace(".", "_"), KOHYA[component] + stored
        first = name.replace("_k_proj", "_q_proj").replace("_v_proj", "_q_proj") if place.pieces > 1 else name
        usual[f"{name}.lora_down.weight"] = usual[f"{first}.lora_down.weight"]  # one factor for all of them
        original[f"{new}.lora_down.weight"] = usual[f"{name}.lora_down.weight"]
        before = [original[f"{new}.lora_up.weight"]] if place.piece else []
        original[f"{new}.lora_up.weight"] = np.concatenate([*before, usual[f"{name}.lora_up.weight"]])
        original[f"{new}.alpha"] = usual[f"{name}.alpha"]
    assert len(original) == len(usual) - (3 * 2 * 23 if version == "sd2" else 0)
    source = save(original, tmp_path / "original.safetensors")
    done = convert_lora(source, out=tmp_path / "kohya.safetensors", format="kohya")
    assert done.source_format == "original" and same(load_file(done.out), usual)
    assert convert_lora(source, out=tmp_path / "diffusers.safetensors").format == "diffusers"
    one, two = (
        convert(base=pipelines[version], out=tmp_path / f"{n}", lora=tmp_path / f"{n}.safetensors").out
        for n in ("original", "kohya")
    )
    assert same(bits(one), bits(two))


def test_stored_as_one_but_not_divisible(tmp_path: Path) -> None:
    name = "lora_te_transformer_resblocks_0_attn_in_proj"
    tensors = {f"{name}.lora_down.weight": ones(2, 12), f"{name}.lora_up.weight": ones(35, 2)}
    with pytest.raises(Error, match=r"\[35, 2\] cannot be divided by 3") as caught:
        read_lora(save(tensors, tmp_path / "lora.safetensors"))
    assert len(str(caught.value).splitlines()) == 2


NAME = "lora_unet_mid_block_attentions_0_proj_in"


def changed(**values: np.ndarray | None) -> Callable[[Tensors], Tensors]:
    """A change of the tensors of one module."""

    def change(tensors: Tensors) -> Tensors:
        new = {f"{NAME}.{name}": value for name, value in values.items()}
        new = {name.replace("__", "."): value for name, value in new.items()}
        return {name: value for name, value in {**tensors, **new}.items() if value is not None}

    return change


def ones(*shape: int) -> np.ndarray:
    return np.ones(shape, np.float32)


REFUSED: list[tuple[str, Callable[[Tensors], Tensors], str]] = [
    ("LoHa", changed(hada_w1_a=ones(4, 4)), "a LoHa"),
    ("LoKr", changed(lokr_w1=ones(4, 4)), "a LoKr"),
    ("DoRA", changed(dora_scale=ones(4, 1)), "a DoRA"),
    ("Tucker", changed(lora_mid__weight=ones(4, 4, 3, 3)), "Tucker"),
    ("XL", lambda t: t | {"lora_te2_text_model_x.lora_down.weight": ones(4, 4)}, "Stable Diffusion XL"),
    ("SD3", lambda t: t | {"transformer.proj_out.lora_A.weight": ones(4, 4)}, "Stable Diffusion 3 or Flux"),
    (
        "Flux",
        lambda _: {"lora_unet_double_blocks_0_x.lora_up.weight": ones(4, 4)},
        "Stable Diffusion 3 or Flux",
    ),
    ("no up", changed(lora_up__weight=None), "no factor 'up'"),
    ("no down", changed(lora_down__weight=None), "no factor 'down'"),
    ("ranks differ", changed(lora_up__weight=ones(24, 3, 1, 1)), "do not fit each other"),
    ("huge rank", changed(lora_up__weight=ones(24, 99, 1, 1), lora_down__weight=ones(99, 24)), "rank 99 is"),
    ("full rank", changed(diff=ones(24, 24)), "a difference of full rank"),
    ("rank 0", changed(lora_up__weight=ones(24, 0), lora_down__weight=ones(0, 24)), "do not fit each other"),
    ("three axes", changed(lora_up__weight=ones(24, 4, 1)), "do not fit each other"),
    ("one axis", changed(lora_down__weight=ones(4)), "do not fit each other"),
    ("up with a kernel", changed(lora_up__weight=ones(24, 4, 3, 3)), "do not fit each other"),
    ("integers", changed(lora_up__weight=ones(24, 4, 1, 1).astype("int32")), "do not fit each other"),
    ("other inputs", changed(lora_down__weight=ones(4, 25, 1, 1)), "shapes that do not fit their modules"),
    ("other outputs", changed(lora_up__weight=ones(23, 4, 1, 1)), "shapes that do not fit their modules"),
    ("a kernel", changed(lora_down__weight=ones(4, 24, 3, 3)), "shapes that do not fit their modules"),
    ("alpha of two numbers", changed(alpha=ones(2)), "expected one number"),
    ("alpha is NaN", changed(alpha=np.array(np.nan, np.float32)), "not a number"),
    ("unknown module", lambda t: t | {"lora_unet_x.lora_down.weight": ones(4, 4)}, "no known module"),
    ("unknown tensor", lambda t: t | {"bias": ones(4)}, "no known module"),
    ("twice", lambda t: t | {"unet.mid_block.attentions.0.proj_in.lora_A.weight": ones(4, 24)}, "the same"),
    ("no LoRA", lambda _: {"a": ones(2)}, "not those of a LoRA"),
    ("nothing", lambda _: {}, "not those of a LoRA"),
]


@pytest.mark.parametrize(("_", "change", "message"), REFUSED, ids=[name for name, *_ in REFUSED])
def test_what_does_not_fit_is_refused(_, change, message: str, pipelines, tmp_path: Path) -> None:
    save(change(kohya(pipelines["sd1"])), tmp_path / "lora.safetensors")
    with pytest.raises(Error, match=message) as caught:
        convert_lora(tmp_path / "lora.safetensors", out=tmp_path / "out.safetensors")
    assert len(str(caught.value).splitlines()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


@pytest.mark.parametrize(
    ("kind", "message"), [("hada_w1_a", "LoHa"), ("lokr_w1", "LoKr"), ("dora_scale", "DoRA")]
)
def test_every_command_refuses_other_kinds_by_name(
    kind: str, message: str, pipelines, tmp_path: Path
) -> None:
    """The test of `dreambooth --lora` is in test_checks.py."""
    pipeline, out = pipelines["sd1"], tmp_path / "out.safetensors"
    file = save(kohya(pipeline) | {f"{NAME}.{kind}": ones(4, 4)}, tmp_path / "lora.safetensors")
    for command in (
        lambda: convert_lora(file, out=out),
        lambda: convert(base=pipeline, out=tmp_path / "out", lora=file),
        lambda: convert(pipeline, out=out, lora=f"{file}:0.5"),
        lambda: generate(pipeline, prompts=["a dog"], out=tmp_path / "out", lora=file),
        lambda: inspect(file),
        lambda: to_keras(file, out=tmp_path / "out"),
        lambda: extract_lora(file, base=pipeline, out=out),
    ):
        with pytest.raises(Error, match=message) as caught:
            command()
        assert len(str(caught.value).splitlines()) == 2
    assert [path.name for path in tmp_path.iterdir()] == ["lora.safetensors"]


ADAPTERS: list[tuple[Any, str]] = [
    ("[]", "not a JSON object"),
    ("{", "not a JSON object"),
    ("[" * 100_000, "not a JSON object"),
    ('{"unet.lora_alpha": "4"}', "not a number"),
    ('{"unet.lora_alpha": true}', "not a number"),
    ('{"unet.lora_alpha": Infinity}', "not a number"),
    ('{"unet.lora_alpha": 1, "unet.alpha_pattern": {"(a+)+$": 1}}', "not one of names"),
    ('{"unet.lora_alpha": 1, "unet.alpha_pattern": []}', None),
    ('{"unet.lora_alpha": 1, "unet.alpha_pattern": [1]}', "not one of names"),
    ('{"unet.lora_alpha": 1, "unet.use_rslora": true}', "use_rslora"),
]


@pytest.mark.parametrize(("text", "message"), ADAPTERS, ids=range(len(ADAPTERS)))
def test_metadata_of_peft(text: str, message: str | None, pipelines, tmp_path: Path) -> None:
    tensors = {n: t for n, t in kohya(pipelines["sd1"]).items() if not n.endswith(".alpha")}
    save(tensors, tmp_path / "lora.safetensors", {"lora_adapter_metadata": text})
    if message is None:
        lora = read_lora(tmp_path / "lora.safetensors")
        assert {(c, u.alpha) for (c, _), u in lora.updates.items()} == {("unet", 1), ("text_encoder", 4)}
        return
    with pytest.raises(Error, match=message) as caught:
        read_lora(tmp_path / "lora.safetensors")
    assert len(str(caught.value).splitlines()) == 2


def test_damaged_files_are_converted_or_refused(pipelines, tmp_path: Path) -> None:
    """A thousand mutations of the header: an `Error` of two lines and nothing left behind, or a LoRA that can
    be converted. Whether it fits a model is then told too.
    """
    sound = save(kohya(pipelines["sd1"]), tmp_path / "sound.safetensors").read_bytes()
    end = 8 + int.from_bytes(sound[:8], "little")
    rng = random.Random(0)
    source, out = tmp_path / "lora.safetensors", tmp_path / "out.safetensors"
    commands = [
        lambda: convert_lora(source, out=out),
        lambda: convert(base=pipelines["sd1"], out=tmp_path / "merged", lora=source, dry_run=True),
    ]
    refused = 0
    for number in range(1000):
        content = bytearray(sound)
        for _ in range(rng.choice((1, 1, 2, 8))):
            content[rng.randrange(end)] = rng.randrange(256)
        if rng.random() < 0.1:
            del content[rng.randrange(len(content)) :]
        source.write_bytes(content)
        try:
            commands[number % 10 == 0]()
        except Error as error:
            refused += 1
            assert len(str(error).splitlines()) == 2
            assert not out.exists()
        out.unlink(missing_ok=True)
    assert 500 < refused < 1000
    assert sorted(path.name for path in tmp_path.iterdir()) == ["lora.safetensors", "sound.safetensors"]


def test_a_file_is_only_replaced_if_it_was_written_here(pipelines, tmp_path: Path) -> None:
    source = save(kohya(pipelines["sd1"]), tmp_path / "kohya.safetensors")
    out = convert_lora(source, out=tmp_path / "out.safetensors").out
    with pytest.raises(Error, match="exists already"):
        convert_lora(source, out=out)
    convert_lora(source, out=out, overwrite=True)
    with pytest.raises(Error, match="leaves it alone"):
        convert_lora(out, out=source, overwrite=True)
    with pytest.raises(Error, match="is read from"):
        convert_lora(out, out=out, overwrite=True)
    with pytest.raises(Error, match=r"ends in \.safetensors"):
        convert_lora(out, out=tmp_path / "lora.bin")
    with pytest.raises(Error, match="choose one of"):
        convert_lora(out, out=tmp_path / "new.safetensors", format="peft")
    with pytest.raises(Error, match="no such file"):
        convert_lora(tmp_path / "none.safetensors", out=tmp_path / "new.safetensors")


def test_values_that_are_not_finite_need_permission(pipelines, tmp_path: Path) -> None:
    tensors = kohya(pipelines["sd1"])
    tensors[f"{NAME}.lora_up.weight"][0] = np.nan
    source = save(tensors, tmp_path / "kohya.safetensors")
    with pytest.raises(Error, match="not finite"):
        convert_lora(source, out=tmp_path / "out.safetensors")
    assert not (tmp_path / "out.safetensors").exists()
    convert_lora(source, out=tmp_path / "out.safetensors", allow_nonfinite=True)


def test_command(pipelines, tmp_path: Path) -> None:
    save(kohya(pipelines["sd1"]), tmp_path / "kohya.safetensors")

    def run(*words: str) -> str:
        command = [sys.executable, "-m", "kcv2diffusers", "convert-lora", "kohya.safetensors", *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=True).stdout

    plan = run("--out", "out.safetensors", "--dry-run")
    assert "format of diffusers" in plan and "Nothing was written" in plan
    assert not (tmp_path / "out.safetensors").exists()
    told = json.loads(run("--out", "out.safetensors", "--json"))
    assert (told["format"], told["ranks"], told["dtypes"]) == ("diffusers", [4], ["float32"])
    assert told["bytes_written"] == sum(t.nbytes for t in load_file(tmp_path / "out.safetensors").values())


def computed(pipeline: Path, *loras: tuple[Tensors, float]) -> dict[tuple[str, str], np.ndarray]:
    """The weights with LoRAs merged, by NumPy in float64."""
    weights = {place: weight.astype("float64") for place, weight in kernels(pipeline).items()}
    for (component, module), weight in weights.items():
        for tensors, strength in loras:
            name = KOHYA[component] + module.replace(".", "_")
            if f"{name}.lora_up.weight" not in tensors:
                continue
            down = tensors[f"{name}.lora_down.weight"].astype("float64")
            up = tensors[f"{name}.lora_up.weight"].astype("float64")
            scale = strength * float(tensors[f"{name}.alpha"]) / len(down)
            weight += scale * np.einsum("or,r...->o...", up.reshape(len(up), -1), down).reshape(weight.shape)
    return weights


def close(one: dict[Any, np.ndarray], other: dict[Any, np.ndarray], error: float) -> bool:
    return one.keys() == other.keys() and all(
        np.abs(weight - other[name]).max() <= error * max(1.0, np.abs(other[name]).max())
        for name, weight in one.items()
    )


@pytest.fixture(scope="module")
def loras(pipelines, tmp_path_factory: pytest.TempPathFactory) -> Callable[..., Path]:
    """Files of random updates of all layers, large enough to be seen. Tests do not change them."""
    folder = tmp_path_factory.mktemp("loras")

    def file(version: str = "sd1", seed: int = 0) -> Path:
        tensors = kohya(pipelines[version], scale=0.5, seed=seed)
        return save(tensors, folder / f"{version}-{seed}.safetensors")

    return file


@pytest.mark.slow
@pytest.mark.parametrize("version", VERSIONS)
def test_merged_weights_are_those_that_numpy_computes(version: str, pipelines, loras, tmp_path: Path) -> None:
    """From a pipeline, from Keras' layout and from a single file, into a pipeline and into a single file."""
    pipeline, first, second = pipelines[version], loras(version), loras(version, 1)
    tensors = [load_file(file) for file in (first, second)]
    expected = computed(pipeline, (tensors[0], 1), (tensors[1], -0.5))
    assert not close(kernels(pipeline), expected, 1e-2)
    lora = [str(first), f"{second}:-0.5"]
    done = convert(base=pipeline, out=tmp_path / "merged", lora=lora)
    assert close(kernels(done.out), expected, 1e-6)
    for file in WEIGHTS.values():  # what a LoRA does not change keeps its bits
        before, after = load_file(pipeline / file), load_file(done.out / file)
        changed = {f"{module}.weight" for _, module in expected}
        assert same(
            {n: t for n, t in before.items() if n not in changed},
            {n: t for n, t in after.items() if n not in changed},
        )
    assert [note for note in done.notes if note.startswith("LoRA ")] == [
        f"LoRA {first.name}: {len(expected)} modules, strength 1",
        f"LoRA {second.name}: {len(expected)} modules, strength -0.5",
    ]
    record = json.loads((done.out / "conversion.json").read_text())
    assert record["loras"] == [
        {
            "name": file.name,
            "strength": strength,
            "bytes": file.stat().st_size,
            "sha256": hashlib.sha256(file.read_bytes()).hexdigest(),
        }
        for file, strength in ((first, 1), (second, -0.5))
    ]

    keras = to_keras(pipeline, out=tmp_path / "keras").out
    of_keras = convert(keras, out=tmp_path / "of-keras", lora=lora)
    assert same(bits(of_keras.out), bits(done.out))
    single = convert(pipeline, out=tmp_path / "merged.safetensors", lora=lora)
    convert(single.out, base=pipeline, out=tmp_path / "of-single")
    assert same(bits(tmp_path / "of-single"), bits(done.out))
    convert(pipeline, out=tmp_path / "plain.safetensors")
    convert(tmp_path / "plain.safetensors", base=pipeline, out=tmp_path / "of-plain", lora=lora)
    assert same(bits(tmp_path / "of-plain"), bits(done.out))


def bits(pipeline: Path) -> Tensors:
    return {f"{c}.{n}": t for c, file in WEIGHTS.items() for n, t in load_file(pipeline / file).items()}


@pytest.mark.parametrize("stored", ["float32", "float16"])
@pytest.mark.parametrize("dtype", [None, "float32", "float16"])
def test_weights_are_rounded_once(dtype: str | None, stored: str, pipelines, loras, tmp_path: Path) -> None:
    """What is asked for, else the dtype that is stored; computed in float32."""
    base = convert(base=pipelines["sd1"], out=tmp_path / "base", dtype=stored).out
    exact = convert(base=base, out=tmp_path / "exact", lora=[loras()], dtype="float32").out
    merged = convert(base=base, out=tmp_path / "merged", lora=[loras()], dtype=dtype).out
    assert same(bits(merged), {n: t.astype(dtype or stored) for n, t in bits(exact).items()})


def test_strength_zero_and_both_spellings(pipelines, loras, tmp_path: Path) -> None:
    convert_lora(loras(), out=tmp_path / "diffusers.safetensors")
    one = convert(base=pipelines["sd1"], out=tmp_path / "one", lora=f"{loras()}:0.7").out
    two = convert(
        base=pipelines["sd1"], out=tmp_path / "two", lora=f"{tmp_path}/diffusers.safetensors:.7"
    ).out
    assert same(bits(one), bits(two))
    none = convert(base=pipelines["sd1"], out=tmp_path / "none", lora=f"{loras()}:0").out
    assert same(bits(none), bits(pipelines["sd1"]))


@pytest.mark.parametrize(
    ("given", "path", "strength"),
    [
        ("dog.safetensors", "dog.safetensors", 1),
        ("dog.safetensors:0.8", "dog.safetensors", 0.8),
        ("dog.safetensors:-1", "dog.safetensors", -1),
        ("dog.safetensors:1e-1", "dog.safetensors", 0.1),
        ("dog.safetensors:.5", "dog.safetensors", 0.5),
        (r"C:\dog.safetensors", r"C:\dog.safetensors", 1),
        (r"C:\dog.safetensors:0.8", r"C:\dog.safetensors", 0.8),
        ("dog:2:0.8", "dog:2", 0.8),
        ("hf://alice/dog", "hf://alice/dog", 1),
        ("hf://alice/dog/dog.safetensors@v2:0.8", "hf://alice/dog/dog.safetensors@v2", 0.8),
        ("dog.safetensors:strong", "dog.safetensors:strong", 1),
        ("dog.safetensors:nan", "dog.safetensors:nan", 1),
        (":1", ":1", 1),
    ],
)
def test_strength_is_the_last_number(given: str, path: str, strength: float) -> None:
    assert parse_strength(given) == (path, strength)


def test_a_file_of_that_very_name_has_no_strength(tmp_path: Path) -> None:
    (tmp_path / "dog:2").touch()
    assert parse_strength(f"{tmp_path}/dog:2") == (f"{tmp_path}/dog:2", 1)


def test_a_strength_must_be_finite() -> None:
    with pytest.raises(Error, match="too large"):
        parse_strength("dog.safetensors:1e400")


def test_a_lora_of_another_model_is_refused(pipelines, loras, tmp_path: Path) -> None:
    """Modules that the model lacks, and those of other sizes, are listed."""
    with pytest.raises(
        Error, match=r"changes \d+ modules that the model does not have: text_encoder.text_"
    ) as e:
        convert(base=pipelines["sd1"], out=tmp_path / "out", lora=loras("sd2"))
    assert len(str(e.value).splitlines()) == 2
    unet = {n: t for n, t in load_file(loras()).items() if n.startswith("lora_unet_")}
    wide = {
        n: np.concatenate([t, t], 1) if n.endswith("down.weight") else np.concatenate([t, t]) if t.ndim else t
        for n, t in unet.items()
        if "attn1_to_q" in n
    }
    save(wide, tmp_path / "wide.safetensors")
    with pytest.raises(Error, match=r"\d+ shapes are not those of the model: unet\.") as e:
        convert(base=pipelines["sd1"], out=tmp_path / "out", lora=tmp_path / "wide.safetensors")
    assert len(str(e.value).splitlines()) == 2
    with pytest.raises(Error, match=r"changes .* text_encoder"):
        convert(
            base="none",
            unet=to_keras(pipelines["sd1"], out=tmp_path / "keras").out / "unet.weights.h5",
            out=tmp_path / "out",
            lora=loras(),
        )
    assert not (tmp_path / "out").exists()


def test_values_too_large_for_the_dtype_are_refused(pipelines, loras, tmp_path: Path) -> None:
    with pytest.raises(Error, match="too large for float16"):
        convert(base=pipelines["sd1"], out=tmp_path / "out", dtype="fp16", lora=f"{loras()}:1e6")


def test_a_lora_is_no_checkpoint(loras, tmp_path: Path) -> None:
    with pytest.raises(Error, match="a LoRA") as caught:
        inspect(loras())
    assert "--lora" in str(caught.value).splitlines()[1]


def test_merging_command(pipelines, loras, tmp_path: Path) -> None:
    def run(*words: str) -> subprocess.CompletedProcess[str]:
        command = [sys.executable, "-m", "kcv2diffusers", "convert", "--base", str(pipelines["sd1"]), *words]
        return subprocess.run(command, cwd=tmp_path, capture_output=True, text=True, check=False)

    plan = run("--lora", f"{loras()}:0.5", "--out", "out", "--dry-run")
    assert "modules, strength 0.5" in plan.stdout and not (tmp_path / "out").exists()
    done = run("--lora", f"{loras()}:0.5", "--lora", str(loras(seed=1)), "--out", "out")
    assert done.returncode == 0, done.stderr
    expected = computed(pipelines["sd1"], (load_file(loras()), 0.5), (load_file(loras(seed=1)), 1))
    assert close(kernels(tmp_path / "out"), expected, 1e-6)
    refused = run("--lora", str(loras()), "--out", "new", "--verify")
    assert refused.returncode == 1 and "--verify" in refused.stderr


def test_a_checksum_is_checked_before_a_lora_is_merged(tmp_path: Path) -> None:
    weight = np.arange(8, dtype=np.float32)
    (tmp_path / "weights").write_bytes(weight.tobytes())
    right = google_crc32c.value(weight.tobytes())
    tensor = Tensor("kernel", (2, 4), weight.dtype, tmp_path / "weights", 0, crc32c=right)
    assert np.array_equal(_load(tensor, (1, 2, 4), ()), weight.reshape(2, 4))
    with pytest.raises(Error, match="checksum does not match"):
        _load(replace(tensor, crc32c=right ^ 1), (1, 2, 4), ())
