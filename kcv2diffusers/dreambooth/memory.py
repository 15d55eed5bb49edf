"""Device memory of a run, and the options that reduce it; reported in out-of-memory errors."""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import keras

from kcv2diffusers.diffusion import LATENT_CHANNELS
from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.errors import Error
from kcv2diffusers.models.layers import rematerialise
from kcv2diffusers.sources.lora import read_lora
from kcv2diffusers.sources.recognise import Match

# Bytes of optimizer state per byte of float32 weights; shared state counts as none. Keras' Adafactor has the
# second moments that it factors all the same.
STATES = {
    "adamw": 2.0, "adamw8bit": 0.5, "adam_mini": 0.5, "adafactor": 1.0, "lion": 1.0, "prodigy": 4.0,
}  # fmt: skip
_LORA_RANK = 4  # the rank that the advice suggests
# diffusers' names of the projections that LoRA updates.
_PROJECTIONS = ("to_q", "to_k", "to_v", "to_out.0", "q_proj", "k_proj", "v_proj", "out_proj")

Matches = Mapping[str, Match]
"""The base's files, by part."""


@contextmanager
def memory_errors(advice: Callable[[], str]) -> Iterator[None]:
    """Within this block, turn any backend's out-of-memory error into an Error of two lines.

    `advice` is called for the second line, which says what helps.
    """
    try:
        yield
    except Exception as error:
        lacks = isinstance(error, MemoryError) or type(error).__name__ in (
            "OutOfMemoryError",  # PyTorch
            "ResourceExhaustedError",  # TensorFlow
        )
        # JAX, and PyTorch on a CPU
        if not lacks and not any(
            words in str(error) for words in ("RESOURCE_EXHAUSTED", "can't allocate memory")
        ):
            raise
        raise Error(
            f"The device has too little memory; what was written before is kept.\n{advice()}"
        ) from error


def training_advice(
    config: Config, files: Matches, model: Any = None, batch: Callable[[], Any] | None = None
) -> str:
    """The options that reduce training memory, each with its saving, largest first.

    The memory of weights, gradients and the optimizer is computed from the sizes of the base and the options.
    The memory of a step's activations is estimated on PyTorch only, with the compiled `model` and the batch
    that `batch` returns.
    """
    options = savings(config, files)
    if model is not None and batch is not None and keras.backend.backend() == "torch":
        with suppress(Exception):  # fewer figures are better than a second error
            options |= _of_pictures(config, files, model, batch())
    named = _named(options)
    first = f"Less is taken with {named}. " if named else ""
    return f"{first}A smaller --batch-size (with --accumulate) or --resolution takes less for pictures."


def drawing_advice(at_once: int) -> str:
    """Advice for running out of memory while images are generated."""
    if at_once > 1:
        return f"Draw fewer pictures at a time than {at_once}: --sample-batch-size 1."
    return (
        "Draw at a lower --precision, or take pictures from elsewhere (--class-images; no --sample-prompt)."
    )


def savings(config: Config, files: Matches) -> dict[str, float]:
    """Options, each with the bytes it saves in weights, gradients and optimizer state."""
    parts = config.trained_parts
    taken = sum(training_bytes(config, files[part]) for part in parts)
    options = {
        f"--lora-rank {_LORA_RANK}": {"lora_rank": _LORA_RANK} if not config.trains_lora else {},
        "--optimizer adam_mini": {"optimizer": "adam_mini"},
        "--ema 0": {"ema": 0.0},
    }
    found = {}
    for name, changed in options.items():
        other: Config = replace(config, **changed)  # type: ignore[arg-type]
        found[name] = taken - sum(training_bytes(other, files[part]) for part in parts)
    if config.train_text_encoder:
        found["no --train-text-encoder"] = training_bytes(config, files["text_encoder"])
    return found


def training_bytes(config: Config, match: Match) -> float:
    """The bytes that training a part takes in addition to its float32 weights.

    These are gradients, optimizer state, moving averages, accumulated gradients and LoRA updates, less what
    frozen weights save when stored in 16 bits.
    """
    if config.train_token:
        return 0.0  # a few embeddings
    kept = 1 + STATES[config.optimizer] + bool(config.ema) + (config.accumulate > 1)
    if not config.trains_lora:
        return 4 * kept * _count(match)
    halved = 2 * _count(match) if config.precision.startswith("mixed") else 0
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


def _count(match: Match) -> int:
    return sum(math.prod(tensor.shape) for _, tensor in match.slots())


def _of_pictures(config: Config, files: Matches, model: Any, batch: Any) -> dict[str, float]:
    """Options, each with the bytes it saves in the forward and backward pass."""
    from kcv2diffusers.dreambooth.torch_memory import step_bytes

    found, taken = {}, step_bytes(model, batch)
    trained = [part for part in (model.unet, model.text_encoder) if part is not None]
    if not config.rematerialise:
        for part in trained:
            rematerialise(part)
        found["--rematerialise"] = float(taken - step_bytes(model, batch))
        for part in trained:
            rematerialise(part, False)
    if config.batch_size > 1:
        # The first image of the subject and the first of the class.
        one = {name: array[:: config.batch_size] for name, array in batch.items()}
        less, many = taken - step_bytes(model, one), config.batch_size * config.accumulate
        other = replace(config, accumulate=many)
        parts = config.trained_parts
        sums = sum(training_bytes(other, files[part]) - training_bytes(config, files[part]) for part in parts)
        found[f"--batch-size 1 --accumulate {many}"] = less - sums
    return found


def _named(options: Mapping[str, float]) -> str:
    """The options that save something, largest saving first, each with its saving."""
    best = sorted((item for item in options.items() if item[1] >= 1e5), key=lambda item: -item[1])
    return ", ".join(f"{name} ({_size(saved)} less)" for name, saved in best)


def _size(count: float) -> str:
    return f"{count / 1e9:.1f} GB" if count >= 1e8 else f"{count / 1e6:.1f} MB"
