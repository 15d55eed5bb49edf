"""Save the checkpoints of a run, and resume from them.

`checkpoints/step-000100/` holds weights under KerasCV's names, for `convert`. `resume/step-000100.h5` holds
the state needed to resume: the trained variables (not averaged, not merged) and the optimizer's variables.
Both are written under a temporary name and renamed when complete; older ones are removed only after that. A
thread writes them during training from a snapshot in host memory. If the snapshot does not fit, training
waits until they are written.
"""

from __future__ import annotations

import errno
import math
import os
import shutil
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from pathlib import Path
from threading import Thread
from typing import Any

import h5py
import keras
import ml_dtypes
import numpy as np

from kcv2diffusers.diffusion import Array
from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.dreambooth.lora import factors, lora_layers, write_lora
from kcv2diffusers.dreambooth.snapshots import Snapshots, Values, current, dtype_of
from kcv2diffusers.dreambooth.tokens import TABLE, added_tokens, with_added, with_rows
from kcv2diffusers.dreambooth.weight_bytes import STATES
from kcv2diffusers.errors import Error
from kcv2diffusers.json_text import write_json
from kcv2diffusers.models.base import read_values
from kcv2diffusers.pipeline.tokenizer_files import TokenizerFiles, write_tokenizer
from kcv2diffusers.pipeline_files import CONFIG_FILE, LORA_FILE, TOKENIZER
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.system.positioned import write_at
from kcv2diffusers.targets.keras_h5 import WRITERS, lay_out

_STATE = ("trainable", "optimizer")


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps of the run in `folder`."""
    return folder / "checkpoints" / f"step-{step:06}"


def saved_steps(folder: Path) -> list[int]:
    """The steps of the run in `folder` with a complete checkpoint and resume state, in ascending order."""
    numbers = [path.stem.removeprefix("step-") for path in (folder / "resume").glob("step-*.h5")]
    return sorted(int(n) for n in numbers if n.isdecimal() and checkpoint_path(folder, int(n)).is_dir())


def least_bytes(config: Config, parts: Mapping[str, tuple[Match, Any]]) -> int:
    """A lower bound in bytes of a run's checkpoints on disk: those that are kept and the next one."""
    weights = sum(4 * math.prod(t.shape) for part in config.trained_parts for _, t in parts[part][0].slots())
    few = config.trains_lora or config.train_token
    state = 0.0 if few else weights * (1 + STATES[config.optimizer] + bool(config.ema))
    written = math.ceil(config.steps / config.checkpoint_every) if config.checkpoint_every else 1
    if config.checkpoint_minutes:
        written = config.steps  # upper bound
    return int((weights + state) * min(written, config.keep_checkpoints + 1))


