"""A DreamBooth run from a folder of photos to checkpoints, pictures and a pipeline."""

from __future__ import annotations

import shutil
import signal
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import keras

from kcv2diffusers.dreambooth.batches import Batches, Examples
from kcv2diffusers.dreambooth.checkpoints import Checkpoints
from kcv2diffusers.dreambooth.config import RUN_FILE, Config
from kcv2diffusers.dreambooth.devices import allow_tf32, best_precision, memory_errors, spread
from kcv2diffusers.dreambooth.drawings import Drawings
from kcv2diffusers.dreambooth.examples import Progress, class_photos, encode, make_examples, usable_photos
from kcv2diffusers.dreambooth.follow import Follow, Unread
from kcv2diffusers.dreambooth.lora import LORA_FILE, add_lora
from kcv2diffusers.dreambooth.model import DreamBooth
from kcv2diffusers.dreambooth.optimizers import make_optimizer
from kcv2diffusers.errors import Error
from kcv2diffusers.models import rematerialise
from kcv2diffusers.models.base import Base, load_base
from kcv2diffusers.models.layers import dtype_policy
from kcv2diffusers.pictures import chart
from kcv2diffusers.to_diffusers import convert


@dataclass
class Result:
    """What a run left: its last checkpoint, the pipeline if asked for, and whether it ran to its end."""

    out: Path
    checkpoint: Path
    step: int
    finished: bool
    export: Path | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}

    def text(self) -> str:
        """A few lines for a person."""
        lines = [*self.notes, f"Step {self.step}: {self.checkpoint}"]
        if not self.finished:
            lines.append("Stopped before the end; --resume goes on.")
        if self.export:
            lines.append(f"Pipeline: {self.export}")
        return "\n".join(lines)


def train(config: Config, progress: Progress = lambda *_: None) -> Result:
    """Train as `config` says. Raises Error with a message for the user; what was saved before stays."""
    out = Path(config.out)
    notes: list[str] = []
    _check_free(config)
    if config.precision == "auto":
        config = replace(config, precision=best_precision())
    allow_tf32()
    photos = usable_photos(Path(config.instance_images), notes)
    with spread(config):
        base = load_base(
            *config.base,
            tokenizer=config.tokenizer or None,
            gelu="exact" if config.unet_gelu == "exact" else "tanh",
            moments=True,
            dtype=config.precision,
        )
    if config.prediction_type != "auto":
        base.prediction_type = config.prediction_type
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.toml").write_text(config.toml(), encoding="utf-8")
    drawings = Drawings(config, base.sampler(), base.image_size, out / "samples")
    classes = class_photos(config, base, notes, progress) if config.prior_preservation else None
    instance, prior = make_examples(config, base, photos, classes)
    if config.cache:
        encode(instance, prior, progress)
    with spread(config):
        trained = _freeze(config, base)
        model = _trainer(config, base)
        _release(config, base, drawings, instance, prior)
        checkpoints = Checkpoints(
            out,
            model,
            trained,
            base.stated,
            base.names,
            format=config.checkpoint_format,
            keep=config.keep_checkpoints,
        )
        start = _start(config, checkpoints)
        batches = Batches(
            instance,
            prior,
            batch_size=config.batch_size,
            steps=config.steps,
            start=start,
            seed=config.seed,
            offset_noise=config.offset_noise,
            timesteps=base.schedule.num_train_timesteps,
        )
        run = Follow(config, checkpoints, drawings, start, progress)
        if start < config.steps:
            with _signals(run.stop), memory_errors():
                callbacks = Unread([run], add_history=True, model=model, epochs=1, steps=len(batches))
                model.fit(_dataset(batches), epochs=1, shuffle=False, verbose=0, callbacks=callbacks)
    if run.problem:
        raise Error(run.problem)
    result = Result(out, checkpoints.path(run.step), run.step, run.step >= config.steps, notes=notes)
    chart(run.losses(), "loss").save(out / "loss.png")
    if result.finished:
        run.draw()
        if config.export:
            result.export = Path(config.export)
            convert(
                result.checkpoint,
                out=result.export,
                base=config.base,
                tokenizer=config.tokenizer or None,
                prediction_type=base.prediction_type,
                overwrite=config.resume,
            )
            if config.lora_rank:
                shutil.copy(result.checkpoint / LORA_FILE, result.export)
            (result.export / RUN_FILE).write_text(config.toml(public=True), encoding="utf-8")
            if config.sample_prompt:
                shutil.copy(drawings.path(run.step), result.export / "samples.png")
    return result


