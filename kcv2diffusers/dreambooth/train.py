"""A DreamBooth run from a folder of photos to checkpoints, pictures and a pipeline."""

from __future__ import annotations

import csv
import math
import shutil
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field
from functools import partial
from pathlib import Path
from types import FrameType
from typing import Any

import keras
import numpy as np
from PIL import Image

from kcv2diffusers.dreambooth.batches import Batches, Examples
from kcv2diffusers.dreambooth.checkpoints import Checkpoints
from kcv2diffusers.dreambooth.config import RUN_FILE, Config
from kcv2diffusers.dreambooth.loggers import open_loggers
from kcv2diffusers.dreambooth.lora import LORA_FILE, add_lora
from kcv2diffusers.dreambooth.model import DreamBooth
from kcv2diffusers.dreambooth.optimizers import make_optimizer
from kcv2diffusers.dreambooth.photos import Photo, bucket_of, find_photos
from kcv2diffusers.errors import Error
from kcv2diffusers.models import rematerialise
from kcv2diffusers.models.base import Base, load_base
from kcv2diffusers.models.layers import dtype_policy
from kcv2diffusers.models.sampler import PROMPT_LENGTH, TextToImage, initial_noise
from kcv2diffusers.pictures import chart, grid
from kcv2diffusers.to_diffusers import convert

Progress = Callable[[str, int, int, str], None]
"""Told what is being done, how much of how much, and a few words on it."""


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
    photos = _photos(Path(config.instance_images), notes)
    base = load_base(
        *config.base,
        tokenizer=config.tokenizer or None,
        gelu="exact" if config.gelu == "exact" else "tanh",
        moments=True,
        dtype=config.precision,
    )
    out.mkdir(parents=True, exist_ok=True)
    (out / "config.toml").write_text(config.toml(), encoding="utf-8")
    resolution = config.resolution or base.image_size
    samples = _Samples(config, base.sampler(), base.image_size, out / "samples")
    classes = _class_photos(config, base, notes, progress) if config.prior_preservation else None
    instance, prior = _examples(config, base, photos, classes, resolution)
    if config.cache:
        _encode(instance, prior, progress)
    trained = _freeze(config, base)
    with dtype_policy(config.precision):
        model = DreamBooth(
            base.unet,
            base.text_encoder if config.train_text_encoder else None,
            prediction=config.prediction,
            prior_weight=config.prior_weight,
            snr_gamma=config.snr_gamma,
        )
    slower = base.text_encoder.trainable_variables if config.train_text_encoder else []
    # XLA's convolutions on a CPU are slower than TensorFlow's own; JAX has no others.
    model.compile(make_optimizer(config, slower), jit_compile=keras.backend.backend() == "jax")
    model.optimizer.build(model.trainable_variables)
    if config.cache:  # it has seen everything; its memory is the trainer's now
        instance.encode = None
        if prior is not None:
            prior.encode = None
        del base.image_encoder
    if not config.train_text_encoder:
        if config.sample_prompt:
            samples.context = samples.encode()
        del base.text_encoder, samples.sampler.text_encoder
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
    )
    run = _Run(config, checkpoints, samples, start, progress)
    if start < config.steps:
        with _signals(run.stop):
            model.fit(_dataset(batches), epochs=1, shuffle=False, verbose=0, callbacks=[run])
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
                overwrite=config.resume,
            )
            if config.lora_rank:
                shutil.copy(result.checkpoint / LORA_FILE, result.export)
            (result.export / RUN_FILE).write_text(config.toml(public=True), encoding="utf-8")
            if config.sample_prompt:
                shutil.copy(samples.path(run.step), result.export / "samples.png")
    return result


class _Run(keras.callbacks.Callback):  # type: ignore[misc]
    """Follows the steps: log, progress, checkpoints, drawings, and the reasons to stop."""

    def __init__(
        self, config: Config, checkpoints: Checkpoints, samples: _Samples, start: int, progress: Progress
    ) -> None:
        super().__init__()
        self.config, self.checkpoints, self.samples, self.progress = config, checkpoints, samples, progress
        self.step, self.stopped, self.problem = start, False, ""
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
        with self.checkpoints.averaged():
            self.samples.draw(self.step)

    def losses(self) -> list[float]:
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
        self.progress("Training", self.step, self.config.steps, f"loss {loss:.4f}")
        every, last = self.config.checkpoint_every, self.step == self.config.steps
        if last or self.stopped or (every and self.step % every == 0):
            self.checkpoints.save(self.step)
            _write_log(self.log, self.rows)
        if self.config.sample_every and self.step % self.config.sample_every == 0 and not last:
            self.draw()
        if self.stopped:
            self.model.stop_training = True


