"""Options that several commands have."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer


class Dtype(StrEnum):
    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"


class PredictionType(StrEnum):
    epsilon = "epsilon"
    v_prediction = "v_prediction"


class Gelu(StrEnum):
    exact = "exact"
    tanh = "tanh"


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Overwrite = Annotated[bool, typer.Option("--overwrite", help="Replace an earlier output at --out.")]
AllowNonfinite = Annotated[
    bool, typer.Option("--allow-nonfinite", help="Write values that are NaN, infinite or overflow.")
]
License = Annotated[
    str | None,
    typer.Option(metavar="ID", help="The license of what is published (default: the base's on the Hub)."),
]
Tag = Annotated[
    list[str] | None, typer.Option(metavar="TEXT", help="A tag for the card, such as keras-dreambooth.")
]
Private = Annotated[bool, typer.Option("--private", help="Make the repository private.")]
Part = Annotated[str | None, typer.Option(metavar="SRC", help="The source for this part.")]
Report = Annotated[Path | None, typer.Option(metavar="DIR", help="A folder for report.html and report.json.")]
PredictionTypeOption = Annotated[
    PredictionType | None,
    typer.Option(help="What the UNet predicts (default: epsilon, as in KerasCV; a base's as it says)."),
]
