"""The commands dreambooth and generate."""

from __future__ import annotations

import sys
from dataclasses import fields
from enum import StrEnum
from inspect import Parameter, Signature
from pathlib import Path
from typing import Annotated, Any, get_type_hints

import typer

from kcv2diffusers.backend import choose_backend
from kcv2diffusers.cli.app import print_json
from kcv2diffusers.cli.hub import log_in, publish
from kcv2diffusers.cli.options import Json, Quiet
from kcv2diffusers.cli.progress import be_quiet, note, progress_bar, say, stages, tell
from kcv2diffusers.cli.verification import (
    keep_figures,
    require_packages,
    require_verified,
    verify_pipeline,
)
from kcv2diffusers.dreambooth.config import Config, make_config


def generate(
    base: Annotated[
        list[str],
        typer.Option(
            metavar="SRC|tiny",
            help="The model: a pipeline folder, a single .safetensors file, hf://user/repo, tiny, or KerasCV "
            "checkpoints (repeat the option for each).",
        ),
    ],
    prompt: Annotated[
        list[str], typer.Option(metavar="TEXT", help="Prompt. Repeat the option for more prompts.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder for the images.")],
    negative_prompt: Annotated[str, typer.Option(metavar="TEXT", help="Negative prompt.")] = "",
    steps: Annotated[int, typer.Option(help="Number of denoising steps.")] = 50,
    guidance_scale: Annotated[
        float, typer.Option(help="Guidance scale: how strictly to follow the prompt.")
    ] = 7.5,
    images_per_prompt: Annotated[int, typer.Option(help="Images per prompt.")] = 1,
    seed: Annotated[
        int | None, typer.Option(help="Random seed. The same seed gives the same images.")
    ] = None,
    height: Annotated[int | None, typer.Option(help="Height in pixels, a multiple of 64.")] = None,
    width: Annotated[int | None, typer.Option(help="Width in pixels, a multiple of 64.")] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="SRC", help="Tokenizer, as in convert.")] = None,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:STRENGTH]",
            help="LoRA file, or hf://user/repo, to draw with (default strength: 1). Repeat the option for "
            "more.",
        ),
    ] = None,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Generate images with Keras.

    KERAS_BACKEND selects TensorFlow, JAX or PyTorch.
    """
    from kcv2diffusers.generation import generate as run

    choose_backend(note)
    with progress_bar("Generating", steps=True) as progress:
        paths = run(
            *base,
            prompts=prompt,
            out=out,
            negative_prompt=negative_prompt,
            steps=steps,
            guidance_scale=guidance_scale,
            images_per_prompt=images_per_prompt,
            seed=seed,
            height=height,
            width=width,
            tokenizer=tokenizer,
            lora=lora or (),
            progress=progress,
        )
    if as_json:
        return print_json({"out": out, "images": paths})
    say("\n".join(map(str, paths)))


def dreambooth(**given: Any) -> None:
    """Fine-tune on photos of a subject (DreamBooth), and export.

    The result is exported as a diffusers pipeline.
    """
    from kcv2diffusers.dreambooth.fine_tuning import trainer
    from kcv2diffusers.dreambooth.ranks import rank
    from kcv2diffusers.sources.diffusers_pipeline import prediction_of

    file, as_json = given.pop("config"), given.pop("json")
    del given["quiet"]
    values = {
        name: str(v) if isinstance(v, StrEnum) else v for name, v in given.items() if v not in (None, [])
    }
    config = make_config(values, file)
    if rank():
        be_quiet(True)
    train = trainer(config, note)
    report = Path(config.out) / "verify"
    if config.verify:
        require_packages(report)
    if config.push_to_hub:
        log_in(config.push_to_hub, config.license or None)
    with stages() as progress:
        result = train(config, progress)
    verified = None
    if config.verify and result.export is not None:
        verified = verify_pipeline(
            result.export,
            result.checkpoint,
            report=report,
            base=config.base,
            unet_gelu=config.unet_gelu,
            prompts=config.sample_prompt or [each.instance_prompt for each in config.every_subject],
            steps=config.sample_steps,
            guidance=config.guidance_scale,
            prediction_type=prediction_of(result.export),
        )
        keep_figures(result.export, verified)
    pushed = None
    if config.push_to_hub and result.export and (verified is None or verified.passed):
        options = {"license": config.license or None, "private": config.private}
        pushed = publish(result.export, config.push_to_hub, **options)
    found = {"verified": verified, "pushed": pushed}
    if as_json and not rank():
        print_json(result.to_dict() | {name: each.to_dict() for name, each in found.items() if each})
    else:
        tell("\n".join(each.text() for each in (result, *found.values()) if each))
    if not result.finished:
        sys.exit(128 + result.stopped_by)
    require_verified(verified)


# Option groups in the help: the first option of each group, in the order of Config, and its title.
_GROUPS = {
    "instance_images": "Photos and base",
    "out": "Result",
    "steps": "Training",
    "train_text_encoder": "Trained weights",
    "prior_weight": "Loss and data",
    "precision": "Machine",
    "checkpoint_minutes": "Checkpoints",
    "sample_prompt": "Sample images and logs",
    "push_to_hub": "The Hub",
}


def _dreambooth_signature() -> Signature:
    """Return the options of `dreambooth`: those of Config, without defaults, and those of all commands.

    Without defaults, only options that the user gives override the --config file.
    """
    options: list[tuple[str, Any, Any]] = [
        ("config", Path | None, typer.Option(metavar="FILE", help="A TOML file with these options."))
    ]
    group = ""
    kinds: dict[str, Any] = get_type_hints(Config)
    choice: Any = StrEnum
    for f in fields(Config):
        if not f.metadata["command"]:
            continue
        kind = kinds[f.name]
        group = _GROUPS.get(f.name, group)
        usual = {int: "N", float: "NUMBER", str: "TEXT", list[str]: "TEXT"}.get(kind)
        metavar = f.metadata["metavar"] or usual
        if names := f.metadata["choices"]:
            kind, metavar = choice(f.name, [(name.replace(".", "_"), name) for name in names]), None
        default = f"  [{f.default}]" if type(f.default) in (str, int, float) and f.default else ""
        option = typer.Option(metavar=metavar, help=f.metadata["help"] + default, rich_help_panel=group)
        options.append((f.name, kind | None, option))
    parameters = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
        for name, kind, option in options
    ]
    parameters += [
        Parameter(name, Parameter.KEYWORD_ONLY, default=False, annotation=kind)
        for name, kind in (("quiet", Quiet), ("json", Json))
    ]
    return Signature(parameters)


dreambooth.__signature__ = _dreambooth_signature()  # type: ignore[attr-defined]
