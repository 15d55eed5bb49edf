"""Where else the loss of each step goes: TensorBoard, Weights & Biases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.errors import Error

Log = Callable[[int, dict[str, float]], None]
"""Told the step and the values by name."""


def open_loggers(config: Config) -> list[Log]:
    """The loggers that `config` asks for. Raises Error if one is not installed."""
    found = []
    if config.tensorboard:
        found.append(_tensorboard(Path(config.out) / "tensorboard"))
    if config.wandb:
        found.append(_wandb(config))
    return found


def _tensorboard(folder: Path) -> Log:
    """By PyTorch's writer or TensorFlow's, whichever is there."""
    try:
        from torch.utils.tensorboard import SummaryWriter

        writer: Any = SummaryWriter(str(folder))

        def log(step: int, values: dict[str, float]) -> None:
            for name, value in values.items():
                writer.add_scalar(name, value, step)
            writer.flush()

        return log
    except ModuleNotFoundError:
        pass
    try:
        import tensorflow as tf
    except ModuleNotFoundError as error:
        raise Error("--tensorboard needs a package.\npip install tensorboard torch") from error
    events: Any = tf.summary.create_file_writer(str(folder))

    def log_events(step: int, values: dict[str, float]) -> None:
        with events.as_default(step):
            for name, value in values.items():
                tf.summary.scalar(name, value)
        events.flush()

    return log_events


def _wandb(config: Config) -> Log:
    try:
        import wandb
    except ModuleNotFoundError as error:
        raise Error("--wandb needs a package.\npip install wandb") from error
    run = wandb.init(project="kcv2diffusers-dreambooth", dir=config.out, config=asdict(config))
    return lambda step, values: run.log(values, step=step)