def _check_free(config: Config) -> None:
    out = Path(config.out)
    if (out / "checkpoints").exists() and not config.resume:
        raise Error(f"{out}: holds a run already.\nUse --resume to go on with it, or another --out.")


def _freeze(config: Config, base: Base) -> dict[str, keras.Model]:
    """Make trainable what is to be trained; returns those parts."""
    base.image_encoder.trainable = base.decoder.trainable = False
    base.text_encoder.trainable = config.train_text_encoder
    trained = {"unet": base.unet} | ({"text_encoder": base.text_encoder} if config.train_text_encoder else {})
    for model in trained.values():
        rematerialise(model, config.rematerialise)
        if config.lora_rank:
            add_lora(model, config.lora_rank, config.lora_alpha or config.lora_rank, config.seed)
    return trained


def _trainer(config: Config, base: Base) -> DreamBooth:
    """The compiled model."""
    with dtype_policy(config.precision):
        model = DreamBooth(
            base.unet,
            base.text_encoder if config.train_text_encoder else None,
            prediction_type=base.prediction_type,
            prior_weight=config.prior_weight,
            snr_gamma=config.snr_gamma,
            schedule=base.schedule,
        )
    slower = base.text_encoder.trainable_variables if config.train_text_encoder else []
    # XLA's convolutions on a CPU are slower than TensorFlow's own; JAX has no others.
    model.compile(make_optimizer(config, slower), jit_compile=keras.backend.backend() == "jax")
    model.optimizer.build(model.trainable_variables)
    return model


def _release(
    config: Config, base: Base, drawings: Drawings, instance: Examples, prior: Examples | None
) -> None:
    """Let go of the models that have seen everything: their memory is the trainer's now."""
    if config.cache:
        instance.encode = None
        if prior is not None:
            prior.encode = None
        del base.image_encoder
    if not config.train_text_encoder:
        if config.sample_prompt:
            drawings.context = drawings.encode()
        del base.text_encoder, drawings.sampler.text_encoder


def _start(config: Config, checkpoints: Checkpoints) -> int:
    """The step to go on from: 0 for a new run."""
    steps = checkpoints.steps() if config.resume else []
    if not steps:
        return 0
    checkpoints.restore(steps[-1])
    return steps[-1]


def _dataset(batches: Batches) -> Any:
    """What `fit` takes; TensorFlow has to be told that sizes differ from step to step."""
    if keras.backend.backend() != "tensorflow" or len(batches.by_size) == 1:
        return batches
    import tensorflow as tf

    spec = {
        name: tf.TensorSpec([None] * value.ndim if name in ("latents", "noise") else value.shape, value.dtype)
        for name, value in batches.step(0).items()
    }
    steps = (batches[index] for index in range(len(batches)))
    dataset = tf.data.Dataset.from_generator(lambda: steps, output_signature=(spec,))
    return dataset.apply(tf.data.experimental.assert_cardinality(len(batches)))


@contextmanager
def _signals(stop: Callable[[], None]) -> Iterator[None]:
    """SIGINT and SIGTERM call `stop`; a second one does what it would have done."""
    before: dict[int, Any] = {}  # handlers

    def handle(number: int, _: FrameType | None) -> None:
        stop()
        signal.signal(number, before[number])

    for stopping in (signal.SIGINT, signal.SIGTERM):
        before[stopping] = signal.signal(stopping, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
