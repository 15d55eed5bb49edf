"""Parts that do not belong together, bad options and bad base pipelines are refused."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import h5py
import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from support.bad_input import CONFIG, WEIGHTS, Cli, alone, tree
from support.checkpoints import cached

from kcv2diffusers.maps.tables import spec

pytest_plugins = ["support.bad_input"]


# Parts that do not belong together, and options.


@pytest.fixture(scope="module")
def parts(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Path]:
    """One file of each part, which nobody changes."""
    found = {}
    wanted = [("unet", 1), ("text_encoder", 1), ("text_encoder", 2), ("vae_decoder", 1), ("vae_encoder", 1)]
    for part, version in wanted:
        folder = tmp_path_factory.mktemp(f"{part}{version}")
        (folder / "kcv2diffusers.json").write_text(json.dumps(CONFIG))
        source = cached("keras3-torch", "forward.py", part, str(version)) / f"{part}.weights.h5"
        found[f"{part}{version}"] = Path(shutil.copy(source, folder / f"{part}{version}.weights.h5"))
    return found


@pytest.mark.slow
def test_a_unet_given_as_text_encoder(cli: Cli, parts: dict[str, Path], home: Path) -> None:
    unet = parts["unet1"]
    message = cli.refuses(
        "convert", "--text-encoder", unet, "--base", "none", "--out", home / "out", watch=home, names=unet
    )
    assert "holds a UNet, not a text encoder." in message and "Omit --text-encoder" in message


def full_size(path: Path, part: str, version: str) -> Path:
    """A file of the genuine shapes whose weights nobody wrote: it has a size but takes no room."""
    with h5py.File(path, "w") as file:
        settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
        settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
        settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
        links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
        links.set_create_intermediate_group(True)
        found = spec(part, version)
        dims = {**found.table.versions[version].dims, "vocabulary": 49408}
        for slot in found.slots(dims.get("repeat", 0)):
            if slot.exists(dims):
                space = h5py.h5s.create_simple(tuple(size.value(dims) for size in slot.shape))
                name = slot.keras_name.encode()
                h5py.h5d.create(file.id, name, h5py.h5t.IEEE_F32LE, space, settings, links)
    return path


@pytest.mark.slow
@pytest.mark.parametrize(("one", "other"), [("sd1", "sd2"), ("sd2", "sd1")])
def test_parts_of_sd1_and_sd2(cli: Cli, tmp_path: Path, home: Path, one: str, other: str) -> None:
    unet = full_size(tmp_path / "unet.weights.h5", "unet", one)
    text_encoder = full_size(tmp_path / "text.weights.h5", "text_encoder", other)
    for path, version in ((unet, one), (text_encoder, other)):
        code, out, _ = cli.run("inspect", path)
        assert code == 0 and version.upper() in out and "unusual" not in out
    message = cli.refuses(
        "convert", unet, text_encoder, "--base", "none", "--out", home / "out", watch=home, names=unet
    )
    widths = {"sd1": 768, "sd2": 1024}
    for path, label, version, size in (
        (unet, "UNet", one, "context"),
        (text_encoder, "text encoder", other, "width"),
    ):
        assert f"{path} ({label} {version.upper()}, {size} {widths[version]})" in message
    assert "do not belong together" in message and "of the same model" in message


@pytest.mark.slow
@pytest.mark.parametrize("part", ["unet1", "text_encoder1", "vae_decoder1", "vae_encoder1"])
def test_a_part_given_twice(cli: Cli, parts: dict[str, Path], home: Path, part: str) -> None:
    again = Path(shutil.copy(parts[part], home.parent / "again.weights.h5"))
    message = cli.refuses("convert", parts[part], again, "--out", home / "out", watch=home, names=again)
    assert message.startswith("kcv2diffusers: Two ") and "Give only one of them." in message


def test_nothing_given(cli: Cli, home: Path) -> None:
    assert "Nothing to convert" in cli.refuses("convert", "--out", home / "out", watch=home)
    assert "Nothing to convert" in cli.refuses("convert", "--out", home / "out", "--base", "none", watch=home)


@pytest.mark.slow
def test_what_a_pipeline_still_needs(cli: Cli, parts: dict[str, Path], home: Path) -> None:
    out = home / "out"
    message = cli.refuses("convert", parts["text_encoder1"], "--out", out, watch=home)
    assert "A pipeline still needs: UNet, VAE decoder, VAE encoder." in message
    assert "--unet SRC --vae-decoder SRC --vae-encoder SRC" in message and "--base PIPELINE" in message
    told = cli.converts(parts["text_encoder1"], "--out", out, "--base", "none")
    assert "A full pipeline still needs: UNet, VAE decoder, VAE encoder." in told
    assert not (out / "model_index.json").exists()


@pytest.mark.slow
def test_half_a_vae(cli: Cli, parts: dict[str, Path], home: Path) -> None:
    for given, other in (("decoder", "encoder"), ("encoder", "decoder")):
        source = parts[f"vae_{given}1"]
        message = cli.refuses(*alone(source, home), watch=home)
        assert f"the VAE {other} is missing" in message and f"--vae-{other} SRC" in message


@pytest.mark.parametrize("size", ["0", "-64", "63", "500"])
def test_a_bad_image_size(cli: Cli, legacy: Path, home: Path, size: str) -> None:
    message = cli.refuses(*alone(legacy, home), f"--image-size={size}", watch=home)
    assert "give a multiple of 64" in message


@pytest.mark.parametrize("option", ["--dtype=int8", "--image-size=large", "--gelu=relu", "--nonsense"])
def test_bad_options_are_usage_errors(cli: Cli, legacy: Path, home: Path, option: str) -> None:
    code, out, err = cli.run(*alone(legacy, home), option)
    assert (code, out) == (2, "") and option.split("=")[0] in err and "Traceback" not in err
    assert tree(home) == {}


@pytest.mark.parametrize(
    "text",
    [
        "",
        "{",
        "[]",
        "null",
        '{"text_encoder": 3}',
        '{"text_encoder": ["num_attention_heads"]}',
        '{"text_encoder": {"num_heads": 2}}',
        '{"text_encoder": {"num_attention_heads": "2"}}',
        '{"text_encoder": {"num_attention_heads": 0}}',
        '{"text_encoder": {"num_attention_heads": 7}}',
        "[" * 100_000,
        "\x00\xff",
    ],
)
def test_a_bad_config_file(cli: Cli, legacy: Path, home: Path, text: str) -> None:
    config = legacy.with_name("kcv2diffusers.json")
    config.write_text(text, encoding="latin-1")
    cli.refuses(*alone(legacy, home), watch=home, names=config)


def test_unknown_heads(cli: Cli, legacy: Path, home: Path) -> None:
    legacy.with_name("kcv2diffusers.json").unlink()
    message = cli.refuses(*alone(legacy, home), watch=home, names=legacy)
    assert '{"text_encoder": {"num_attention_heads": N}}' in message


# Base pipelines.


@pytest.mark.parametrize("size", [0, 7, 8, 100, 20_000, -1])
def test_a_base_cut_short(cli: Cli, base: Path, home: Path, size: int) -> None:
    weights = base / WEIGHTS
    weights.write_bytes(weights.read_bytes()[:size])
    message = cli.refuses("to-keras", base, "--out", home / "out", watch=home, names=weights)
    assert "damaged .safetensors file" in message


@pytest.mark.parametrize(
    "damage", ["other names", "shape", "missing", "no config", "bad config", "no weights"]
)
def test_a_base_that_does_not_fit(cli: Cli, base: Path, home: Path, damage: str) -> None:
    weights = base / WEIGHTS
    tensors = load_file(weights)
    named = weights
    if damage == "other names":
        tensors = {f"other.{name}": values for name, values in tensors.items()}
    elif damage == "shape":
        tensors["text_model.final_layer_norm.bias"] = np.zeros(5, "f4")
    elif damage == "missing":
        del tensors["text_model.final_layer_norm.bias"]
    save_file(tensors, weights)
    if "config" in damage:
        named = weights.with_name("config.json")
        named.unlink() if damage == "no config" else named.write_text("[1, 2")
    elif damage == "no weights":
        weights.unlink()
        named = weights.parent
    cli.refuses("to-keras", base, "--out", home / "out", watch=home, names=named, report=True)


@pytest.mark.parametrize("command", ["to-keras", "convert"])
def test_a_base_that_is_no_pipeline(cli: Cli, legacy: Path, home: Path, command: str) -> None:
    folder = home.parent / "empty"
    folder.mkdir()
    given = ("to-keras", folder) if command == "to-keras" else ("convert", legacy, "--base", folder)
    cli.refuses(*given, "--out", home / "out", watch=home, names=folder)
    cli.refuses(*given[:-1], folder / "nowhere", "--out", home / "out", watch=home, names=folder / "nowhere")
