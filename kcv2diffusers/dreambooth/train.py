"""A DreamBooth run, from a folder of photos to checkpoints, sample images and a pipeline."""

from __future__ import annotations

import os
import shutil
import signal
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from types import FrameType
from typing import Any

import keras

from kcv2diffusers.conversion.lora import convert_lora
from kcv2diffusers.conversion.to_diffusers import convert, is_output
from kcv2diffusers.diffusion import Schedule
from kcv2diffusers.dreambooth.adamw8bit import check_adamw8bit
from kcv2diffusers.dreambooth.batches import SIZED, Batches, Examples
from kcv2diffusers.dreambooth.checkpoints import Checkpoints, checkpoint_path, least_bytes, saved_steps
from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.dreambooth.devices import (
    allow_tf32,
    attention_noted,
    best_precision,
    devices_of,
    spread,
)
from kcv2diffusers.dreambooth.drawings import Drawings, samples
from kcv2diffusers.dreambooth.examples import (
    class_photos,
    encode,
    held_photos,
    make_examples,
    subject_photos,
)
from kcv2diffusers.dreambooth.follow import LOG, Follow, Unread, read_log
from kcv2diffusers.dreambooth.lora import add_lora, load_lora, store_frozen_as_computed
from kcv2diffusers.dreambooth.memory import memory_errors, training_advice
from kcv2diffusers.dreambooth.model import DreamBooth
from kcv2diffusers.dreambooth.optimizers import make_optimizer
from kcv2diffusers.dreambooth.photos import Photo
from kcv2diffusers.dreambooth.ranks import ALONE, Group, joined
from kcv2diffusers.dreambooth.record import keep_record
from kcv2diffusers.dreambooth.tokens import add_tokens, name_tokens
from kcv2diffusers.dreambooth.validation import Validation
from kcv2diffusers.environment import own_version
from kcv2diffusers.errors import Error
from kcv2diffusers.maps.parts import label
from kcv2diffusers.models import rematerialise
from kcv2diffusers.models.base import Base, BaseFiles, open_base
from kcv2diffusers.models.config import Gelu
from kcv2diffusers.models.layers import dtype_policy
from kcv2diffusers.pictures import chart
from kcv2diffusers.pipeline_files import KOHYA_LORA_FILE, LORA_FILE, MODEL_INDEX, RUN_FILE, SAMPLES_FILE
from kcv2diffusers.progress import StageProgress, silent_stages
from kcv2diffusers.sources.lora import check_finite, read_lora
from kcv2diffusers.system.garbage import collect_new_only
from kcv2diffusers.system.interruption import SIGNALS, is_watching, keeps
from kcv2diffusers.system.output import check_folder, check_target
from kcv2diffusers.targets.lora_merge import Merge, check_merges


@dataclass
class Result:
    """The result of a run: its last checkpoint and the exported pipeline, if any.

    `finished` says whether the run reached its last step. Otherwise `stopped_by` is the number of the signal
    that stopped it.
    """

    out: Path
    checkpoint: Path
    step: int
    finished: bool
    stopped_by: int = 0
    export: Path | None = None
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        return {k: str(v) if isinstance(v, Path) else v for k, v in asdict(self).items()}

    def text(self) -> str:
        """A summary of a few lines for the user."""
        lines = [*self.notes, f"Step {self.step}: {self.checkpoint}"]
        if not self.finished:
            lines.append("Stopped before the end; --resume goes on.")
        if self.export:
            lines.append(f"Pipeline: {self.export}")
        return "\n".join(lines)


def train(config: Config, progress: StageProgress = silent_stages) -> Result:
    """Run the training that `config` describes.

    Raises Error with a message for the user; files saved before the error are kept. If a launcher started
    several processes, each trains on its share of every step, and that of rank 0 does everything else.
    """
    with joined(keras.backend.backend()) as group:
        return _train(config, progress if group.first else silent_stages, group)


