"""Every option of a run, defined once for the command line, the TOML file and the record of a run."""

from __future__ import annotations

import json
import tomllib
from collections.abc import Mapping
from dataclasses import Field, asdict, dataclass, field, fields
from pathlib import Path
from typing import Any, get_type_hints

from kcv2diffusers.backend import BACKENDS
from kcv2diffusers.dreambooth.subjects import Subject, check_subjects, read_subjects
from kcv2diffusers.errors import Error, is_unicode, no_choice, plain
from kcv2diffusers.system.home import expanded


def _option(
    default: Any,
    help: str,
    *,
    metavar: str | None = None,
    choices: tuple[str, ...] = (),
    least: float | None = None,
    most: float | None = None,
    command: bool = True,
) -> Any:
    metadata = {
        "help": help, "metavar": metavar, "choices": choices, "least": least, "most": most,
        "command": command,
    }  # fmt: skip
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


# Of the options beta1, beta2 and epsilon, those that an optimizer has.
MOMENTS = {
    "adamw": ("beta1", "beta2", "epsilon"),
    "adamw8bit": ("beta1", "beta2", "epsilon"),
    "adam_mini": ("beta1", "beta2", "epsilon"),
    "lion": ("beta1", "beta2"),
    "prodigy": ("beta1", "beta2", "epsilon"),
    "adafactor": (),
}
MOST_DECAY = 0.999999  # with 1 a moment would never change


