"""Device memory of a run, and the options that reduce it; reported in out-of-memory errors."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import replace
from typing import Any

import keras

from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.dreambooth.weight_bytes import training_bytes
from kcv2diffusers.errors import Error
from kcv2diffusers.models.layers import rematerialise
from kcv2diffusers.sources.recognise import Match

_LORA_RANK = 4  # the rank that the advice suggests
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