def _train(config: Config, progress: StageProgress, group: Group) -> Result:
    out = Path(config.out)
    notes: list[str] = []
    with group.first_alone():  # downloads, and errors that all would print
        _check_folders(config)
        config = _resolved(config)
        allow_tf32()
        if config.optimizer == "adamw8bit":
            check_adamw8bit()
        devices = devices_of(config, group)
        photos, held = subject_photos(config, notes), held_photos(config, notes)
        files = _base_files(config)
        prompts = [photo.prompt for photo in photos]
        if config.train_token:
            name_tokens(files, config.train_token, prompts)
        files.check_prompts(*prompts, *(photo.prompt for photo in held))
    group.check_same(config.toml(public=True), own_version(), *_names([*photos, *held]))
    if done := _finished_before(config, files.prediction_type, group):
        return done
    matches = {part: match for part, (match, _) in files.parts.items()}
    with memory_errors(lambda: training_advice(config, matches)):
        base = files.load(moments=True, dtype=config.precision)
    out.mkdir(parents=True, exist_ok=True)
    keeps(f"what is in {out} is kept, and --resume goes on with it")
    drawings = Drawings(config, base.sampler(), base.image_size)
    classes = class_photos(config, base, notes, progress, group) if config.prior_preservation else None
    group.check_same(*_names(classes or ()))
    instance, prior, kept_out = make_examples(config, base, photos, classes, held)
    if config.cache:
        with memory_errors(lambda: "Use a lower --resolution or --precision."):
            encode(instance, prior, kept_out, progress, group)
    with memory_errors(lambda: training_advice(config, matches)):
        trained = _freeze(config, base)
    _release(config, base, drawings, instance, prior, kept_out)
    stepped = {"unet": base.unet, **trained}.values()
    with spread(devices, stepped), memory_errors(lambda: training_advice(config, matches)):
        model = _trainer(config, base, group)
        checkpoints = Checkpoints(
            out,
            model,
            trained,
            matches,
            base.stated,
            base.names,
            format=config.checkpoint_format,
            keep=config.keep_checkpoints,
            note=notes.append,
            tokenizer=base.tokenizer.files if config.train_token else None,
        )
        start = _start(config, checkpoints, group)
        group.check_same(str(start))
        if group.first:
            keep_record(config, start, group.count)
        batches = Batches(
            instance,
            prior,
            batch_size=config.batch_size,
            steps=config.steps,
            start=start,
            seed=config.seed,
            offset_noise=config.offset_noise,
            caption_dropout=config.caption_dropout,
            timesteps=base.schedule.num_train_timesteps,
            group=group,
        )
        validation = None
        if kept_out is not None and group.first:
            count = base.schedule.num_train_timesteps
            validation = Validation(
                kept_out, out, batch_size=config.batch_size, timesteps=count, seed=config.seed, start=start
            )
        run = Follow(config, checkpoints, drawings, start, progress, validation, group)
        if start < config.steps:

            def advice() -> str:
                return training_advice(config, matches, model, lambda: group.part(batches.step(run.step)))

            with (
                _signals(run.stop),
                memory_errors(advice),
                checkpoints.finished(),
                attention_noted(notes),
                collect_new_only(),
            ):
                callbacks = Unread([run], add_history=True, model=model, epochs=1, steps=len(batches))
                model.fit(_dataset(batches), epochs=1, shuffle=False, verbose=0, callbacks=callbacks)
    if run.problem:
        raise Error(run.problem)
    finished = run.step >= config.steps
    result = Result(out, checkpoint_path(out, run.step), run.step, finished, run.stopped_by, notes=notes)
    if config.optimizer == "prodigy":
        optimizer: Any = getattr(model.optimizer, "inner_optimizer", model.optimizer)
        rate = float(optimizer.estimate)
        notes.append(f"Prodigy's learning rate after step {run.step}: {rate:.2g}.")
    if group.first:
        chart(run.losses(), "loss").save(out / "loss.png")
    group.leave()
    if validation and validation.rows:
        notes.append(validation.text())
    if result.finished and group.first:
        run.draw()
        if config.export:
            result.export = _export(config, run.step, base.prediction_type)
    return result


def _check_folders(config: Config) -> None:
    """Raise Error early if an output folder could not be used at the end."""
    out = Path(config.out)
    if (out / "checkpoints").exists() and not config.resume:
        raise Error(f"{out}: holds a run already.\nUse --resume to go on with it, or another --out.")
    check_folder(out)
    read_log(out / LOG)
    for subject in config.every_subject:
        if subject.class_images:
            check_folder(Path(subject.class_images))
    if config.export:
        check_target(Path(config.export), overwrite=config.resume, replaceable=is_output, needed=0)


