"""The commands convert, convert-lora, extract-lora, to-keras, inspect and maps."""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from enum import StrEnum
from pathlib import Path
from typing import Annotated

import typer

from kcv2diffusers.cli.app import print_json
from kcv2diffusers.cli.command import Command
from kcv2diffusers.cli.hub import log_in, publish
from kcv2diffusers.cli.options import (
    HUB,
    RESULT,
    SOURCES,
    VERIFICATION,
    AllowNonfinite,
    AllowPickle,
    DryRun,
    Dtype,
    Gelu,
    Json,
    License,
    Overwrite,
    PredictionTypeOption,
    Private,
    Quiet,
    Report,
    with_part_options,
)
from kcv2diffusers.cli.progress import progress_bar, say, tell
from kcv2diffusers.cli.verification import (
    keep_figures,
    require_packages,
    require_verified,
    verify_pipeline,
)
from kcv2diffusers.errors import Error

maps_app = typer.Typer(help="The weight maps: list, show and check them.", no_args_is_help=True)


class OutputFormat(StrEnum):
    """Output formats of `convert`."""

    pipeline = "pipeline"
    single_file = "single-file"


class LoraFormat(StrEnum):
    """Formats of LoRA files."""

    diffusers = "diffusers"
    kohya = "kohya"


class KerasFormat(StrEnum):
    """Formats of weight files for Keras."""

    weights_h5 = "weights.h5"
    h5 = "h5"
    preset = "preset"