class Checkpoints:
    """The checkpoints of the run in `folder`.

    `parts` maps part names to the models that are trained. `trainer` is the compiled model that trains them.
    `files` are the base's files, by part; frozen weights are copied from them unchanged. `stated` is the
    content of the kcv2diffusers.json that a model of unusual widths needs. `names` maps the `id` of a
    variable to its diffusers name (both as in Base). `format` is "weights.h5" or "h5". `keep` is the number
    of checkpoints to keep. `note` is called with a sentence for the user. `tokenizer` is written beside the
    weights; it is needed if tokens were added.
    """

    def __init__(
        self,
        folder: Path,
        trainer: keras.Model,
        parts: dict[str, keras.Model],
        files: Mapping[str, Match],
        stated: dict[str, Any],
        names: dict[int, str],
        *,
        format: str = "weights.h5",
        keep: int = 2,
        note: Callable[[str], None] = lambda line: None,
        tokenizer: TokenizerFiles | None = None,
    ) -> None:
        self.folder, self.trainer, self.parts, self.files = folder, trainer, parts, files
        self.stated, self.names = stated, names
        self.format, self.keep, self.note, self.tokenizer = format, keep, note, tokenizer
        self.snapshots = Snapshots([variable for group in self._state() for variable in group])
        self._thread: Thread | None = None
        self._error: BaseException | None = None

    @property
    def writing(self) -> bool:
        """Whether a checkpoint is being written in the background."""
        return self._thread is not None and self._thread.is_alive()

    def save(self, step: int, *, last: bool = False) -> None:
        """Write a checkpoint and its resume state, then remove those beyond `keep`.

        A thread writes them, unless this is the `last` save of the run or a snapshot does not fit in memory;
        then the files are complete on return. Waits first for an earlier checkpoint that is still being
        written. Raises Error, including for a failed write of an earlier thread.
        """
        self.wait()
        if keras.backend.backend() == "jax":
            self.trainer.jax_state_sync()
        if last or not self._room():
            self._write(step, lambda: current)
            return self.check()
        taken = self.snapshots.take()
        # A daemon thread, because a second signal ends the process at once.
        self._thread = Thread(target=self._write, args=(step, taken), name="checkpoint", daemon=True)
        self._thread.start()

    def wait(self) -> None:
        """Wait until no checkpoint is being written. Raises the errors of `check`."""
        if self._thread is not None:
            self._thread.join()
            self._thread = None
        self.check()

    def check(self) -> None:
        """Raise Error if writing a checkpoint failed."""
        error, self._error = self._error, None
        if isinstance(error, OSError):
            raise _refusal(self.folder, error) from error
        if error is not None:
            raise error

    @contextmanager
    def finished(self) -> Iterator[None]:
        """On exit of this block, wait for a checkpoint that is being written.

        There is no wait if the process is to end at once (KeyboardInterrupt, SystemExit).
        """
        try:
            yield
        except Exception:
            with suppress(Exception):
                self.wait()
            raise
        self.wait()

    def tidy(self) -> None:
        """Remove incomplete files that a killed process has left."""
        whole = saved_steps(self.folder)
        left = [*self.folder.glob("resume/.step-*.part"), *self.folder.glob("checkpoints/.step-*.part")]
        for path in self.folder.glob("resume/step-*.h5"):
            step = path.stem.removeprefix("step-")
            if step.isdecimal() and int(step) not in whole:
                left.append(path)
        for path in left:
            _remove(path)

    def _room(self) -> bool:
        """Whether a snapshot fits in memory. If not, the user is notified, once."""
        if self.snapshots.fits():
            return True
        self.note(
            "Training waited while checkpoints were written: a copy in memory of "
            f"{self.snapshots.bytes / 1e9:.1f} GB would have taken more than half of what is free."
        )
        self.note = lambda line: None
        return False

    def _write(self, step: int, taken: Callable[[], Values]) -> None:
        """Write the checkpoint of `step`. An exception is stored, and `check` raises it."""
        try:
            value = taken()
            self._write_state(self.folder / "resume" / f"step-{step:06}.h5", value)
            self._write_weights(checkpoint_path(self.folder, step), value)
            for old in saved_steps(self.folder)[: -self.keep]:
                (self.folder / "resume" / f"step-{old:06}.h5").unlink()
                shutil.rmtree(checkpoint_path(self.folder, old))
        except BaseException as error:
            self._error = error

    def _write_state(self, target: Path, value: Values) -> None:
        named = {
            f"{group}/{number}": variable
            for group, variables in zip(_STATE, self._state(), strict=True)
            for number, variable in enumerate(variables)
        }
        with _appearing(target) as part:
            offsets = lay_out(part, [(name, tuple(v.shape), dtype_of(v)) for name, v in named.items()])
            _fill(part, offsets, map(value, named.values()))

    def _write_weights(self, target: Path, value: Values) -> None:
        averages = {id(variable): average for variable, average in self._averages()}

        def averaged(variable: keras.Variable) -> Array:
            return value(averages.get(id(variable), variable))

        with _appearing(target) as folder:
            folder.mkdir()
            for name, model in self.parts.items():
                stem = name if self.format == "weights.h5" else f"{self.folder.name}-{name}"
                path = folder / f"{stem}.{self.format}"
                match, added = self.files[name], added_tokens(model)
                match = match if added is None else with_rows(match, added.shape[0])
                offsets = [job.offset for job in WRITERS[self.format](path, match)]
                _fill(path, offsets, self._weights(name, model, averaged))
            if any(map(lora_layers, self.parts.values())):
                write_lora(folder / LORA_FILE, self.parts, self.names, averaged)
            if self.tokenizer is not None:
                length = self.files["text_encoder"].dims["length"]
                write_tokenizer(self.tokenizer, folder / TOKENIZER, model_max_length=length)
            if self.stated:
                write_json(folder / CONFIG_FILE, self.stated)

    def _weights(self, part: str, model: keras.Model, value: Values) -> Iterator[Array]:
        """The weights of a trained part in the order of its file, with low-rank updates merged in float32."""
        variables = {self.names[id(v)]: v for v in model.weights if id(v) in self.names}
        trained = {id(variable) for variable in self.trainer.trainable_variables}
        added = added_tokens(model)
        updates = {id(layer._kernel): layer for layer in lora_layers(model)}
        for slot, tensor in self.files[part].slots():
            variable = variables[slot.target]
            if id(variable) in trained:
                yield value(variable)
                continue
            frozen = read_values(self.files[part], slot, tensor, tuple(variable.shape))
            if layer := updates.get(id(variable)):
                first, second = factors(layer, value)
                frozen = frozen + first @ second
            if added is not None and slot.target.endswith(TABLE):
                frozen = with_added(frozen, value(added))
            yield frozen

    def restore(self, step: int) -> None:
        """Assign to the trained variables and the optimizer's variables their values after `step` steps.

        Raises Error if the file is damaged or does not match the options of this run.
        """
        path = self.folder / "resume" / f"step-{step:06}.h5"
        try:
            with h5py.File(path) as file:
                for group, variables in zip(_STATE, self._state(), strict=True):
                    if len(file.get(group, ())) != len(variables):
                        raise KeyError(group)
                    for number, variable in enumerate(variables):
                        values = np.asarray(file[f"{group}/{number}"])
                        if values.dtype.kind == "V":  # HDF5 has no bfloat16: h5py writes raw bytes
                            values = values.view(ml_dtypes.bfloat16)
                        variable.assign(values.reshape(variable.shape))
        except (OSError, KeyError, ValueError) as error:
            raise Error(
                f"{path}: does not belong to a run with these options, or is damaged.\n"
                "Resume with the options that the run was started with (its config.toml)."
            ) from error

    def _state(self) -> tuple[list[keras.Variable], list[keras.Variable]]:
        return self.trainer.trainable_variables, self.trainer.optimizer.variables

    def _averages(self) -> list[tuple[keras.Variable, keras.Variable]]:
        """The trained variables, each with its exponential moving average; empty without EMA."""
        optimizer = self.trainer.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if not optimizer.use_ema:
            return []
        averages = optimizer._model_variables_moving_average
        return list(zip(self.trainer.trainable_variables, averages, strict=True))

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """Within this block, the moving averages replace the weights, if there are any."""
        pairs = self._averages()
        held = [np.copy(current(variable)) for variable, _ in pairs]
        for variable, average in pairs:
            variable.assign(keras.ops.copy(average))  # JAX's predictions overwrite what they are given
        try:
            yield
        finally:
            for (variable, _), value in zip(pairs, held, strict=True):
                variable.assign(value)


