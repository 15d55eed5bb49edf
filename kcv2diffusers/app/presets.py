"""What to train and how: sets of `dreambooth` options, each with the memory that it takes."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from types import SimpleNamespace
from typing import Any

from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.dreambooth.weight_bytes import count, training_bytes
from kcv2diffusers.maps.tables import specs
from kcv2diffusers.sources.locate import TINY, locate_all
from kcv2diffusers.sources.open import open_all
from kcv2diffusers.sources.recognise import Match, recognise_all

_VERSION = "sd1"  # whose sizes stand for those of a model on the Hub


@dataclass(frozen=True)
class Preset:
    """Options by their names in `Config`, and when to take them."""

    options: Mapping[str, Any]
    about: str


PRESETS = {
    "LoRA": Preset(
        {"lora_rank": 8, "learning_rate": 1e-4, "steps": 800},
        "Small updates of the attention layers. The least memory, and a small file for ComfyUI and A1111.",
    ),
    "All weights, little memory": Preset(
        {"optimizer": "adam_mini", "rematerialise": True, "learning_rate": 5e-6, "steps": 400},
        "All weights of the UNet. Activations are computed twice: slower, less memory for pictures.",
    ),
    "All weights": Preset(
        {"learning_rate": 5e-6, "steps": 400}, "All weights of the UNet, as in the DreamBooth paper."
    ),
    "All weights and the text encoder": Preset(
        {"train_text_encoder": True, "learning_rate": 2e-6, "steps": 400},
        "The best likeness, and the most memory.",
    ),
    "Tiny base": Preset(
        {
            "train_text_encoder": True, "learning_rate": 2e-4, "batch_size": 4, "num_class_images": 16,
            "guidance_scale": 5.0, "steps": 250,
        },
        "For the tiny base: a few minutes on a CPU.",
    ),
}  # fmt: skip


def memory(preset: Preset, base: str) -> float:
    """Bytes of weights, gradients and optimizer state; pictures take more on top of them.

    `base` is a source: the sizes are those of the tiny base, or else of Stable Diffusion 1.
    """
    matches = _tiny() if base == TINY else _nominal()
    options = {name: value for name, value in preset.options.items() if name != "steps"}
    config = Config(**options)
    # float32; the image encoder is released before the first step.
    weights = sum(4 * count(match) for match in matches if match.part != "vae_encoder")
    return weights + sum(
        training_bytes(config, match) for match in matches if match.part in config.trained_parts
    )


def cost(preset: Preset, base: str, steps: int, rate: float | None) -> str:
    """What a run takes, in three lines. `rate` is the steps in a second of an earlier run, if known."""
    model = "the tiny base" if base == TINY else "Stable Diffusion 1"
    bytes_ = memory(preset, base)
    size = f"{bytes_ / 1e9:.1f} GB" if bytes_ >= 1e8 else f"{bytes_ / 1e6:.0f} MB"
    left = "shown from the first steps on"
    if rate:
        left = f"about {duration(steps / rate)}, as the last run here"
    return (
        f"{preset.about}\nMemory for {model}: {size} of weights, gradients and optimizer; pictures take more."
        f"\nTime of {steps} steps: {left}."
    )


def duration(seconds: float) -> str:
    """Seconds in words."""
    if seconds < 90:
        return f"{seconds:.0f} s"
    return f"{seconds / 60:.0f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


@cache
def _tiny() -> Sequence[Match]:
    return recognise_all(open_all(locate_all(TINY)))


@cache
def _nominal() -> Sequence[Match]:
    """The parts of the released model, of which only the shapes are known."""
    names = {match.part for match in _tiny()}
    found = []
    for spec in specs():
        if spec.part in names and spec.version in (_VERSION, "any"):
            dims = dict(spec.nominal)
            shapes: Any = {
                slot: SimpleNamespace(shape=slot.part_shape(dims, keras=True)) for slot in spec.existing(dims)
            }
            nowhere: Any = None
            found.append(Match(spec, nowhere, dims, shapes))
    return found