@with_part_options
def convert(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SRC",
            help="KerasCV checkpoints, folders of them, single .safetensors files or hf://user/repo, in any "
            "order; for a single file also a diffusers pipeline.",
        ),
    ] = None,
    out: Annotated[
        Path,
        typer.Option(
            metavar="PATH",
            help="The pipeline folder to write, or a single file that ends in .safetensors.",
            rich_help_panel=RESULT,
        ),
    ] = ...,  # type: ignore[assignment]
    format: Annotated[
        OutputFormat | None,
        typer.Option(
            help="What to write (default: by the ending of --out). A single file is what ComfyUI and A1111 "
            "read.",
            rich_help_panel=RESULT,
        ),
    ] = None,
    vae: Annotated[
        str | None,
        typer.Option(
            metavar="SRC|none",
            help="Source of both halves of the VAE; none writes a single file without one.",
            rich_help_panel=SOURCES,
        ),
    ] = None,
    base: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC|tiny|none",
            help="Source of the missing parts: a diffusers pipeline folder, KerasCV checkpoints, "
            "hf://user/repo, or tiny. none writes only the given parts. Default for SD1: "
            "stable-diffusion-v1-5 from the Hub.",
            rich_help_panel=SOURCES,
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="A folder with vocab.json and merges.txt, or CLIP's bpe_simple_vocab_16e6.txt.gz. "
            "Default: the base's, then KerasCV's cached copy, then an installed open_clip or clip.",
            rich_help_panel=SOURCES,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(
            help="Dtype of the weights (default: the dtype of the variant, else as stored).",
            rich_help_panel=RESULT,
        ),
    ] = None,
    variant: Annotated[
        str | None,
        typer.Option(
            metavar="NAME",
            help="Variant in the file names. fp16 and bf16 also set the dtype.",
            rich_help_panel=RESULT,
        ),
    ] = None,
    with_sibling: Annotated[
        bool,
        typer.Option(
            "--with-sibling",
            help="Take the text encoder from the repository beside the source (user/repo-text-encoder).",
            rich_help_panel=SOURCES,
        ),
    ] = False,
    placeholder_token: Annotated[
        list[str] | None,
        typer.Option(
            metavar="TOKEN",
            help="Name of an extra token embedding (textual inversion). Repeat the option, in order.",
            rich_help_panel=RESULT,
        ),
    ] = None,
    image_size: Annotated[
        int | None,
        typer.Option(help="Default image size of the pipeline in pixels (512).", rich_help_panel=RESULT),
    ] = None,
    gelu: Annotated[
        Gelu | None,
        typer.Option(
            help="Activation of an SD2 text encoder (default: exact). Use tanh if it was trained with "
            "keras-cv 0.6.4 or newer.",
            rich_help_panel=SOURCES,
        ),
    ] = None,
    prediction_type: PredictionTypeOption = None,
    title: Annotated[
        str | None,
        typer.Option(help="Title in a single file's metadata (default: its name).", rich_help_panel=RESULT),
    ] = None,
    trigger_phrase: Annotated[
        str | None,
        typer.Option(help="Trigger phrase in a single file's metadata.", rich_help_panel=RESULT),
    ] = None,
    no_hash: Annotated[
        bool,
        typer.Option(
            "--no-hash",
            help="Write no SHA-256 of the tensors into a single file's metadata, which is faster.",
            rich_help_panel=RESULT,
        ),
    ] = False,
    ema: Annotated[
        bool,
        typer.Option(
            "--ema",
            help="Take the averaged UNet of single files (model_ema) instead of the other.",
            rich_help_panel=SOURCES,
        ),
    ] = False,
    lora: Annotated[
        list[str] | None,
        typer.Option(
            metavar="FILE[:STRENGTH]",
            help="LoRA file, or hf://user/repo, to merge into the weights (default strength: 1). Repeat the "
            "option for more.",
            rich_help_panel=SOURCES,
        ),
    ] = None,
    allow_pickle: AllowPickle = False,
    allow_nonfinite: AllowNonfinite = False,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="REPO_ID", help="Publish the pipeline as this repository.", rich_help_panel=HUB),
    ] = None,
    license: License = None,
    private: Private = False,
    overwrite: Overwrite = False,
    verify: Annotated[
        bool,
        typer.Option(
            "--verify",
            help="Verify the result against its sources at the end.",
            rich_help_panel=VERIFICATION,
        ),
    ] = False,
    report: Report = None,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
    **parts: str | None,
) -> None:
    """Convert checkpoints to a pipeline or a single file."""
    from kcv2diffusers.conversion.to_diffusers import convert as run
    from kcv2diffusers.conversion.to_single_file import check_format
    from kcv2diffusers.maps.parts import label

    if report is not None and not verify:
        raise Error("--report is where --verify writes; give that as well.")
    if verify and lora:
        raise Error(
            "--verify compares with the sources, from which weights with a merged LoRA differ.\n"
            "Omit --verify, or --lora."
        )
    if verify:
        require_packages(report)
    single = check_format(out, format.value if format else None)
    if push_to_hub and single:
        raise Error(
            "--push-to-hub publishes pipeline folders.\n"
            "Write the pipeline with it, then the single file from it."
        )
    if push_to_hub:
        log_in(push_to_hub, license)
    with progress_bar("Converting") as progress:
        result = run(
            *(sources or ()),
            out=out,
            base=base or None,
            tokenizer=tokenizer,
            dtype=dtype and dtype.value,
            variant=variant,
            with_sibling=with_sibling,
            placeholder_tokens=placeholder_token or (),
            image_size=image_size,
            gelu=gelu.value if gelu else None,
            prediction_type=prediction_type and prediction_type.value,
            vae=vae,
            format=format.value if format else None,
            title=title,
            trigger_phrase=trigger_phrase,
            hashed=not no_hash,
            lora=lora or (),
            allow_pickle=allow_pickle,
            ema=ema,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            dry_run=dry_run,
            progress=progress,
            **parts,
        )
    if dry_run:
        return print_json(result.to_dict()) if as_json else say(result.plan())
    verified = None
    if verify:
        verified = verify_pipeline(
            out,
            report=report,
            # Absolute paths: a file may be named "tiny", which on its own means the tiny base.
            **{part: str(path.absolute()) for part, path in result.sources.items()},
            base=[str(result.base.absolute())] if result.base else [],
            variant=variant,
            gelu=gelu.value if gelu else None,
            prediction_type=prediction_type and prediction_type.value,
            level="images" if result.complete else _level_of_parts(result.sources),
        )
        if not single:
            keep_figures(out, verified)
    pushed = None
    if push_to_hub and (verified is None or verified.passed):  # never publish a pipeline that failed
        pushed = publish(out, push_to_hub, license=license, private=private)
    if as_json:
        more = {"verified": verified, "pushed": pushed}
        print_json(result.to_dict() | {name: found.to_dict() for name, found in more.items() if found})
        return require_verified(verified)
    version = "" if result.version == "any" else f" ({result.version.upper()})"
    what = "Single file" if result.metadata else "Pipeline" if result.complete else "Parts"
    tell(f"{what}{version} written to {result.out}")
    for part, source in result.parts.items():
        tell(f"  {label(part)}: {source}")
    for note in result.notes:
        tell(note)
    if result.metadata:
        tell(f"Title {result.metadata['modelspec.title']!r}, {result.metadata['modelspec.architecture']}")
    elif result.complete:
        tell(f'Use it: {result.pipeline}.from_pretrained("{result.out}"{_loading(variant, result.absent)})')
    else:
        tell(result.needs())
    tell(f"{result.bytes_read / 1e9:.2f} GB in {result.seconds:.1f} s")
    if verified:
        tell(verified.text())
    if pushed:
        tell(pushed.text())
    require_verified(verified)