def _fill(path: Path, offsets: Sequence[int], arrays: Iterable[Array]) -> None:
    """Write each of `arrays` at its offset in a file, and flush the file to disk.

    It uses system calls because h5py would block other threads during the write.
    """
    with path.open("r+b") as file:
        for offset, array in zip(offsets, arrays, strict=True):
            left = np.ascontiguousarray(array).reshape(-1).view("uint8").data
            while left:
                done = write_at(file.fileno(), left, offset)
                left, offset = left[done:], offset + done
        os.fsync(file.fileno())


def _refusal(folder: Path, error: OSError) -> Error:
    """Turn an OSError about a checkpoint into an Error for the user."""
    if error.errno in (errno.ENOSPC, errno.EDQUOT):
        return Error(
            f"{folder}: no space left to write a checkpoint; what was written before it is kept.\n"
            "Free some space, then go on with --resume."
        )
    return Error(
        f"{error.filename or folder}: a checkpoint cannot be written: {error.strerror or error}.\n"
        "Check the path and its permissions, then go on with --resume."
    )


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A temporary path beside `target`. It is renamed to `target` if the block ends without an error."""
    target.parent.mkdir(parents=True, exist_ok=True)
    part = target.with_name(f".{target.name}.part")
    _remove(part)
    try:
        yield part
        _remove(target)
        part.replace(target)
    finally:
        _remove(part)


def _remove(path: Path) -> None:
    if path.is_dir():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)