@dataclass(frozen=True, kw_only=True)
class Config:
    """The options of a DreamBooth run. Sizes are in pixels."""

    instance_images: str = _option("", "Folder with photos of the subject.", metavar="DIR")
    instance_prompt: str = _option(
        "", 'Prompt that describes the photos, with the identifier: "a photo of sks dog".'
    )
    class_prompt: str = _option(
        "", 'Prompt of the class, without the identifier: "a photo of a dog". Turns on prior preservation.'
    )
    class_images: str = _option(
        "", "Folder with class images. Missing images are generated into it.", metavar="DIR"
    )
    num_class_images: int = _option(100, "Number of class images.", least=1)
    validation_images: str = _option(
        "", "Folder with photos of the subject that are not trained on: their loss is logged.", metavar="DIR"
    )
    validation_every: int = _option(
        100, "Steps between validations. 0: only before the first and after the last step.", least=0
    )
    subjects: list[Subject] = _option([], "Further subjects, only in a file.", command=False)
    captions: bool = _option(
        True,
        "Describe a photo by its caption, if there is one: the text in NAME.txt beside it, or in "
        "metadata.jsonl.",
    )
    masks: bool = _option(
        False,
        "Weight the loss of a photo by its mask: the brightness of NAME-mask.png beside it, else its "
        "opacity.",
    )
    base: list[str] = _option(
        [],
        "The model to fine-tune: a pipeline folder, a single .safetensors file, hf://user/repo, tiny, or "
        "KerasCV checkpoints (repeat the option for each).",
        metavar="SRC|tiny",
    )
    tokenizer: str = _option("", "Tokenizer of the base, as in convert.", metavar="SRC")
    out: str = _option("", "Folder of the run: checkpoints, logs, sample images.", metavar="DIR")
    export: str = _option("", "Folder for the fine-tuned model as a diffusers pipeline.", metavar="DIR")
    verify: bool = _option(
        False,
        "Verify the exported pipeline against the last checkpoint. The report is written to OUT/verify.",
    )

    steps: int = _option(400, "Number of training steps.", least=1)
    batch_size: int = _option(
        1,
        "Photos per step, on all devices and processes together. With prior preservation a step has as many "
        "class images.",
        least=1,
    )
    learning_rate: float = _option(
        5e-6, "Learning rate of the UNet (LoRA: 1e-4 is usual). With prodigy a factor, by default 1.", least=0
    )
    lr_schedule: str = _option(
        "constant",
        "Learning-rate schedule.",
        choices=("constant", "linear", "cosine", "cosine_with_restarts", "polynomial"),
    )
    lr_cycles: int = _option(1, "Number of half cosines of cosine_with_restarts.", least=1)
    lr_power: float = _option(1.0, "Power of the polynomial schedule; 1 is linear.", least=0)
    warmup_steps: int = _option(0, "Warm-up steps of the learning rate.", least=0)
    optimizer: str = _option(
        "adamw",
        "Optimizer. adam_mini and adamw8bit (bitsandbytes, on PyTorch) need the least memory. prodigy finds "
        "the learning rate itself.",
        choices=tuple(MOMENTS),
    )
    weight_decay: float = _option(0.01, "Decoupled weight decay.", least=0)
    beta1: float = _option(
        0.0, "Decay of the first moment. 0: that of the optimizer, 0.9.", least=0, most=MOST_DECAY
    )
    beta2: float = _option(
        0.0,
        "Decay of the second moment. 0: that of the optimizer, 0.999 (lion: 0.99).",
        least=0,
        most=MOST_DECAY,
    )
    epsilon: float = _option(
        0.0,
        "What is added to the root of the second moment. 0: that of the optimizer, 1e-7 (adam_mini, "
        "adamw8bit, prodigy: 1e-8).",
        least=0,
    )
    clip_norm: float = _option(
        1.0, "Maximum global norm of the gradients (clipping). 0 turns clipping off.", least=0
    )
    accumulate: int = _option(1, "Gradient-accumulation steps.", least=1)
    ema: float = _option(
        0.0,
        "Decay of the exponential moving average (EMA) of the weights, which is exported. 0 turns EMA off.",
        least=0,
    )
    train_text_encoder: bool = _option(False, "Train the text encoder as well.")
    text_encoder_learning_rate: float = _option(
        0.0, "Learning rate of the text encoder. 0: the learning rate of the UNet.", least=0
    )
    text_encoder_steps: int = _option(0, "Steps after which the text encoder is frozen. 0: never.", least=0)
    train_token: list[str] = _option(
        [],
        "Textual inversion: a new token in the prompts, whose embedding is all that is trained (a usual "
        "learning rate: 5e-4). Repeat the option for more.",
        metavar="TOKEN",
    )
    train_token_from: str = _option(
        "", "Word that the embeddings of --train-token start from. Default: the letters of each token."
    )
    lora_rank: int = _option(0, "Rank of a LoRA. 0 trains all weights.", least=0)
    lora_alpha: float = _option(
        0.0, "LoRA alpha (scale = alpha / rank). 0: the rank, or the alphas of --lora.", least=0
    )
    lora_conv_rank: int = _option(
        0, "Rank of the LoRA of the UNet's convolutions. 0: convolutions have none.", least=0
    )
    lora_conv_alpha: float = _option(0.0, "LoRA alpha of convolutions. 0: their rank.", least=0)
    lora: str = _option(
        "", "LoRA file, or hf://user/repo, to go on training, with the ranks it has.", metavar="FILE"
    )

    prior_weight: float = _option(1.0, "Weight of the prior-preservation loss (class images).", least=0)
    snr_gamma: float = _option(0.0, "Gamma of min-SNR loss weighting (5 is usual). 0 turns it off.", least=0)
    offset_noise: float = _option(0.0, "Strength of offset noise (0.1 is usual).", least=0)
    caption_dropout: float = _option(
        0.0,
        "Share of the prompts, also of class images, that is replaced by the empty prompt (0.1 is usual).",
        least=0,
        most=1,
    )
    prediction_type: str = _option(
        "auto",
        "Prediction type of the base. auto: as its scheduler config states, epsilon for KerasCV checkpoints.",
        choices=("auto", "epsilon", "v_prediction"),
    )
    zero_terminal_snr: bool = _option(
        False,
        "Rescale the noise schedule so that its last timestep is noise alone (zero terminal SNR), as the "
        "scheduler of the export then says. Needs a base, or --prediction-type, of v_prediction.",
    )
    resolution: int = _option(
        0,
        "Training resolution. Images are resized to about N x N pixels in area. 0: the resolution of the "
        "base.",
        least=0,
    )
    flip: bool = _option(False, "Flip half of the images horizontally (not for faces or text).")
    cache: bool = _option(True, "Encode images and prompts once, before training.")
    unet_gelu: str = _option(
        "exact", "GELU of the UNet. diffusers computes exact, KerasCV tanh.", choices=("exact", "tanh")
    )
    precision: str = _option(
        "auto",
        "Precision of the computation. Weights stay float32. auto: bfloat16 on a GPU that has it, float16 "
        "on another, float32 on a CPU.",
        choices=("auto", "float32", "mixed_bfloat16", "mixed_float16", "fp32", "bf16", "fp16"),
    )
    backend: str = _option(
        "auto",
        "Keras backend. auto: KERAS_BACKEND, else the best one that is installed.",
        choices=("auto", *BACKENDS),
    )
    devices: int = _option(1, "Number of devices of one process for data parallelism (JAX).", least=1)
    rematerialise: bool = _option(
        False, "Recompute activations in the backward pass (gradient checkpointing): slower, less memory."
    )
    seed: int = _option(0, "Random seed. The same seed gives the same run on the same backend.")

    checkpoint_minutes: float = _option(
        10.0,
        "Minutes between checkpoints; 0 for none by time. They are written during training, from a copy in "
        "host memory (adamw: 12 bytes a trained weight, with --ema 16). Where it would take more than half "
        "of what is free, training waits.",
        least=0,
    )
    checkpoint_every: int = _option(0, "Steps between checkpoints. 0: by time only.", least=0)
    keep_checkpoints: int = _option(2, "Number of checkpoints to keep.", least=1)
    checkpoint_format: str = _option(
        "weights.h5", "Format of the weight files in checkpoints.", choices=("weights.h5", "h5")
    )
    resume: bool = _option(False, "Resume from the newest checkpoint in --out.")
    sample_prompt: list[str] = _option([], "Prompt of a sample image. Repeat the option for more prompts.")
    sample_every: int = _option(0, "Steps between sample images. 0: only after the last step.", least=0)
    sample_steps: int = _option(25, "Denoising steps of a sample image.", least=1)
    guidance_scale: float = _option(7.5, "Guidance scale of sample images and class images.", least=0)
    sample_batch_size: int = _option(
        0,
        "Pictures drawn at a time, of the class and of prompts, in --precision; 0: 4 on a GPU, --batch-size "
        "on a CPU.",
        least=0,
    )
    tensorboard: bool = _option(False, "Write TensorBoard logs (needs tensorboard).")
    wandb: bool = _option(False, "Log to Weights & Biases (needs wandb).")

    push_to_hub: str = _option("", "Publish --export as this repository, user/name.", metavar="REPO_ID")
    license: str = _option(
        "", "License of the published model (default: the license of the base).", metavar="ID"
    )
    private: bool = _option(False, "Make the repository private.")

    @property
    def prior_preservation(self) -> bool:
        """Whether each step contains class images."""
        return any(subject.class_prompt for subject in self.every_subject)

    @property
    def trained_parts(self) -> tuple[str, ...]:
        """The parts of the model that are trained, and that a checkpoint holds."""
        if self.train_token:
            return ("text_encoder",)
        return ("unet", "text_encoder") if self.train_text_encoder else ("unet",)

    @property
    def every_subject(self) -> list[Subject]:
        """The subject of the options, if they have one, and those of `subjects`."""
        names = [f.name for f in fields(Subject)]
        own = Subject(**{name: getattr(self, name) for name in names})
        return [*([own] if own != Subject() else []), *self.subjects]

    @property
    def trains_lora(self) -> bool:
        """Whether low-rank updates are trained, and not the weights."""
        return bool(self.lora_rank or self.lora)

    def toml(self, *, public: bool = False) -> str:
        """The options that differ from their defaults, as a TOML file for `--config`.

        With `public`, only the options in `PUBLIC`, which reveal nothing about this machine.
        """
        values = {f.name: getattr(self, f.name) for f in fields(self) if f.name in PUBLIC or not public}
        if public:
            values["subjects"] = [subject.public for subject in self.subjects]
        lines = [
            f"{f.name} = {_literal(values[f.name])}"
            for f in fields(self)
            if f.name in values and values[f.name] != _default(f)
        ]
        return "\n".join(lines) + "\n"


