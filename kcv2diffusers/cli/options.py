"""Options shared by several commands."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from enum import StrEnum
from pathlib import Path
from typing import Annotated, Any

import typer

from kcv2diffusers.cli.progress import be_quiet
from kcv2diffusers.maps.parts import parts

# Titles of option groups in the help.
SOURCES, RESULT, DRAWING = "Sources", "Result", "Images"
VERIFICATION, HUB, CARD = "Verification", "The Hub", "The model card"


class Dtype(StrEnum):
    """Dtypes of weights, by their full names and by the short names of variants."""

    float32 = "float32"
    float16 = "float16"
    bfloat16 = "bfloat16"
    fp32 = "fp32"
    fp16 = "fp16"
    bf16 = "bf16"


class PredictionType(StrEnum):
    """Prediction types of a UNet."""

    epsilon = "epsilon"
    v_prediction = "v_prediction"


class Gelu(StrEnum):
    """The two GELUs: exact, and the tanh approximation."""

    exact = "exact"
    tanh = "tanh"


Json = Annotated[bool, typer.Option("--json", help="Print the result as JSON.")]
Quiet = Annotated[
    bool,
    typer.Option(
        "--quiet", "-q", callback=be_quiet, help="Print no progress and no notes, only errors and results."
    ),
]
DryRun = Annotated[bool, typer.Option("--dry-run", help="Run all checks, print the plan, write nothing.")]
Overwrite = Annotated[
    bool,
    typer.Option("--overwrite", help="Replace an earlier output at --out.", rich_help_panel=RESULT),
]
AllowPickle = Annotated[
    bool,
    typer.Option(
        "--allow-pickle",
        help="Let PyTorch's restricted unpickler open .ckpt files, which are never opened otherwise.",
    ),
]
AllowNonfinite = Annotated[
    bool,
    typer.Option(
        "--allow-nonfinite",
        help="Write NaN, infinite and overflowing values instead of refusing them.",
        rich_help_panel=RESULT,
    ),
]
License = Annotated[
    str | None,
    typer.Option(
        metavar="ID",
        help="License of the published model (default: the license of the base on the Hub).",
        rich_help_panel=HUB,
    ),
]
Tag = Annotated[
    list[str] | None,
    typer.Option(
        metavar="TEXT", help="Tag of the model card, such as keras-dreambooth.", rich_help_panel=CARD
    ),
]
Private = Annotated[bool, typer.Option("--private", help="Make the repository private.", rich_help_panel=HUB)]
Report = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Folder for report.html and report.json.", rich_help_panel=VERIFICATION),
]
PredictionTypeOption = Annotated[
    PredictionType | None,
    typer.Option(
        help="Prediction type of the UNet (default: epsilon for KerasCV, as stated for a pipeline).",
        rich_help_panel=SOURCES,
    ),
]


def with_part_options(command: Callable[..., None]) -> Callable[..., None]:
    """Return the command with one option for each part of a model, such as --unet, in place of `**parts`."""
    signature = inspect.signature(command, eval_str=True)
    params = list(signature.parameters.values())
    assert params.pop().kind is inspect.Parameter.VAR_KEYWORD
    options = [
        inspect.Parameter(
            part.name,
            inspect.Parameter.KEYWORD_ONLY,
            default=None,
            annotation=Annotated[
                str | None,
                typer.Option(metavar="SRC", help=f"Source of the {part.label}.", rich_help_panel=SOURCES),
            ],
        )
        for part in parts().values()
    ]
    params = [param.replace(kind=inspect.Parameter.KEYWORD_ONLY) for param in params]
    at = next(at for at, param in enumerate(params) if param.name == "base")
    typed: Any = command
    typed.__signature__ = signature.replace(parameters=[*params[:at], *options, *params[at:]])
    return command