@dataclass
class _Samples:
    """Drawings of the prompts that are asked for, from the same noise each time.

    Without `sampler.text_encoder`, which may have left the device, `context` is what it made of the prompts.
    """

    config: Config
    sampler: TextToImage
    size: int
    folder: Path
    context: np.ndarray[Any, Any] | None = None

    def encode(self) -> np.ndarray[Any, Any]:
        prompts = self.config.sample_prompt
        return self.sampler.encode_prompts([*[""] * len(prompts), *prompts])

    def draw(self, step: int) -> None:
        prompts = self.config.sample_prompt
        if not prompts:
            return
        noise = initial_noise(len(prompts), self.size, self.size, self.config.seed)
        latents = self.sampler.denoise(
            self.encode() if self.context is None else self.context,
            noise,
            steps=self.config.sample_steps,
            guidance_scale=self.config.guidance_scale,
        )
        self.folder.mkdir(parents=True, exist_ok=True)
        images = self.sampler.decode(latents)
        grid(images, min(4, len(images)), prompts, scale=max(1, 256 // self.size)).save(self.path(step))

    def path(self, step: int) -> Path:
        """The picture of the drawings after `step` steps."""
        return self.folder / f"step-{step:06}.png"


def _check_free(config: Config) -> None:
    out = Path(config.out)
    if (out / "checkpoints").exists() and not config.resume:
        raise Error(f"{out}: holds a run already.\nUse --resume to go on with it, or another --out.")


def _photos(folder: Path, notes: list[str]) -> list[Photo]:
    photos = find_photos(folder)
    if photos.skipped:
        notes.append(f"Skipped in {folder}: {', '.join(photos.skipped)}.")
    if not photos.found:
        raise Error(f"{folder}: no picture in this folder.\n" + "\n".join(notes or ["It is empty."]))
    return photos.found


def _class_photos(config: Config, base: Base, notes: list[str], progress: Progress) -> list[Photo]:
    """Pictures of the class: those of the folder, and generated ones up to the number that is asked for."""
    folder = Path(config.class_images or Path(config.out) / "class")
    folder.mkdir(parents=True, exist_ok=True)
    missing = config.num_class_images - len(find_photos(folder).found)
    sampler, number = base.sampler(), 0
    for done in range(max(0, missing)):
        while (path := folder / f"class-{number:04}.png").exists():
            number += 1
        image = sampler(
            [config.class_prompt],
            height=base.image_size,
            width=base.image_size,
            seed=config.seed + number,
            steps=config.sample_steps,
            guidance_scale=config.guidance_scale,
        )[0]
        part = path.with_name(f".{path.name}.part")
        Image.fromarray(image).save(part, format="png")
        part.replace(path)
        progress("Drawing the class", done + 1, missing, "")
    return _photos(folder, notes)[: config.num_class_images]


def _examples(
    config: Config, base: Base, photos: Sequence[Photo], classes: Sequence[Photo] | None, resolution: int
) -> tuple[Examples, Examples | None]:
    encoder = base.image_encoder

    def condition(prompt: str) -> np.ndarray[Any, Any]:
        if config.train_text_encoder:
            return np.array(base.tokenizer.encode(prompt, PROMPT_LENGTH), dtype="int32")
        return np.asarray(base.sampler().encode_prompts([prompt])[0], dtype="float32")

    make = partial(
        Examples,
        encode=lambda images: np.asarray(encoder.predict_on_batch(images), dtype="float32"),
        resolution=resolution,
        flip=config.flip,
        cache=config.cache,
    )
    instance = make(photos, condition(config.instance_prompt))
    prior = None if classes is None else make(classes, condition(config.class_prompt))
    return instance, prior


def _encode(instance: Examples, prior: Examples | None, progress: Progress) -> None:
    """All that steps will ask for: each photo at its size, class pictures at every size of the photos."""
    sizes = [bucket_of(photo.size, instance.resolution) for photo in instance.photos]
    instance.fill(list(enumerate(sizes)), lambda done, total: progress("Encoding photos", done, total, ""))
    if prior is not None:
        wanted = [(number, size) for size in sorted(set(sizes)) for number in range(len(prior.photos))]
        prior.fill(wanted, lambda done, total: progress("Encoding the class", done, total, ""))


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