def _level_of_parts(parts: Iterable[str]) -> str:
    """The level at which parts of a pipeline can be verified; KerasHub's classes need a whole one."""
    from kcv2diffusers.maps.parts import family_of

    return "modules" if "builtin" in family_of(parts).references else "weights"


def _loading(variant: str | None, absent: Sequence[str]) -> str:
    arguments = {"variant": f'"{variant}"'} if variant else {}
    return "".join(f", {name}={value}" for name, value in (arguments | dict.fromkeys(absent, "None")).items())


def convert_lora(
    file: Annotated[
        str,
        typer.Argument(
            metavar="FILE",
            help="A LoRA file, a pipeline folder that dreambooth wrote one in, or hf://user/repo.",
        ),
    ],
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The file to write; it ends in .safetensors.")
    ] = ...,  # type: ignore[assignment]
    format: Annotated[
        LoraFormat | None,
        typer.Option(
            help="kohya for ComfyUI and A1111, diffusers for load_lora_weights (default: the other than the "
            "file's)."
        ),
    ] = None,
    base: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="For KerasHub's .lora.h5: the model it was trained on (default: the released models).",
        ),
    ] = None,
    allow_nonfinite: AllowNonfinite = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Convert a LoRA file to diffusers' or kohya's format.

    A file of KerasHub becomes one of diffusers. The values stay as they are, bit for bit.
    """
    from kcv2diffusers.conversion.lora import convert_lora as run

    result = run(
        file,
        out=out,
        format=format.value if format else None,
        base=base,
        overwrite=overwrite,
        allow_nonfinite=allow_nonfinite,
        dry_run=dry_run,
    )
    if as_json:
        return print_json(result.to_dict())
    return say(result.text()) if dry_run else tell(result.text())


def extract_lora(
    pipeline: Annotated[
        str,
        typer.Argument(
            metavar="PIPELINE", help="The fine-tune: a pipeline folder, checkpoint or single file."
        ),
    ],
    base: Annotated[
        str, typer.Option(metavar="PIPELINE", help="The model before the training, in any of these forms.")
    ] = ...,  # type: ignore[assignment]
    out: Annotated[
        Path, typer.Option(metavar="FILE", help="The file to write; it ends in .safetensors.")
    ] = ...,  # type: ignore[assignment]
    rank: Annotated[
        str, typer.Option(metavar="N|auto", help="Rank of every layer; auto: the smallest that keeps --keep.")
    ] = "32",
    keep: Annotated[
        float, typer.Option(metavar="SHARE", help="Share of each layer's difference that --rank auto keeps.")
    ] = 0.95,
    format: Annotated[
        LoraFormat, typer.Option(help="kohya for ComfyUI and A1111, diffusers for load_lora_weights.")
    ] = LoraFormat.diffusers,
    dtype: Annotated[Dtype, typer.Option(help="Dtype of the factors.")] = Dtype.float32,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Extract a LoRA from a fine-tune of all weights.

    The difference of each layer to the base is cut to a low rank.
    """
    from kcv2diffusers.conversion.lora_extract import AUTO
    from kcv2diffusers.conversion.lora_extract import extract_lora as run

    if rank != AUTO and not rank.isdecimal():
        raise Error(f"--rank {rank}: give a number of at least 1, or {AUTO}.")
    with progress_bar("Extracting") as progress:
        result = run(
            pipeline,
            base=base,
            out=out,
            rank="auto" if rank == AUTO else int(rank),
            keep=keep,
            format=format.value,
            dtype=dtype.value,
            overwrite=overwrite,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        return print_json(result.to_dict())
    return say(result.text()) if dry_run else tell(result.text())


def to_keras(
    pipeline: Annotated[
        str,
        typer.Argument(
            metavar="PIPELINE",
            help="A diffusers pipeline folder, a single .safetensors file, or hf://user/repo.",
        ),
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")] = ...,  # type: ignore[assignment]
    format: Annotated[
        KerasFormat,
        typer.Option(
            help="weights.h5 for Keras 3, h5 for Keras 2 (legacy), preset for KerasHub's from_preset."
        ),
    ] = KerasFormat.weights_h5,
    variant: Annotated[str | None, typer.Option(metavar="NAME", help="Read this variant.")] = None,
    allow_nonfinite: AllowNonfinite = False,
    overwrite: Overwrite = False,
    dry_run: DryRun = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Convert a diffusers pipeline to weights for KerasCV.

    The files are float32. The load_weights methods of KerasCV's models read them.
    """
    from kcv2diffusers.conversion.to_kerascv import to_keras as run

    with progress_bar("Converting") as progress:
        result = run(
            pipeline,
            out=out,
            format=format.value,
            variant=variant,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            dry_run=dry_run,
            progress=progress,
        )
    if as_json:
        return print_json(result.to_dict())
    if dry_run:
        return say(result.plan())
    tell(f"Keras weights written to {result.out}")
    for file, model in dict.fromkeys((file, result.models[part]) for part, file in result.files.items()):
        tell(f"  {file}: for the load_weights of {model}")
    tell(f"{result.bytes_written / 1e9:.2f} GB in {result.seconds:.1f} s")


def inspect(
    sources: Annotated[
        list[str],
        typer.Argument(
            metavar="SRC", help="Checkpoints, folders of them, pipelines, hf://user/repo, or tiny."
        ),
    ],
    allow_pickle: AllowPickle = False,
    as_json: Json = False,
) -> None:
    """Show what checkpoints contain, and what is wrong with them.

    For each part: version, container, dtype, Keras version, sizes. A file that cannot be read does not stop
    the others.
    """
    from kcv2diffusers.conversion.inspection import inspect as run
    from kcv2diffusers.conversion.inspection import missing_text

    found, refused = [], []
    for source in sources:
        try:
            found += run(source, allow_pickle=allow_pickle)
        except Error as error:
            refused.append(error)
    if as_json and found:
        print_json([entry.to_dict() for entry in found])
    elif not as_json:
        for entry in found:
            say(entry.text())
        if missing := missing_text(found):
            say(missing)
    if refused:
        raise refused[0] if len(sources) == 1 else Error("\n".join(map(str, refused)))


@maps_app.command("list", cls=Command)
def maps_list() -> None:
    """List the weight maps with their parts and versions."""
    from kcv2diffusers.conversion import map_check

    say(map_check.listing())


@maps_app.command("show", cls=Command)
def maps_show(
    name: Annotated[str, typer.Argument(metavar="MAP", help="A map's name, such as unet.")],
    version: Annotated[str | None, typer.Option(help="sd1 or sd2.")] = None,
) -> None:
    """Show a weight map, one line for each tensor.

    Keras is on the left, diffusers on the right.
    """
    from kcv2diffusers.conversion import map_check

    say(map_check.show(name, version))


@maps_app.command("check", cls=Command)
def maps_check(as_json: Json = False) -> None:
    """Check that every map is bijective, invertible and complete."""
    from kcv2diffusers.conversion import map_check

    results = map_check.check()
    if as_json:
        print_json([result.to_dict() for result in results])
    else:
        say("\n".join(result.text() for result in results))
    if any(result.problems for result in results):
        raise typer.Exit(1)