_OWN = (
    "instance_images",
    "class_images",
    "validation_images",
    "base",
    "tokenizer",
    "lora",
    "out",
    "export",
    "resume",
    "push_to_hub",
    "license",
    "private",
    "tensorboard",
    "wandb",
)
# Former option names, which the files of earlier runs may contain.
_RENAMED = {"gelu": "unet_gelu"}
_PRECISIONS = {"fp32": "float32", "bf16": "mixed_bfloat16", "fp16": "mixed_float16"}
PUBLIC = {f.name for f in fields(Config)} - set(_OWN)


def make_config(given: Mapping[str, Any], file: Path | None = None) -> Config:
    """A Config from the options `given`, which override those of a TOML `file`, which override the defaults.

    Raises Error for invalid options.
    """
    values = read_options(file) | dict(given) if file is not None else dict(given)
    if "precision" in values:
        values["precision"] = _PRECISIONS.get(values["precision"], values["precision"])
    if values.get("optimizer") == "prodigy":
        values.setdefault("learning_rate", 1.0)
    values["subjects"] = read_subjects(values.get("subjects", []), "subjects")
    config = Config(**values)
    own = not config.subjects or bool(config.instance_images or config.instance_prompt or config.class_prompt)
    for name, missing in (
        ("instance_images", own and not config.instance_images),
        ("instance_prompt", own and not config.instance_prompt),
        ("base", not config.base),
        ("out", not config.out),
    ):
        if missing:
            raise Error(
                f"--{name.replace('_', '-')} is needed.\nGive it, or put {name} into the --config file."
            )
    for f in fields(config):
        if f.metadata["command"]:
            _check(f, getattr(config, f.name))
    if config.lora and config.lora_rank:
        raise Error("--lora has ranks of its own.\nOmit --lora-rank, or --lora to train a new LoRA.")
    if config.class_images and not config.class_prompt:
        raise Error("--class-images needs --class-prompt, the text that describes them.")
    check_subjects(config.subjects)
    if config.verify and not config.export:
        raise Error("--verify compares the pipeline of --export; give that as well.")
    if not config.ema < 1:
        raise Error(f"--ema {config.ema}: give a number below 1, such as 0.999.")
    if config.push_to_hub and not config.export:
        raise Error("--push-to-hub publishes --export.\nGive --export DIR.")
    if config.optimizer == "prodigy" and (config.text_encoder_learning_rate or config.text_encoder_steps):
        raise Error(
            "--optimizer prodigy finds one learning rate for all weights.\n"
            "Omit --text-encoder-learning-rate and --text-encoder-steps."
        )
    if config.lora_conv_rank and not config.lora_rank:
        raise Error("--lora-conv-rank goes with --lora-rank, the rank of the attention layers. Give both.")
    for name in ("train_text_encoder", "lora_rank", "lora"):
        if config.train_token and getattr(config, name):
            raise Error(
                f"--train-token trains nothing but embeddings of new tokens.\n"
                f"Omit --{name.replace('_', '-')}, or omit --train-token."
            )
    for name in ("beta1", "beta2", "epsilon"):
        if getattr(config, name) and name not in MOMENTS[config.optimizer]:
            raise Error(f"--{name} is not an option of {config.optimizer}.\nOmit it, or change --optimizer.")
    if config.resolution % 64:
        raise Error(f"--resolution {config.resolution}: give a multiple of 64.")
    return config