def _base_files(config: Config) -> BaseFiles:
    """Open the base. Raises Error if it, the prompts or the disk space do not fit the run."""
    gelu: Gelu = "exact" if config.unet_gelu == "exact" else "tanh"
    files = open_base(*config.base, tokenizer=config.tokenizer or None, gelu=gelu)
    if config.prediction_type != "auto":
        files.prediction_type = config.prediction_type
    if config.zero_terminal_snr:
        files.schedule = _zero_terminal_snr(files.schedule, files.prediction_type)
    files.schedule.check(files.prediction_type)
    given = [prompt for each in config.every_subject for prompt in (each.instance_prompt, each.class_prompt)]
    files.check_prompts(*given, *config.sample_prompt)
    if config.lora:
        _check_lora(config, files)
    if not saved_steps(Path(config.out)):
        check_folder(Path(config.out), least_bytes(config, files.parts))
    return files


def _zero_terminal_snr(schedule: Schedule, prediction_type: str) -> Schedule:
    """The noise schedule with zero terminal SNR, sampled from its last timestep on (Lin et al. 2023).

    See arXiv:2305.08891. Raises Error for a UNet that predicts noise.
    """
    if prediction_type != "v_prediction":
        raise Error(
            "--zero-terminal-snr needs a model that predicts v; this base predicts noise (epsilon).\n"
            "Choose a base of v_prediction. With --prediction-type v_prediction this one learns it, slowly."
        )
    return replace(schedule, rescale_betas_zero_snr=True, timestep_spacing="trailing")


def _check_lora(config: Config, files: BaseFiles) -> None:
    """Raise Error if the LoRA file does not fit the base, or the parts that are trained."""
    lora = read_lora(config.lora)
    check_merges([Merge(lora, 1.0)], (match for match, _ in files.parts.values()))
    check_finite(lora)
    if lora.of("text_encoder") and not config.train_text_encoder:
        raise Error(
            f"{lora.path}: changes the text encoder too.\nAdd --train-text-encoder to go on with both."
        )
    if absent := [part for part in config.trained_parts if not lora.of(part)]:
        raise Error(
            f"{lora.path}: changes no layer of the {label(absent[0])}, which is to be trained.\n"
            "Give a LoRA of the parts to train, or --lora-rank for a new one."
        )


def _finished_before(config: Config, prediction_type: str, group: Group) -> Result | None:
    """The result of a resumed run that had already ended; None for any other run.

    Nothing is trained. Only a missing export is made.
    """
    out = Path(config.out)
    last = max(saved_steps(out), default=0) if config.resume else 0
    ended = last >= config.steps and (not config.sample_prompt or samples(out, last).exists())
    if not group.from_first(ended):
        return None
    group.leave()
    checkpoint = checkpoint_path(out, last)
    result = Result(out, checkpoint, last, True, notes=["The run has ended before; nothing is trained."])
    if config.export and group.first:
        result.export = Path(config.export)
        if not (result.export / MODEL_INDEX).exists():
            _export(config, last, prediction_type)
    return result


def _export(config: Config, step: int, prediction_type: str) -> Path:
    """Convert the checkpoint after `step` steps to a pipeline; add the run's record and sample images."""
    out, export = Path(config.out), Path(config.export)
    checkpoint = checkpoint_path(out, step)
    convert(
        checkpoint,
        out=export,
        base=config.base,
        # That of the checkpoint knows the new tokens.
        tokenizer=None if config.train_token else config.tokenizer or None,
        prediction_type=prediction_type,
        overwrite=config.resume,
    )
    if config.trains_lora:
        shutil.copy(checkpoint / LORA_FILE, export)
        convert_lora(checkpoint, out=export / KOHYA_LORA_FILE, format="kohya")
    (export / RUN_FILE).write_text(config.toml(public=True), encoding="utf-8")
    if config.sample_prompt:
        shutil.copy(samples(out, step), export / SAMPLES_FILE)
    return export


def _resolved(config: Config) -> Config:
    """The options with "auto" replaced by its value, where the run depends on it."""
    running = keras.backend.backend()
    if config.backend not in ("auto", running):
        raise Error(f"--backend {config.backend}: Keras runs on {running} already.\nStart a new process.")
    best = best_precision()
    precision = best if config.precision == "auto" else config.precision
    drawn = config.sample_batch_size or (config.batch_size if best == "float32" else 4)
    return replace(config, backend=running, precision=precision, sample_batch_size=drawn)


