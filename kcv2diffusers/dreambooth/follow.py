"""Work done between steps: log, progress, checkpoints, sample images, and conditions for stopping."""

from __future__ import annotations

import csv
import math
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import Any

import keras

from kcv2diffusers.dreambooth.checkpoints import Checkpoints, saved_steps
from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.dreambooth.devices import together
from kcv2diffusers.dreambooth.drawings import Drawings
from kcv2diffusers.dreambooth.loggers import open_loggers
from kcv2diffusers.dreambooth.ranks import ALONE, Group
from kcv2diffusers.dreambooth.validation import Validation
from kcv2diffusers.errors import Error
from kcv2diffusers.progress import StageProgress
from kcv2diffusers.system.output import whole_file

LOG = "log.csv"
_SECONDS_BETWEEN_READINGS = 1.0


class Follow(keras.callbacks.Callback):  # type: ignore[misc]
    """The callback of a run: log, progress, checkpoints, sample images, and conditions for stopping."""

    def __init__(
        self,
        config: Config,
        checkpoints: Checkpoints,
        drawings: Drawings,
        start: int,
        progress: StageProgress,
        validation: Validation | None = None,
        group: Group = ALONE,
    ) -> None:
        super().__init__()
        self.config, self.checkpoints, self.drawings, self.progress = config, checkpoints, drawings, progress
        self.validation = validation
        self.start, self.step, self.stopped_by, self.problem = start, start, 0, ""
        self.group, self.asked = group, 0
        self.loggers = open_loggers(config) if group.first else []
        self.log = Path(config.out) / LOG
        self.rows = [row for row in read_log(self.log) if row[0] <= start]
        self.started = self.read_at = self.saved_at = time.monotonic()
        self.waiting: list[tuple[int, Any, float]] = []  # steps with losses still on the device

    def stop(self, signal: int) -> None:
        """Save a checkpoint after this step, or a later one that all processes reach, then end training."""
        self.asked = signal

    def draw(self) -> None:
        """Draw sample images with the weights that a checkpoint would hold now."""
        with self._as_saved():
            self.drawings.draw(self.step)

    def validate(self) -> None:
        """Log the validation loss with the weights that a checkpoint would hold now."""
        assert self.validation is not None
        with self._as_saved():
            loss = self.validation.loss(self.checkpoints.trainer)
        self.validation.add(self.step, loss)
        for log in self.loggers:
            log(self.step, {"validation_loss": loss})

    @contextmanager
    def _as_saved(self) -> Iterator[None]:
        """A block with the weights that a checkpoint would hold now, on one device of this process."""
        trainer = self.checkpoints.trainer
        if keras.backend.backend() == "jax":
            trainer.jax_state_sync()
        # Before the first step the moving averages are not those of the weights yet.
        averaged = self.checkpoints.averaged() if self.step else nullcontext()
        with together(trainer.variables, trainer.optimizer.variables), averaged:
            yield

    def losses(self) -> list[float]:
        """The loss of each step, including the steps before the run was resumed."""
        return [loss for _, loss, _ in self.rows]

    def on_train_begin(self, logs: dict[str, Any] | None = None) -> None:
        if self.validation is not None and not self.validation.rows:
            self.validate()

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        """`logs` holds the step's loss, which the device may still be computing."""
        self.step += 1
        self.stopped_by = self.group.largest(self.asked)
        if not self.group.first:
            self.model.stop_training = bool(self.stopped_by)
            return
        self.waiting.append((self.step, (logs or {})["step_loss"], time.monotonic() - self.started))
        self.checkpoints.check()
        every = self.config.checkpoint_every
        last = self.step == self.config.steps
        ends = last or bool(self.stopped_by)
        saves = ends or bool(every and self.step % every == 0) or self._is_time_to_save()
        draws = bool(self.config.sample_every) and self.step % self.config.sample_every == 0 and not last
        validates = self.validation is not None and (last or self._is_step(self.config.validation_every))
        if not (saves or draws or validates or time.monotonic() - self.read_at > _SECONDS_BETWEEN_READINGS):
            return
        self._read_losses()
        if self.problem:
            self.model.stop_training = True
            return
        if saves:
            _write_log(self.log, self.rows)  # before the save: a resume needs these rows
            self.saved_at = time.monotonic()
            self.checkpoints.save(self.step, last=ends)
        if validates:
            self.validate()
        if draws:
            self.draw()
        if self.stopped_by:
            self.model.stop_training = True

    def _is_step(self, every: int) -> bool:
        return bool(every) and self.step % every == 0

    def _is_time_to_save(self) -> bool:
        minutes = self.config.checkpoint_minutes
        since = time.monotonic() - self.saved_at
        return bool(minutes) and since >= 60 * minutes and not self.checkpoints.writing

    def _read_losses(self) -> None:
        """Wait for the steps so far, and log their losses."""
        for step, device_loss, seconds in self.waiting:
            loss = float(device_loss)
            if not math.isfinite(loss):
                self.checkpoints.wait()
                kept = saved_steps(self.checkpoints.folder)
                where = (
                    f"The checkpoint of step {kept[-1]} is kept" if kept else "No checkpoint was written yet"
                )
                self.problem = (
                    f"The loss of step {step} is {loss}; training has diverged.\n"
                    f"{where}; try a lower --learning-rate, or --precision mixed_bfloat16 or float32."
                )
                break
            self.rows.append((step, loss, seconds))
            for log in self.loggers:
                log(step, {"loss": loss})
        self.waiting.clear()
        self.read_at = time.monotonic()
        if self.rows and not self.problem:
            rate = (self.step - self.start) / (time.monotonic() - self.started)
            words = f"loss {self.rows[-1][1]:.4f}  {rate:.2f} steps/s"
            self.progress("Training", self.step, self.config.steps, words)


class Unread(keras.callbacks.CallbackList):  # type: ignore[misc]
    """A callback list that passes a step's losses on as device tensors.

    Keras reads them first. That waits for the step to finish, and the device would then idle before the next
    step.
    """

    def on_train_batch_end(self, batch: int, logs: dict[str, Any] | None = None) -> None:
        for callback in self.callbacks:
            callback.on_train_batch_end(batch, logs=logs)


def read_log(path: Path) -> list[tuple[int, float, float]]:
    """The rows of a log: step, loss, seconds. Empty if there is no file. Raises Error for a damaged log."""
    if not path.exists():
        return []
    try:
        with path.open(newline="", encoding="utf-8") as file:
            return [(int(row[0]), float(row[1]), float(row[2])) for row in list(csv.reader(file))[1:]]
    except (ValueError, IndexError, csv.Error) as error:
        raise Error(
            f"{path}: is not the log of a run, or damaged.\n"
            "Move it away to go on without the losses so far, or put the right one there."
        ) from error


def _write_log(path: Path, rows: Sequence[tuple[int, float, float]]) -> None:
    with whole_file(path) as part, part.open("w", newline="", encoding="utf-8") as file:
        writer = csv.writer(file)
        writer.writerow(["step", "loss", "seconds"])
        writer.writerows(rows)
