"""LoRA files in the Keras models: merged for drawing, and as updates that go on training."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import keras
import numpy as np
import pytest
from safetensors.numpy import load_file
from support.loras import KOHYA, kohya, save
from support.random_pipelines import random_pipeline

from kcv2diffusers.diffusion import timestep_embedding
from kcv2diffusers.dreambooth.lora import load_lora, lora_layers, write_lora
from kcv2diffusers.dreambooth.model import DreamBooth
from kcv2diffusers.dreambooth.snapshots import current
from kcv2diffusers.errors import Error
from kcv2diffusers.models.base import Base, load_base, load_weights, open_base
from kcv2diffusers.sources.lora import read_lora

pytestmark = pytest.mark.slow

RNG = np.random.default_rng(0)
LATENT = RNG.standard_normal((2, 8, 8, 4), dtype="float32")
TIMES = np.array([20, 700], "int32")
CONTEXT = RNG.standard_normal((2, 77, 12), dtype="float32")
TOKENS = RNG.integers(0, 100, (2, 77)).astype("int32")


@pytest.fixture(scope="module")
def pipeline(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return random_pipeline(tmp_path_factory.mktemp("pipeline") / "sd1")


@pytest.fixture(scope="module")
def loras(pipeline: Path, tmp_path_factory: pytest.TempPathFactory) -> list[Path]:
    """Two files of updates of all layers, of other ranks and alphas."""
    folder = tmp_path_factory.mktemp("loras")
    made = [kohya(pipeline, rank=4, alpha=2, scale=0.4), kohya(pipeline, rank=3, alpha=5, scale=0.4, seed=1)]
    return [save(tensors, folder / f"{number}.safetensors") for number, tensors in enumerate(made)]


def computed(base: Base) -> dict[str, np.ndarray]:
    """What UNet and text encoder compute."""
    unet = {"latent": LATENT, "timestep_embedding": timestep_embedding(TIMES, 8), "context": CONTEXT}
    text = {"tokens": TOKENS, "positions": np.broadcast_to(np.arange(77, dtype="int32"), (2, 77))}
    found = {"unet": base.unet(unet), "text_encoder": base.text_encoder(text)}
    return {part: keras.ops.convert_to_numpy(values) for part, values in found.items()}


@pytest.fixture(scope="module")
def by_diffusers(pipeline: Path, loras: list[Path]) -> Callable[..., dict[str, np.ndarray]]:
    """What both compute in diffusers with the LoRAs at given strengths."""
    import torch
    from diffusers import StableDiffusionPipeline

    pipe = StableDiffusionPipeline.from_pretrained(pipeline, safety_checker=None)
    for file in loras:
        pipe.load_lora_weights(file.parent, weight_name=file.name, adapter_name=file.stem)

    def compute(*strengths: float) -> dict[str, np.ndarray]:
        pipe.set_adapters([file.stem for file in loras], list(strengths))
        with torch.no_grad():
            latent = torch.from_numpy(LATENT.transpose(0, 3, 1, 2).copy())
            noise = pipe.unet(latent, torch.from_numpy(TIMES), torch.from_numpy(CONTEXT)).sample
            text = pipe.text_encoder(torch.from_numpy(TOKENS).long()).last_hidden_state
        return {"unet": noise.numpy().transpose(0, 2, 3, 1), "text_encoder": text.numpy()}

    return compute


def distance(one: dict[str, np.ndarray], other: dict[str, np.ndarray]) -> dict[str, float]:
    return {part: float(np.abs(one[part] - other[part]).max() / np.abs(other[part]).max()) for part in other}


def load(base: Base, pipeline: Path, *loras: str) -> Base:
    """Load the weights with LoRAs merged into them, as `load_base` does, into models that there are."""
    files = open_base(pipeline, lora=loras)
    for part in KOHYA:
        load_weights(getattr(base, part), files.parts[part][0])
    return base


def test_drawing_computes_what_diffusers_does(
    pipeline: Path, loras: list[Path], by_diffusers: Callable[..., dict[str, np.ndarray]]
) -> None:
    base = load_base(pipeline, lora=f"{loras[0]}:0.5")
    first = computed(base)
    assert max(distance(first, by_diffusers(0.5, 0)).values()) < 2e-5
    both = computed(load(base, pipeline, f"{loras[0]}:0.8", f"{loras[1]}:-0.5"))
    assert max(distance(both, by_diffusers(0.8, -0.5)).values()) < 2e-5
    none = computed(load(base, pipeline))
    assert max(distance(none, by_diffusers(0, 0)).values()) < 2e-5
    assert min(*distance(none, first).values(), *distance(none, both).values()) > 0.05


def test_values_that_are_not_finite_are_refused(pipeline: Path, loras: list[Path], tmp_path: Path) -> None:
    tensors = dict(load_file(loras[0]))
    tensors["lora_unet_conv_in.lora_up.weight"][3] = np.nan
    file = save(tensors, tmp_path / "lora.safetensors")
    with pytest.raises(Error, match=r"unet.conv_in has NaN or infinite values") as caught:
        open_base(pipeline, lora=file)
    assert len(str(caught.value).splitlines()) == 2
    with pytest.raises(Error, match="the strength is too large"):
        open_base(pipeline, lora=f"{loras[0]}:1e60")


def test_what_goes_on_training(
    pipeline: Path, loras: list[Path], tmp_path: Path, by_diffusers: Callable[..., dict[str, np.ndarray]]
) -> None:
    """The factors of the file and nothing else. The models compute what diffusers does with the file, and
    write the same updates again.
    """
    base = load_base(pipeline)
    updates = read_lora(loras[1]).updates
    parts = {part: getattr(base, part) for part in KOHYA}
    for part, model in parts.items():
        mine = [update for update in updates.values() if update.component == part]
        load_lora(model, mine, base.names, 7.0 if part == "unet" else 0.0)  # other alphas, and its own
    variables = DreamBooth(base.unet, base.text_encoder).trainable_variables
    assert len(variables) == 2 * len(updates) > 400
    assert {variable.name for variable in variables} == {"lora_kernel_a", "lora_kernel_b"}
    assert {layer.lora_alpha for layer in lora_layers(base.unet)} == {7}
    assert {(layer.lora_alpha, layer.lora_rank) for layer in lora_layers(base.text_encoder)} == {(5, 3)}
    assert max(distance(computed(base), by_diffusers(0, 1)).values()) < 2e-5
    write_lora(tmp_path / "again.safetensors", parts, base.names, current)
    again = read_lora(tmp_path / "again.safetensors").updates
    assert again.keys() == updates.keys()
    for place, update in updates.items():
        assert again[place].down.shape == update.down.shape and again[place].up.shape == update.up.shape
        (down, up), (first, second) = update.values(), again[place].values()
        np.testing.assert_array_equal(first, down)
        np.testing.assert_allclose(second * again[place].alpha, up * update.alpha, rtol=1e-6)
