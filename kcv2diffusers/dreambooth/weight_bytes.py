"""The memory of trained weights, computed from their shapes. It needs neither Keras nor a backend."""

from __future__ import annotations

import math

from kcv2diffusers.diffusion import LATENT_CHANNELS
from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.sources.lora import read_lora
from kcv2diffusers.sources.recognise import Match

# Bytes of optimizer state per byte of float32 weights; shared state counts as none. Keras' Adafactor has the
# second moments that it factors all the same.
STATES = {
    "adamw": 2.0, "adamw8bit": 0.5, "adam_mini": 0.5, "adafactor": 1.0, "lion": 1.0, "prodigy": 4.0,
}  # fmt: skip
# diffusers' names of the projections that LoRA updates.
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")


def training_bytes(config: Config, match: Match) -> float:
    """The bytes that training a part takes in addition to its float32 weights.

    These are gradients, optimizer state, moving averages, accumulated gradients and LoRA updates, less what
    frozen weights save when stored in 16 bits.
    """
    if config.train_token:
        return 0.0  # a few embeddings
    kept = 1 + STATES[config.optimizer] + bool(config.ema) + (config.accumulate > 1)
    if not config.trains_lora:
        return 4 * kept * count(match)
    halved = 2 * count(match) if config.precision.startswith("mixed") else 0
    return 4 * (kept + 1) * _lora_count(config, match) - halved


def _lora_count(config: Config, match: Match) -> int:
    """The number of trained weights of a LoRA."""
    if config.lora:
        mine = read_lora(config.lora).of(match.spec.table.name)
        return sum(math.prod(factor.shape) for update in mine for factor in (update.down, update.up))
    sizes = [
        sum(tensor.shape[:2] if not match.keras else tensor.shape[-2:])
        for slot, tensor in match.slots()
        if slot.target.removesuffix(".weight").endswith(_PROJECTIONS) and slot.target.endswith(".weight")
    ]
    return config.lora_rank * sum(sizes) + config.lora_conv_rank * _of_convolutions(match)


def _of_convolutions(match: Match) -> int:
    """The weights that a LoRA of rank 1 has for the convolutions of a part, except those of latents."""
    count = 0
    for _, tensor in match.slots():
        if len(tensor.shape) == 4 and match.part == "unet":
            inputs, outputs = tensor.shape[-2:] if match.keras else tensor.shape[1::-1]
            size = math.prod(tensor.shape) // (inputs * outputs)
            count += (size * inputs + outputs) * (LATENT_CHANNELS not in (inputs, outputs))
    return count


def count(match: Match) -> int:
    """The number of weights of a part."""
    return sum(math.prod(tensor.shape) for _, tensor in match.slots())
