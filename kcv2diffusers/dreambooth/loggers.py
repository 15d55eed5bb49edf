"""Further loggers for the loss of each step: TensorBoard, Weights & Biases."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.errors import Error

Log = Callable[[int, dict[str, float]], None]
"""Called with the step and the values by name."""


def open_loggers(config: Config) -> list[Log]:
    """Open the loggers that `config` asks for. Raises Error if a required package is not installed."""
    found = []
    if config.tensorboard:
        found.append(_tensorboard(Path(config.out) / "tensorboard"))
    if config.wandb:
        found.append(_wandb(config))
    return found


def _tensorboard(folder: Path) -> Log:
    """A TensorBoard logger by PyTorch's writer or, if that is not installed, TensorFlow's."""
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