def _names(photos: Sequence[Photo]) -> list[str]:
    """What must be the same in all processes about photos."""
    return [f"{photo.path.name} {photo.size} {photo.repeats} {photo.prompt}" for photo in photos]


def _freeze(config: Config, base: Base) -> dict[str, keras.Model]:
    """Set which variables are trainable, and return the trained parts."""
    base.image_encoder.trainable = base.decoder.trainable = False
    base.text_encoder.trainable = config.train_text_encoder
    trained = {part: getattr(base, part) for part in config.trained_parts}
    if config.train_token:
        base.unet.trainable = False
        add_tokens(base.text_encoder, base.tokenizer, config.train_token, config.train_token_from)
    for model in (base.unet, base.text_encoder):
        rematerialise(model, config.rematerialise)
    lora = read_lora(config.lora) if config.lora else None
    for part, model in trained.items():
        if lora is not None:
            load_lora(model, lora.of(part), base.names, config.lora_alpha)
        elif config.lora_rank:
            add_lora(
                model,
                config.lora_rank,
                config.lora_alpha or config.lora_rank,
                config.seed,
                conv_rank=config.lora_conv_rank,
                conv_alpha=config.lora_conv_alpha,
            )
    for part in (base.unet, base.text_encoder, base.decoder, base.image_encoder):
        store_frozen_as_computed(part)
    return trained


def _trainer(config: Config, base: Base, group: Group = ALONE) -> DreamBooth:
    """The compiled DreamBooth model."""
    with dtype_policy(config.precision):
        model = DreamBooth(
            base.unet,
            base.text_encoder if "text_encoder" in config.trained_parts else None,
            prediction_type=base.prediction_type,
            prior_weight=config.prior_weight,
            snr_gamma=config.snr_gamma,
            schedule=base.schedule,
            group=group,
            photos=config.batch_size if group.count > 1 and keras.backend.backend() == "torch" else 0,
        )
    # Not `trainable_variables`, which is empty for a model that a LoRA has frozen.
    slower = [v for v in base.text_encoder.variables if v.trainable] if config.train_text_encoder else []
    # On a CPU, XLA's convolutions are slower than TensorFlow's own; JAX has no alternative.
    model.compile(make_optimizer(config, slower), jit_compile=keras.backend.backend() == "jax")
    model.optimizer.build(model.trainable_variables)
    return model


def _release(config: Config, base: Base, drawings: Drawings, *examples: Examples | None) -> None:
    """Delete the models that are no longer needed, to free their memory for training."""
    if config.cache:
        for each in examples:
            if each is not None:
                each.encode = None
        del base.image_encoder
    if "text_encoder" not in config.trained_parts:
        if config.sample_prompt:
            drawings.context = drawings.encode()
        del base.text_encoder, drawings.sampler.text_encoder


def _start(config: Config, checkpoints: Checkpoints, group: Group) -> int:
    """Restore the newest checkpoint and return its step; 0 for a new run."""
    if group.first:
        checkpoints.tidy()
    steps = saved_steps(checkpoints.folder) if config.resume else []
    if not steps:
        return 0
    checkpoints.restore(steps[-1])
    return steps[-1]


def _dataset(batches: Batches) -> Any:
    """The dataset for `fit`; TensorFlow needs a signature if sizes differ between steps."""
    if keras.backend.backend() != "tensorflow" or len(batches.by_size) == 1:
        return batches
    import tensorflow as tf

    spec = {
        name: tf.TensorSpec([None] * value.ndim if name in SIZED else value.shape, value.dtype)
        for name, value in batches.step(0).items()
    }
    steps = (batches[index] for index in range(len(batches)))
    dataset = tf.data.Dataset.from_generator(lambda: steps, output_signature=(spec,))
    return dataset.apply(tf.data.experimental.assert_cardinality(len(batches)))


@contextmanager
def _signals(stop: Callable[[int], None]) -> Iterator[None]:
    """Call `stop` with the signal number on SIGINT or SIGTERM; a second signal gets the previous handler."""
    before: dict[int, Any] = {}  # previous handlers
    received: list[int] = []

    def handle(number: int, _: FrameType | None) -> None:
        received.append(number)
        if len(received) == 1:
            stop(number)
            os.write(2, b"\nStopping after this step. Once more ends at once.\n")
        elif not is_watching():
            signal.signal(number, before[number])
            signal.raise_signal(number)

    for stopping in SIGNALS:
        before[stopping] = signal.signal(stopping, handle)
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)
