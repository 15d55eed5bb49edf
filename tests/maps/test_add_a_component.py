"""A component and a family that this package does not know, described by two files, convert both ways.

The files are those of docs/develop/add-a-component.md. Each command runs in a process of its own, as they are
read once a process.
"""

from __future__ import annotations

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import h5py
import keras
import numpy as np
import pytest
from safetensors.numpy import load_file

from kcv2diffusers.maps.parts import VARIABLE

pytestmark = pytest.mark.slow

PAGE = Path(__file__).parents[2] / "docs" / "develop" / "add-a-component.md"
TABLE, FAMILY = re.findall(r"```toml\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.S)


@pytest.fixture
def maps(tmp_path: Path) -> Path:
    """The folder with the two files."""
    folder = tmp_path / "maps"
    (folder / "families").mkdir(parents=True)
    (folder / "denoiser.toml").write_text(TABLE)
    (folder / "families" / "made-up.toml").write_text(FAMILY)
    return folder


def model(width: int = 24, inner: int = 40, seed: int = 0) -> keras.Model:
    """A genuine Keras model, every variable random."""
    keras.utils.clear_session()
    layers = [keras.layers.Dense(inner), keras.layers.LayerNormalization(), keras.layers.Dense(width)]
    built = keras.Sequential([keras.Input((width,)), *layers])
    rng = np.random.default_rng(seed)
    for variable in built.weights:
        variable.assign(rng.standard_normal(tuple(variable.shape)).astype("float32"))
    return built


def run(maps: Path | None, *words: str | Path, code: int = 0) -> str:
    """What a command prints. It must end with `code`."""
    env = {name: value for name, value in os.environ.items() if name != VARIABLE}
    env |= {VARIABLE: str(maps)} if maps else {}
    done = subprocess.run(
        [sys.executable, "-m", "kcv2diffusers", *map(str, words)],
        env=env,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == code, done.stderr
    return done.stdout if code == 0 else done.stderr


def arrays(file: Path) -> dict[str, bytes]:
    """Shape and bytes of each dataset of an HDF5 file."""
    found: dict[str, bytes] = {}

    def add(name: str, item: h5py.Dataset | h5py.Group) -> None:
        if isinstance(item, h5py.Dataset):
            found[name] = str(item.shape).encode() + item[()].tobytes()

    with h5py.File(file) as opened:
        opened.visititems(add)
    return found


def test_both_ways(maps: Path, tmp_path: Path) -> None:
    made, file = model(), tmp_path / "denoiser.weights.h5"
    made.save_weights(file)
    assert "denoiser" in run(maps, "inspect", file)
    run(maps, "convert", "--denoiser", file, "--out", tmp_path / "out")
    index = json.loads((tmp_path / "out" / "model_index.json").read_text())
    assert index == {"_class_name": "MadeUpPipeline", "denoiser": ["diffusers", "PriorTransformer"]}
    names = {path.name for path in (tmp_path / "out").iterdir()}
    assert names == {"model_index.json", "denoiser", "conversion.json"}
    config = json.loads((tmp_path / "out" / "denoiser" / "config.json").read_text())
    assert config == {"_class_name": "PriorTransformer", "width": 24, "inner": 40, "heads": 4}
    first, gamma_beta, last = (layer.get_weights() for layer in made.layers)
    written = load_file(tmp_path / "out" / "denoiser" / "diffusion_pytorch_model.safetensors")
    expected = {
        "proj_in.weight": first[0].T,
        "proj_in.bias": first[1],
        "norm.weight": gamma_beta[0],
        "norm.bias": gamma_beta[1],
        "proj_out.weight": last[0].T,
        "proj_out.bias": last[1],
    }
    assert written.keys() == expected.keys()
    for name, values in expected.items():
        np.testing.assert_array_equal(written[name], values, name)
    verdict = run(maps, "verify", tmp_path / "out", file, "--level", "weights")
    assert "denoiser" in verdict and "6 tensors" in verdict

    run(maps, "to-keras", tmp_path / "out", "--out", tmp_path / "back")
    assert arrays(tmp_path / "back" / file.name) == arrays(file)
    run(maps, "to-keras", tmp_path / "out", "--out", tmp_path / "legacy", "--format", "h5")
    other = model(seed=1)
    other.load_weights(tmp_path / "legacy" / "denoiser.h5")
    for one, two in zip(made.get_weights(), other.get_weights(), strict=True):
        np.testing.assert_array_equal(one, two)


def test_other_widths_need_their_heads(maps: Path, tmp_path: Path) -> None:
    file = tmp_path / "denoiser.weights.h5"
    model(width=36).save_weights(file)
    refusal = run(maps, "convert", file, "--out", tmp_path / "out", code=1)
    assert "denoiser of unusual widths" in refusal and '{"denoiser": {"heads": N}}' in refusal
    (tmp_path / "kcv2diffusers.json").write_text('{"denoiser": {"heads": 5}}')
    assert "heads 5 does not divide widths 36" in run(
        maps, "convert", file, "--out", tmp_path / "out", code=1
    )
    (tmp_path / "kcv2diffusers.json").write_text('{"denoiser": {"heads": 6}}')
    run(maps, "convert", file, "--out", tmp_path / "out")
    assert json.loads((tmp_path / "out" / "denoiser" / "config.json").read_text())["heads"] == 6


def test_what_is_known_stays(maps: Path, tmp_path: Path) -> None:
    """Stable Diffusion converts as before beside another family; its parts do not meet the other's."""
    run(maps, "convert", "tiny", "--out", tmp_path / "tiny")
    run(None, "convert", "tiny", "--out", tmp_path / "plain")
    for path in (tmp_path / "plain").rglob("*.*"):
        same = tmp_path / "tiny" / path.relative_to(tmp_path / "plain")
        assert same.read_bytes() == path.read_bytes(), path
    assert "denoiser" in run(maps, "maps", "list") and "denoiser" not in run(None, "maps", "list")
    assert "--denoiser SRC" in run(maps, "convert", "--help")
    assert "proj_in.weight [40, 24]" in run(maps, "maps", "show", "denoiser")


@pytest.mark.parametrize(
    ("file", "right", "wrong", "problem"),
    [
        ("denoiser.toml", TABLE, "folder = ", "not a weight map: Invalid value"),
        ("denoiser.toml", "weights ", "wheights ", "has no entry 'weights'"),
        ("denoiser.toml", '"dense", "in out"', '"dense", "in-out"', "not a size: 'in-out'"),
        (
            "denoiser.toml",
            '"dense", "in out"',
            '"dense", "in out", "unless in != out"',
            "not a tag: 'unless in",
        ),
        ("denoiser.toml", 'pattern = "denoiser"', 'pattern = "("', "unterminated subpattern"),
        ("families/made-up.toml", "label ", "lable ", "has no entry 'label'"),
        ("families/made-up.toml", '["denoiser"]', '["voice"]', "no table has the part voice"),
    ],
)
def test_files_with_mistakes(maps: Path, file: str, right: str, wrong: str, problem: str) -> None:
    text = (maps / file).read_text()
    assert right in text
    (maps / file).write_text(text.replace(right, wrong))
    refusal = run(maps, "inspect", "tiny", code=1)
    assert problem in refusal and len(refusal.splitlines()) == 2


def test_pictures_need_adapters(maps: Path, tmp_path: Path) -> None:
    file = tmp_path / "denoiser.weights.h5"
    model().save_weights(file)
    run(maps, "convert", file, "--out", tmp_path / "out")
    refusal = run(maps, "verify", tmp_path / "out", file, code=1)
    assert "pictures of Made-up cannot be compared" in refusal and len(refusal.splitlines()) == 2
