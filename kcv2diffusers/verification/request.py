"""The options of `verify`, saved to a file for the two sides to read."""

from __future__ import annotations

import json
import shlex
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Literal

from kcv2diffusers.errors import Error, no_choice

LEVELS = ("weights", "modules", "images")
REFERENCES = ("builtin", "keras-cv", "keras-hub")
GELUS = ("exact", "tanh")
Gelu = Literal["exact", "tanh"]
PROMPTS = ("a red car on a street",)
MULTIPLE = {"builtin": 64, "keras-cv": 128, "keras-hub": 16}  # pixels; KerasCV rounds to multiples of 128
_FILE = "request.json"


@dataclass(frozen=True, kw_only=True)
class Request:
    """The options of a verification.

    `sources` and `named` (by part) are the checkpoints that `pipeline` was made of. `base` is where the
    conversion took the other parts from. `gelu` is the activation of an SD2 text encoder (None: as the
    conversion infers it). `unet_gelu` is the GELU that the Keras UNet was trained with. `prediction_type` is
    what the UNet predicts (None: as in `sides.scheduler`). `reference` is the Keras side (None: the first of
    the family's). `size` is in pixels; None means the pipeline's own.
    """

    pipeline: str
    sources: list[str] = field(default_factory=list)
    named: dict[str, str] = field(default_factory=dict)
    base: list[str] = field(default_factory=list)
    variant: str | None = None
    gelu: str | None = None
    unet_gelu: Gelu = "tanh"
    prediction_type: str | None = None
    reference: str | None = None
    level: str = "images"
    prompts: list[str] = field(default_factory=lambda: list(PROMPTS))
    steps: int = 25
    guidance: float = 7.5
    seeds: int = 3
    size: int | None = None

    def __post_init__(self) -> None:
        """Raise Error for an option that is out of range."""
        for option, value, choices in (
            ("level", self.level, LEVELS),
            ("reference", self.reference, REFERENCES),
            ("gelu", self.gelu, GELUS),
            ("unet-gelu", self.unet_gelu, GELUS),
        ):
            if value not in choices and not (option in ("gelu", "reference") and value is None):
                raise no_choice(f"--{option}", value, choices)
        for option, number in (("steps", self.steps), ("images-per-prompt", self.seeds)):
            if number < 1:
                raise Error(f"--{option} {number}: give at least 1.")
        if self.steps > 1000:
            raise Error(f"--steps {self.steps}: there are 1000 timesteps.")
        multiple = MULTIPLE.get(self.reference or "", 1)  # checked again when the reference is known
        if self.size is not None and (self.size < multiple or self.size % multiple):
            raise Error(f"--image-size {self.size}: give a multiple of {multiple}.")
        if not self.prompts:
            raise Error("Give at least one prompt.")

    def reaches(self, level: str) -> bool:
        """Whether `level` is checked: the requested level and those below it are."""
        return LEVELS.index(self.level) >= LEVELS.index(level)

    def save(self, folder: Path) -> None:
        """Write the request into a folder, for the processes of the two sides."""
        (folder / _FILE).write_text(json.dumps(asdict(self)), encoding="utf-8")

    @classmethod
    def load(cls, folder: Path) -> Request:
        """Read what `save` has written."""
        return cls(**json.loads((folder / _FILE).read_text(encoding="utf-8")))

    def command(self) -> str:
        """The command line of this request."""
        words = ["kcv2diffusers", "verify", self.pipeline, *self.sources]
        for part, source in self.named.items():
            words += ["--" + part.replace("_", "-"), source]
        for base in self.base:
            words += ["--base", base]
        options = {
            "variant": self.variant,
            "gelu": self.gelu,
            "unet-gelu": self.unet_gelu,
            "prediction-type": self.prediction_type,
            "reference": None if self.reference == "builtin" else self.reference,
            "level": self.level,
        }
        defaults = Request(pipeline="")
        for name, value in options.items():
            if value is not None and value != getattr(defaults, name.replace("-", "_")):
                words += ["--" + name, value]
        if self.reaches("modules") and self.size is not None:
            words += ["--image-size", str(self.size)]
        if self.reaches("images"):
            for prompt in self.prompts:
                words += ["--prompt", prompt]
            words += ["--steps", str(self.steps), "--guidance-scale", f"{self.guidance:g}"]
            words += ["--images-per-prompt", str(self.seeds)]
        return shlex.join(words)
