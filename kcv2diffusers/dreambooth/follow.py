"""What happens beside the steps: log, progress, checkpoints, drawings, and the reasons to stop."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import keras

from kcv2diffusers.dreambooth.checkpoints import Checkpoints
from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.dreambooth.devices import together
from kcv2diffusers.dreambooth.drawings import Drawings
from kcv2diffusers.dreambooth.examples import Progress
from kcv2diffusers.dreambooth.loggers import open_loggers


class Follow(keras.callbacks.Callback):  # type: ignore[misc]
    """Follows the steps: log, progress, checkpoints, drawings, and the reasons to stop."""

    def __init__(
        self, config: Config, checkpoints: Checkpoints, drawings: Drawings, start: int, progress: Progress
    ) -> None:
        super().__init__()
        self.config, self.checkpoints, self.drawings, self.progress = config, checkpoints, drawings, progress
        self.start, self.step, self.stopped, self.problem = start, start, False, ""
        self.loggers = open_loggers(config)
        self.log = Path(config.out) / "log.csv"
        self.rows = [row for row in _read_log(self.log) if row[0] <= start]
        self.started = time.monotonic()

    def stop(self) -> None:
        """Save after this step and end."""
        self.stopped = True

    def draw(self) -> None:
        """Draw with the weights that a checkpoint would have now."""
        if keras.backend.backend() == "jax":
            self.checkpoints.trainer.jax_state_sync()
        with self.checkpoints.averaged(), together():
            self.drawings.draw(self.step)

    def losses(self) -> list[float]:
        """The loss of each step, also of those before the run was taken up again."""
        return [loss for _, loss, _ in self.rows]

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        self.step += 1
        loss = float((logs or {})["step_loss"])
        if not math.isfinite(loss):
            kept = self.checkpoints.steps()
            where = f"The checkpoint of step {kept[-1]} is kept" if kept else "No checkpoint was written yet"
            self.problem = (
                f"The loss of step {self.step} is {loss}; training has diverged.\n"
                f"{where}; try a lower --learning-rate, or --precision mixed_bfloat16 or float32."
            )
            self.model.stop_training = True
            return
        self.rows.append((self.step, loss, time.monotonic() - self.started))
        for log in self.loggers:
            log(self.step, {"loss": loss})
        rate = (self.step - self.start) / (time.monotonic() - self.started)
        words = f"loss {loss:.4f}  {rate:.2f} steps/s"
        self.progress("Training", self.step, self.config.steps, words)
        every, last = self.config.checkpoint_every, self.step == self.config.steps
        if last or self.stopped or (every and self.step % every == 0):
            _write_log(self.log, self.rows)  # first: whoever resumes at a checkpoint needs the rows up to it
            self.checkpoints.save(self.step)
        if self.config.sample_every and self.step % self.config.sample_every == 0 and not last:
            self.draw()
        if self.stopped:
            self.model.stop_training = True


def _read_log(path: Path) -> list[tuple[int, float, float]]:
    if not path.exists():
        return []
    with path.open(newline="") as file:
        return [(int(row[0]), float(row[1]), float(row[2])) for row in list(csv.reader(file))[1:]]


def _write_log(path: Path, rows: Sequence[tuple[int, float, float]]) -> None:
    part = path.with_name(f".{path.name}.part")
    with part.open("w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "seconds"])
        writer.writerows(rows)
    part.replace(path)
