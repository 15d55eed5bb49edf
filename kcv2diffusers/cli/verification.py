"""The command verify, and verification at the end of other commands."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kcv2diffusers.cli.app import print_json
from kcv2diffusers.cli.options import (
    DRAWING,
    SOURCES,
    VERIFICATION,
    Gelu,
    Json,
    PredictionTypeOption,
    Quiet,
    Report,
    with_part_options,
)
from kcv2diffusers.cli.progress import say, stages
from kcv2diffusers.errors import Error

if TYPE_CHECKING:
    from kcv2diffusers.verification.result import Verified


class Level(StrEnum):
    """Levels of a verification. Each level includes those before it."""

    weights = "weights"
    modules = "modules"
    images = "images"


class Reference(StrEnum):
    """Implementations of the Keras side of a verification."""

    builtin = "builtin"
    keras_cv = "keras-cv"
    keras_hub = "keras-hub"


@with_part_options
def verify(
    pipeline: Annotated[
        str,
        typer.Argument(
            metavar="PIPELINE",
            help="A diffusers pipeline folder, a single .safetensors file, or hf://user/repo.",
        ),
    ],
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SRC", help="The checkpoints that the pipeline was converted from, or folders of them."
        ),
    ] = None,
    base: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC|tiny",
            help="The base of the conversion, as in convert.",
            rich_help_panel=SOURCES,
        ),
    ] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Read this variant.", rich_help_panel=SOURCES)
    ] = None,
    level: Annotated[
        Level,
        typer.Option(
            help="The last level to compare: weights, modules (forward passes), images.",
            rich_help_panel=VERIFICATION,
        ),
    ] = Level.images,
    reference: Annotated[
        Reference | None,
        typer.Option(
            help="The Keras side: built-in models (default), KerasCV's classes (need TensorFlow, keras-cv) "
            "or KerasHub's (for Stable Diffusion 3, where they are the default).",
            rich_help_panel=VERIFICATION,
        ),
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TEXT", help="Prompt. Repeat the option for more prompts.", rich_help_panel=DRAWING
        ),
    ] = None,
    steps: Annotated[int, typer.Option(help="Number of denoising steps.", rich_help_panel=DRAWING)] = 25,
    guidance_scale: Annotated[
        float,
        typer.Option(help="Guidance scale: how strictly to follow the prompt.", rich_help_panel=DRAWING),
    ] = 7.5,
    images_per_prompt: Annotated[
        int,
        typer.Option(help="Images per prompt, with seeds 0, 1, ...", rich_help_panel=DRAWING),
    ] = 3,
    image_size: Annotated[
        int | None,
        typer.Option(
            help="Height and width in pixels (default: as the pipeline states, else 512).",
            rich_help_panel=DRAWING,
        ),
    ] = None,
    gelu: Annotated[
        Gelu | None,
        typer.Option(help="Activation of an SD2 text encoder, as in convert.", rich_help_panel=SOURCES),
    ] = None,
    unet_gelu: Annotated[
        Gelu,
        typer.Option(
            help="GELU of the Keras UNet: tanh as in KerasCV, or exact as dreambooth trains.",
            rich_help_panel=SOURCES,
        ),
    ] = Gelu.tanh,
    prediction_type: PredictionTypeOption = None,
    report: Report = None,
    quiet: Quiet = False,
    as_json: Json = False,
    **parts: str | None,
) -> None:
    """Compare a pipeline with the checkpoints it was made from.

    The command compares weights, modules and images.
    """
    result = verify_pipeline(
        pipeline,
        *(sources or ()),
        report=report,
        base=base or [],
        variant=variant,
        level=level.value,
        reference=reference and reference.value,
        prompts=prompt,
        steps=steps,
        guidance=guidance_scale,
        seeds=images_per_prompt,
        size=image_size,
        gelu=gelu.value if gelu else None,
        unet_gelu=unet_gelu.value,
        prediction_type=prediction_type and prediction_type.value,
        **parts,
    )
    if as_json:
        print_json(result.to_dict())
    else:
        say(result.text())
    require_verified(result)


def keep_figures(pipeline: Path, verified: Verified) -> None:
    """Write the result of a verification into the pipeline folder, for its model card."""
    from kcv2diffusers.json_text import write_json
    from kcv2diffusers.pipeline_files import VERIFICATION_FILE

    write_json(pipeline / VERIFICATION_FILE, verified.to_dict())


def require_packages(report: Path | None) -> None:
    """Raise an error before long work if packages for the verification at its end are missing."""
    from kcv2diffusers.verification import run
    from kcv2diffusers.verification.request import Request

    run.require_packages(Request(pipeline=""), report)


def require_verified(result: Verified | None) -> None:
    """Raise Error with the reason in one line if the verification failed."""
    if result is not None and not result.passed:
        raise Error(result.reason)


def verify_pipeline(
    pipeline: str | Path, *sources: str | Path, report: Path | None, **options: Any
) -> Verified:
    """Verify with the options of `verification.run.verify`. Options that are None get their defaults."""
    from kcv2diffusers.verification.run import verify as run

    given = {name: value for name, value in options.items() if value is not None}
    with stages() as progress:
        return run(pipeline, *sources, report=report, progress=progress, **given)