def read_options(file: Path) -> dict[str, Any]:
    """Read the options of a TOML file and check their types. Raises Error for an invalid file."""
    try:
        values = tomllib.loads(file.read_text(encoding="utf-8-sig"))
    except OSError as error:
        raise Error(f"{file}: cannot be read: {error.strerror}.\nCheck the path.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise Error(f"{file}: not a TOML file: {error}.\nIt holds lines such as: steps = 400") from error
    return checked_options(values, str(file))


def checked_options(values: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Check the names and types of options that a TOML file holds; `where` names it in messages.

    Former names become today's, and `~` in paths is expanded. Raises Error.
    """
    kinds = get_type_hints(Config)
    values = {_RENAMED.get(name, name): value for name, value in values.items()}
    unknown = sorted(values.keys() - kinds.keys())
    if unknown:
        raise Error(f"{where}: unknown options {plain(', '.join(unknown))}.\nKnown are {', '.join(kinds)}.")
    if "subjects" in values:
        values["subjects"] = read_subjects(values["subjects"], where)
    for name, value in values.items():
        if name == "subjects":
            continue
        if kinds[name] is float and type(value) is int:
            values[name] = float(value)
        elif kinds[name] == list[str]:
            values[name] = [value] if isinstance(value, str) else value
            if not isinstance(values[name], list) or not all(isinstance(item, str) for item in values[name]):
                raise Error(f"{where}: {name} is {value!r}.\nGive a list of texts.")
        elif type(value) is not kinds[name]:
            raise Error(f"{where}: {name} is {value!r}.\nGive a value of type {kinds[name].__name__}.")
    return {name: expanded(value) if name in _OWN else value for name, value in values.items()}


def _check(f: Field[Any], value: Any) -> None:
    option = "--" + f.name.replace("_", "-")
    for text in [value] if isinstance(value, str) else value if isinstance(value, list) else ():
        if not is_unicode(text):
            raise Error(
                f"{option} {plain(text)}: holds bytes that are not UTF-8.\nWrite or name it in UTF-8."
            )
    if f.metadata["choices"] and value not in f.metadata["choices"]:
        raise no_choice(option, value, f.metadata["choices"])
    least, most = f.metadata["least"], f.metadata["most"]
    if least is not None and not value >= least:
        raise Error(f"{option} {value}: give at least {least}.")
    if most is not None and not value <= most:
        raise Error(f"{option} {value}: give at most {most}.")


def _default(f: Field[Any]) -> Any:
    return f.default_factory() if callable(f.default_factory) else f.default


def _literal(value: Any) -> str:
    if isinstance(value, Subject):
        entries = [f"{name} = {_literal(text)}" for name, text in asdict(value).items() if text]
        return "{" + ", ".join(entries) + "}"
    if isinstance(value, list):
        return "[" + ", ".join(map(_literal, value)) + "]"
    if isinstance(value, bool):
        return str(value).lower()
    if isinstance(value, str):  # TOML basic strings use the escapes of JSON
        return json.dumps(value, ensure_ascii=False)
    return repr(value)
