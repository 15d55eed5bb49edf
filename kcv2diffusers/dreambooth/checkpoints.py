"""What a run leaves behind, and going on from it.

`checkpoints/step-000100/` holds weights as KerasCV names them, for `convert`; `resume/step-000100.h5` what
going on needs: trained variables as they are (not averaged, not merged) and the optimizer's. Both appear
whole by a rename, and older ones go only after that.
"""

from __future__ import annotations

import math
import shutil
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import h5py
import keras
import ml_dtypes
import numpy as np

from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.dreambooth.lora import attention_projections, write_lora
from kcv2diffusers.errors import Error
from kcv2diffusers.json_text import write_json
from kcv2diffusers.pipeline_files import CONFIG_FILE, LORA_FILE
from kcv2diffusers.sources.open import open_sources
from kcv2diffusers.sources.recognise import Match, recognise
from kcv2diffusers.targets.keras_h5 import write_legacy_h5
from kcv2diffusers.targets.stream import run

_STATE = ("trainable", "optimizer")


def checkpoint_path(folder: Path, step: int) -> Path:
    """The folder of the checkpoint after `step` steps of the run in `folder`."""
    return folder / "checkpoints" / f"step-{step:06}"


def saved_steps(folder: Path) -> list[int]:
    """The steps with a whole checkpoint and state to go on from, of the run in `folder`, ascending."""
    numbers = [path.stem.removeprefix("step-") for path in (folder / "resume").glob("step-*.h5")]
    return sorted(int(n) for n in numbers if n.isdecimal() and checkpoint_path(folder, int(n)).is_dir())


# Bytes of the optimizer's state for a byte of float32 weights; what is shared or factored counts as none.
_STATES = {"adamw": 2.0, "adam_mini": 0.5, "adafactor": 0.0, "lion": 1.0}


def least_bytes(config: Config, parts: Mapping[str, tuple[Match, Any]]) -> int:
    """What the checkpoints of a run take on disk at least: those that are kept, and the next one."""
    trained = ("unet", "text_encoder") if config.train_text_encoder else ("unet",)
    weights = sum(4 * math.prod(t.shape) for part in trained for _, t in parts[part][0].slots())
    state = 0.0 if config.lora_rank else weights * (1 + _STATES[config.optimizer] + bool(config.ema))
    written = math.ceil(config.steps / config.checkpoint_every) if config.checkpoint_every else 1
    return int((weights + state) * min(written, config.keep_checkpoints + 1))


class Checkpoints:
    """The checkpoints of the run in `folder`.

    `parts` are the models that are trained, by part name; `trainer` the compiled model that trains them.
    `stated` is the content of the kcv2diffusers.json that a model of unusual widths needs, `names` what
    diffusers calls each variable (both as in Base). `format` is "weights.h5" or "h5"; `keep` how many stay.
    """

    def __init__(
        self,
        folder: Path,
        trainer: keras.Model,
        parts: dict[str, keras.Model],
        stated: dict[str, Any],
        names: dict[int, str],
        *,
        format: str = "weights.h5",
        keep: int = 2,
    ) -> None:
        self.folder, self.trainer, self.parts = folder, trainer, parts
        self.stated, self.names = stated, names
        self.format, self.keep = format, keep

    def save(self, step: int) -> Path:
        """Write a checkpoint and the state to go on from; remove those beyond `keep`."""
        if keras.backend.backend() == "jax":
            self.trainer.jax_state_sync()
        target = checkpoint_path(self.folder, step)
        with _appearing(self.folder / "resume" / f"step-{step:06}.h5") as part, h5py.File(part, "w") as file:
            for group, variables in zip(_STATE, self._state(), strict=True):
                for number, variable in enumerate(variables):
                    file[f"{group}/{number}"] = keras.ops.convert_to_numpy(variable)
        with _appearing(target) as part, self.averaged():
            part.mkdir()
            for name, model in self.parts.items():
                self._write(part, name, model)
            if any(p.lora_enabled for m in self.parts.values() for p in attention_projections(m)):
                write_lora(part / LORA_FILE, self.parts, self.names)
            if self.stated:
                write_json(part / CONFIG_FILE, self.stated)
        for old in saved_steps(self.folder)[: -self.keep]:
            (self.folder / "resume" / f"step-{old:06}.h5").unlink()
            shutil.rmtree(checkpoint_path(self.folder, old))
        return target

    def restore(self, step: int) -> None:
        """Give the trained and the optimizer's variables the values they had after `step` steps."""
        path = self.folder / "resume" / f"step-{step:06}.h5"
        try:
            with h5py.File(path) as file:
                for group, variables in zip(_STATE, self._state(), strict=True):
                    if len(file.get(group, ())) != len(variables):
                        raise KeyError(group)
                    for number, variable in enumerate(variables):
                        values = np.asarray(file[f"{group}/{number}"])
                        if values.dtype.kind == "V":  # HDF5 has no bfloat16: h5py writes the bare words
                            values = values.view(ml_dtypes.bfloat16)
                        variable.assign(values.reshape(variable.shape))
        except (OSError, KeyError, ValueError) as error:
            raise Error(
                f"{path}: does not belong to a run with these options, or is damaged.\n"
                "Resume with the options that the run was started with (its config.toml)."
            ) from error

    def _state(self) -> tuple[list[keras.Variable], list[keras.Variable]]:
        return self.trainer.trainable_variables, self.trainer.optimizer.variables

    def _write(self, folder: Path, name: str, model: keras.Model) -> None:
        weights = folder / f"{name}.weights.h5"
        model.save_weights(weights)
        if self.format == "h5":  # the names that the 2023 scripts gave
            match = recognise(open_sources(weights)[0])
            run(write_legacy_h5(folder / f"{self.folder.name}-{name}.h5", match))
            weights.unlink()

    @contextmanager
    def averaged(self) -> Iterator[None]:
        """The moving averages in the place of the weights, if there are any."""
        optimizer = self.trainer.optimizer
        optimizer = getattr(optimizer, "inner_optimizer", optimizer)
        if not optimizer.use_ema:
            yield
            return
        pairs = list(
            zip(self.trainer.trainable_variables, optimizer._model_variables_moving_average, strict=True)
        )
        held = [np.copy(keras.ops.convert_to_numpy(variable)) for variable, _ in pairs]
        for variable, average in pairs:
            variable.assign(average)
        try:
            yield
        finally:
            for (variable, _), value in zip(pairs, held, strict=True):
                variable.assign(value)


@contextmanager
def _appearing(target: Path) -> Iterator[Path]:
    """A path beside `target` that takes its place when the block ends without an error."""
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
