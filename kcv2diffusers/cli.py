"""The command line: options in, messages out, no logic of its own."""

from __future__ import annotations

import json
import os
import signal
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import fields
from enum import StrEnum
from inspect import Parameter, Signature
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any, NoReturn, get_type_hints

import typer

from kcv2diffusers.dreambooth.config import Config, make_config
from kcv2diffusers.errors import Error

if TYPE_CHECKING:
    from kcv2diffusers.hub.push import Pushed
    from kcv2diffusers.verification.result import Verified

app = typer.Typer(
    help="Convert KerasCV Stable Diffusion checkpoints to diffusers pipelines, and back.",
    no_args_is_help=True,
    add_completion=False,
    rich_markup_mode=None,
    pretty_exceptions_enable=False,
)
maps_app = typer.Typer(help="The weight maps: list, show and check them.", no_args_is_help=True)
app.add_typer(maps_app, name="maps")


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


class Stated(StrEnum):
    linear_betas = "linear-betas"
    old_image_encoder = "old-image-encoder"


class Level(StrEnum):
    weights = "weights"
    modules = "modules"
    images = "images"


class Reference(StrEnum):
    builtin = "builtin"
    keras_cv = "keras-cv"


class KerasFormat(StrEnum):
    weights_h5 = "weights.h5"
    h5 = "h5"


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


def main() -> NoReturn:
    """Run the command line; every refusal is its message on stderr and exit code 1."""
    for number in (signal.SIGINT, signal.SIGTERM):
        signal.signal(number, _stop)
    try:
        app()
    except Error as error:
        _fail(str(error))
    except OSError as error:
        if isinstance(error, BrokenPipeError):
            sys.exit(141)
        _fail(f"{error.filename or 'cannot go on'}: {error.strerror or error}.")
    sys.exit(0)


def _stop(number: int, _: object) -> NoReturn:
    """Leave by an exception, so that temporary folders go away; there are none while the Hub is asked."""
    client = sys.modules.get("kcv2diffusers.hub.client")
    if client is not None and client.busy():
        os.write(2, b"kcv2diffusers: interrupted; what has been transferred is kept.\n")
        os._exit(128 + number)
    os.write(2, b"kcv2diffusers: interrupted; nothing was written.\n")
    sys.exit(128 + number)


def _fail(message: str) -> NoReturn:
    """Print what went wrong; names come from files, so nothing in them may control the terminal."""
    lines = ("".join(c if c.isprintable() else ascii(c)[1:-1] for c in line) for line in message.split("\n"))
    print("kcv2diffusers:", "\n".join(lines), file=sys.stderr)
    sys.exit(1)


@app.command()
def convert(
    sources: Annotated[
        list[str] | None,
        typer.Argument(
            metavar="SRC", help="KerasCV checkpoints, folders of them or hf://user/repo, in any order."
        ),
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The pipeline folder to write.")] = ...,  # type: ignore[assignment]
    unet: Part = None,
    text_encoder: Part = None,
    vae_decoder: Part = None,
    vae_encoder: Part = None,
    base: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC|tiny|none",
            help="Where missing parts come from: a diffusers pipeline folder, KerasCV checkpoints, "
            "hf://user/repo, or tiny; none writes only the given parts. Default for SD1: the missing "
            "parts of stable-diffusion-v1-5 from the Hub.",
        ),
    ] = None,
    tokenizer: Annotated[
        str | None,
        typer.Option(
            metavar="SRC",
            help="A folder with vocab.json and merges.txt, or CLIP's bpe_simple_vocab_16e6.txt.gz. "
            "Default: the base's, then KerasCV's cached copy, then an installed open_clip or clip.",
        ),
    ] = None,
    dtype: Annotated[Dtype | None, typer.Option(help="Dtype of the weights (default: as stored).")] = None,
    variant: Annotated[
        str | None, typer.Option(metavar="NAME", help="Variant in the file names, such as fp16.")
    ] = None,
    with_sibling: Annotated[
        bool,
        typer.Option("--with-sibling", help="Take the text encoder from hf://user/repo-text-encoder."),
    ] = False,
    placeholder_token: Annotated[
        list[str] | None,
        typer.Option(metavar="TOKEN", help="Name of an extra token embedding (textual inversion), in order."),
    ] = None,
    image_size: Annotated[
        int | None, typer.Option(help="The pipeline's default image size in pixels (512).")
    ] = None,
    gelu: Annotated[
        Gelu,
        typer.Option(help="Activation of an SD2 text encoder; tanh if trained on keras-cv 0.6.4 or newer."),
    ] = Gelu.exact,
    prediction_type: Annotated[
        PredictionType | None,
        typer.Option(help="What the UNet predicts (default: epsilon, as in KerasCV; a base's as it says)."),
    ] = None,
    allow_nonfinite: AllowNonfinite = False,
    push_to_hub: Annotated[
        str | None, typer.Option(metavar="REPO_ID", help="Publish the pipeline as this repository.")
    ] = None,
    license: License = None,
    private: Private = False,
    overwrite: Overwrite = False,
    verify: Annotated[
        bool, typer.Option("--verify", help="Compare the result with its sources at the end, as verify does.")
    ] = False,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Convert KerasCV checkpoints into a diffusers pipeline."""
    from kcv2diffusers.recognise import NAMES
    from kcv2diffusers.to_diffusers import convert as run

    if report is not None and not verify:
        raise Error("--report is where --verify writes; give that as well.")
    if push_to_hub:
        _log_in(push_to_hub)
    with _progress("Converting") as progress:
        result = run(
            *(sources or ()),
            out=out,
            unet=unet,
            text_encoder=text_encoder,
            vae_decoder=vae_decoder,
            vae_encoder=vae_encoder,
            base=base or None,
            tokenizer=tokenizer,
            dtype=dtype and dtype.value,
            variant=variant,
            with_sibling=with_sibling,
            placeholder_tokens=placeholder_token or (),
            image_size=image_size,
            gelu=gelu.value,
            prediction_type=prediction_type and prediction_type.value,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    verified = None
    if verify:
        verified = _verify(
            out,
            report=report,
            **result.sources,
            base=[str(result.base)] if result.base else [],
            variant=variant,
            gelu=gelu.value,
            prediction_type=prediction_type and prediction_type.value,
            level="images" if result.complete else "modules",
        )
        _keep_figures(out, verified)
    pushed = None
    if push_to_hub and (verified is None or verified.passed):  # what is wrong is not published
        pushed = _push(out, push_to_hub, license=license, private=private)
    if as_json:
        more = {"verified": verified, "pushed": pushed}
        _print_json(result.to_dict() | {name: found.to_dict() for name, found in more.items() if found})
        return _require_verified(verified)
    version = "" if result.version == "any" else f" ({result.version.upper()})"
    print(f"{'Pipeline' if result.complete else 'Parts'}{version} written to {result.out}")
    for part, source in result.parts.items():
        print(f"  {NAMES[part]}: {source}")
    for note in result.notes:
        print(note)
    if result.complete:
        print(f'Use it: StableDiffusionPipeline.from_pretrained("{result.out}"{_loading(variant)})')
    else:
        needs = ", ".join(NAMES[part] for part in result.missing)
        print(f"A full pipeline still needs: {needs or 'nothing; leave away --base none to write one'}.")
    print(f"{result.bytes_read / 1e9:.2f} GB in {result.seconds:.1f} s")
    if verified:
        print(verified.text())
    if pushed:
        print(pushed.text())
    _require_verified(verified)


@app.command()
def push(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="A diffusers pipeline folder.")],
    repository: Annotated[str, typer.Argument(metavar="REPO_ID", help="user/name, made if it is not there.")],
    private: Private = False,
    revision: Annotated[
        str | None, typer.Option(metavar="BRANCH", help="The branch, made if it is not there.")
    ] = None,
    create_pr: Annotated[bool, typer.Option("--create-pr", help="Open a pull request.")] = False,
    message: Annotated[str | None, typer.Option(metavar="TEXT", help="The commit's message.")] = None,
    token: Annotated[
        str | None, typer.Option(help="Default: HF_TOKEN, then that of `hf auth login`.", show_default=False)
    ] = None,
    license: License = None,
    base_model: Annotated[
        str | None, typer.Option(metavar="REPO_ID", help="What it was fine-tuned from, for the card.")
    ] = None,
    tag: Tag = None,
    trained_with: Annotated[
        list[Stated] | None, typer.Option(help="What weights do not tell, as a warning in the card.")
    ] = None,
    overwrite_card: Annotated[
        bool, typer.Option("--overwrite-card", help="Replace a README.md that is there.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check it and print the card; ask the Hub nothing.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Check a pipeline folder and publish it on the Hugging Face Hub, with a model card."""
    pushed = _push(
        pipeline,
        repository,
        private=private,
        revision=revision,
        create_pr=create_pr,
        message=message,
        token=token,
        license=license,
        base_model=base_model,
        tags=tag or (),
        trained_with=[fact.value for fact in trained_with or ()],
        overwrite_card=overwrite_card,
        dry_run=dry_run,
    )
    if as_json:
        return _print_json(pushed.to_dict())
    print(pushed.text())


@app.command()
def space(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="The published pipeline's folder.")],
    repository: Annotated[str, typer.Argument(metavar="REPO_ID", help="Where it is published.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")] = ...,  # type: ignore[assignment]
    title: Annotated[str | None, typer.Option(metavar="TEXT", help="Default: the repository's name.")] = None,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="An example (default: those of the run).")
    ] = None,
    tag: Tag = None,
    license: License = None,
    overwrite: Overwrite = False,
) -> None:
    """Write the folder of a Space (card, Gradio app, requirements) with a demo of a published pipeline."""
    from kcv2diffusers.hub.space import space as run

    run(
        pipeline,
        repository,
        out=out,
        title=title,
        prompts=prompt or (),
        tags=tag or (),
        license=license,
        overwrite=overwrite,
    )
    print(f"Space written to {out}; publish it:")
    print(f"  hf repos create {repository}-demo --type space --space-sdk gradio")
    print(f"  hf upload {repository}-demo {out} . --repo-type space")


def _push(pipeline: Path, repository: str, **options: Any) -> Pushed:
    from kcv2diffusers.hub.push import push as run

    with _progress("Checking") as progress:
        return run(pipeline, repository, progress=progress, **options)


def _log_in(repository: str) -> None:
    """Refuse now, not after the work, what cannot be published."""
    from kcv2diffusers.hub.push import log_in

    log_in(repository)


def _loading(variant: str | None) -> str:
    return f', variant="{variant}"' if variant else ""


@app.command()
def verify(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="A diffusers pipeline folder.")],
    sources: Annotated[
        list[str] | None,
        typer.Argument(metavar="SRC", help="The KerasCV checkpoints it was made of, or folders of them."),
    ] = None,
    unet: Part = None,
    text_encoder: Part = None,
    vae_decoder: Part = None,
    vae_encoder: Part = None,
    base: Annotated[
        list[str] | None,
        typer.Option(metavar="SRC|tiny", help="Where the conversion took other parts from, as in convert."),
    ] = None,
    variant: Annotated[str | None, typer.Option(metavar="NAME", help="Read this variant.")] = None,
    level: Annotated[
        Level, typer.Option(help="Compare weights; these and modules; these and images.")
    ] = Level.images,
    reference: Annotated[
        Reference,
        typer.Option(help="The Keras side: our models, or KerasCV's classes (need TensorFlow and keras-cv)."),
    ] = Reference.builtin,
    prompt: Annotated[
        list[str] | None, typer.Option(metavar="TEXT", help="What to draw; as often as there are prompts.")
    ] = None,
    steps: Annotated[int, typer.Option(help="Number of denoising steps.")] = 25,
    guidance: Annotated[float, typer.Option(help="Guidance scale.")] = 7.5,
    seeds: Annotated[int, typer.Option(help="Pictures of each prompt, from seeds 0, 1, ...")] = 3,
    size: Annotated[
        int | None, typer.Option(help="Height and width in pixels (default: the pipeline's own, 512).")
    ] = None,
    gelu: Annotated[
        Gelu, typer.Option(help="Activation of an SD2 text encoder, as in convert.")
    ] = Gelu.exact,
    unet_gelu: Annotated[
        Gelu, typer.Option(help="Of the Keras UNet: KerasCV's tanh, or exact, as dreambooth trains.")
    ] = Gelu.tanh,
    prediction_type: Annotated[
        PredictionType | None,
        typer.Option(help="What the UNet predicts (default: epsilon, as in KerasCV; a base's as it says)."),
    ] = None,
    report: Report = None,
    as_json: Json = False,
) -> None:
    """Compare a pipeline with the checkpoints it was made of: weights, modules and pictures."""
    result = _verify(
        pipeline,
        *(sources or ()),
        report=report,
        unet=unet,
        text_encoder=text_encoder,
        vae_decoder=vae_decoder,
        vae_encoder=vae_encoder,
        base=base or [],
        variant=variant,
        level=level.value,
        reference=reference.value,
        prompts=prompt,
        steps=steps,
        guidance=guidance,
        seeds=seeds,
        size=size,
        gelu=gelu.value,
        unet_gelu=unet_gelu.value,
        prediction_type=prediction_type and prediction_type.value,
    )
    if as_json:
        _print_json(result.to_dict())
    else:
        print(result.text())
    _require_verified(result)


def _keep_figures(pipeline: Path, verified: Verified) -> None:
    """Leave what was found in the pipeline folder, for its model card."""
    from kcv2diffusers.pipeline import write_json
    from kcv2diffusers.provenance import VERIFICATION_FILE

    write_json(pipeline / VERIFICATION_FILE, verified.to_dict())


def _require_verified(result: Verified | None) -> None:
    """Exit code 1 with the reason in one line, unless all is within the bars."""
    if result is not None and not result.passed:
        raise Error(result.reason)


def _verify(pipeline: Path, *sources: str | Path, report: Path | None, **options: Any) -> Verified:
    """Verify with the options of `Request`; those that are None have their defaults, and a part's name
    stands for its source.
    """
    from kcv2diffusers.recognise import NAMES
    from kcv2diffusers.verification.run import verify as run

    given = {name: value for name, value in options.items() if value is not None}
    named = {part: given.pop(part) for part in NAMES if part in given}
    with _stages() as progress:
        return run(pipeline, *sources, report=report, progress=progress, named=named, **given)


@app.command()
def to_keras(
    pipeline: Annotated[
        str, typer.Argument(metavar="PIPELINE", help="A diffusers pipeline folder, or hf://user/repo.")
    ],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")] = ...,  # type: ignore[assignment]
    format: Annotated[
        KerasFormat, typer.Option(help="weights.h5 for Keras 3, h5 for Keras 2 (legacy).")
    ] = KerasFormat.weights_h5,
    variant: Annotated[str | None, typer.Option(metavar="NAME", help="Read this variant.")] = None,
    allow_nonfinite: AllowNonfinite = False,
    overwrite: Overwrite = False,
    as_json: Json = False,
) -> None:
    """Convert a diffusers pipeline into files that KerasCV's load_weights takes (float32)."""
    from kcv2diffusers.to_kerascv import to_keras as run

    with _progress("Converting") as progress:
        result = run(
            pipeline,
            out=out,
            format=format.value,
            variant=variant,
            overwrite=overwrite,
            allow_nonfinite=allow_nonfinite,
            progress=progress,
        )
    if as_json:
        return _print_json(result.to_dict())
    print(f"KerasCV weights written to {result.out}")
    for part, file in result.files.items():
        print(f"  {file}: for the load_weights of {result.models[part]}")
    print(f"{result.bytes_written / 1e9:.2f} GB in {result.seconds:.1f} s")


@app.command()
def inspect(
    source: Annotated[
        str, typer.Argument(metavar="SRC", help="A checkpoint, a folder of them, or hf://user/repo.")
    ],
    as_json: Json = False,
) -> None:
    """Say what a checkpoint holds: part, version, container, dtype, Keras version, what is wrong."""
    from kcv2diffusers.inspection import inspect as run

    found = run(source)
    if as_json:
        return _print_json([entry.to_dict() for entry in found])
    for entry in found:
        print(entry.text())


@app.command()
def generate(
    base: Annotated[
        list[str],
        typer.Option(
            metavar="SRC|tiny", help="A pipeline folder, KerasCV checkpoints, hf://user/repo, or tiny."
        ),
    ],
    prompt: Annotated[list[str], typer.Option(metavar="TEXT", help="As often as there are prompts.")],
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write pictures to.")],
    negative_prompt: Annotated[str, typer.Option(metavar="TEXT", help="What to keep out.")] = "",
    steps: Annotated[int, typer.Option(help="Number of denoising steps.")] = 50,
    guidance_scale: Annotated[float, typer.Option(help="How strictly to follow the prompt.")] = 7.5,
    images_per_prompt: Annotated[int, typer.Option(help="Pictures of each prompt.")] = 1,
    seed: Annotated[int | None, typer.Option(help="The same seed gives the same pictures.")] = None,
    height: Annotated[int | None, typer.Option(help="In pixels, a multiple of 64.")] = None,
    width: Annotated[int | None, typer.Option(help="In pixels, a multiple of 64.")] = None,
    tokenizer: Annotated[str | None, typer.Option(metavar="SRC", help="As in convert.")] = None,
) -> None:
    """Generate pictures with Keras; KERAS_BACKEND chooses TensorFlow, JAX or PyTorch."""
    from kcv2diffusers.generate import generate as run

    with _progress("Generating", steps=True) as progress:
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
            progress=progress,
        )
    print("\n".join(map(str, paths)))


def dreambooth(**given: Any) -> None:
    """Fine-tune on photos of a subject (DreamBooth), and export the result as a diffusers pipeline."""
    from kcv2diffusers.errors import MissingExtra
    from kcv2diffusers.sources.pipeline import prediction_of

    file, as_json = given.pop("config"), given.pop("json")
    values = {
        name: str(v) if isinstance(v, StrEnum) else v for name, v in given.items() if v not in (None, [])
    }
    config = make_config(values, file)
    try:
        from kcv2diffusers.dreambooth.train import train
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "keras") from error
    if config.push_to_hub:
        _log_in(config.push_to_hub)
    with _stages() as progress:
        result = train(config, progress)
    verified = None
    if config.verify and result.export is not None:
        verified = _verify(
            result.export,
            result.checkpoint,
            report=result.out / "verify",
            base=config.base,
            unet_gelu=config.gelu,
            prompts=config.sample_prompt or [config.instance_prompt],
            steps=config.sample_steps,
            guidance=config.guidance_scale,
            prediction_type=prediction_of(result.export),
        )
        _keep_figures(result.export, verified)
    pushed = None
    if config.push_to_hub and result.export and (verified is None or verified.passed):
        options = {"license": config.license or None, "private": config.private}
        pushed = _push(result.export, config.push_to_hub, **options)
    found = {"verified": verified, "pushed": pushed}
    if as_json:
        _print_json(result.to_dict() | {name: each.to_dict() for name, each in found.items() if each})
    else:
        print("\n".join(each.text() for each in (result, *found.values()) if each))
    if not result.finished:
        sys.exit(128 + signal.SIGINT)
    _require_verified(verified)


def _dreambooth_signature() -> Signature:
    """The options of `dreambooth`: those of its Config, none with a default, and two of the command line."""
    options: list[tuple[str, Any, Any]] = [
        ("config", Path | None, typer.Option(metavar="FILE", help="A TOML file with these options."))
    ]
    kinds: dict[str, Any] = get_type_hints(Config)
    choice: Any = StrEnum
    for f in fields(Config):
        kind = kinds[f.name]
        metavar = {int: "N", float: "NUMBER", str: "TEXT", list[str]: "TEXT"}.get(kind)
        if names := f.metadata["choices"]:
            kind, metavar = choice(f.name, [(name.replace(".", "_"), name) for name in names]), None
        default = f"  [{f.default}]" if type(f.default) in (str, int, float) and f.default else ""
        option = typer.Option(metavar=metavar, help=f.metadata["help"] + default)
        options.append((f.name, kind | None, option))
    parameters = [
        Parameter(name, Parameter.KEYWORD_ONLY, default=None, annotation=Annotated[kind, option])
        for name, kind, option in options
    ]
    return Signature([*parameters, Parameter("json", Parameter.KEYWORD_ONLY, default=False, annotation=Json)])


dreambooth.__signature__ = _dreambooth_signature()  # type: ignore[attr-defined]
app.command()(dreambooth)


@maps_app.command("list")
def maps_list() -> None:
    """List the weight maps with their parts and versions."""
    from kcv2diffusers import maps

    print(maps.listing())


@maps_app.command("show")
def maps_show(
    name: Annotated[str, typer.Argument(metavar="MAP", help="A map's name, such as unet.")],
    version: Annotated[str | None, typer.Option(help="sd1 or sd2.")] = None,
) -> None:
    """Show a weight map expanded: one line for each tensor, Keras on the left, diffusers on the right."""
    from kcv2diffusers import maps

    print(maps.show(name, version))


@maps_app.command("check")
def maps_check(as_json: Json = False) -> None:
    """Check that every map is bijective, invertible and complete."""
    from kcv2diffusers import maps

    results = maps.check()
    if as_json:
        _print_json([result.to_dict() for result in results])
    else:
        print("\n".join(result.text() for result in results))
    if any(result.problems for result in results):
        raise typer.Exit(1)


def _print_json(data: Any) -> None:
    print(json.dumps(data, indent=2, default=str))


@contextmanager
def _progress(title: str, *, steps: bool = False) -> Iterator[Callable[[int, int], None]]:
    """A bar with bytes and rate, or with steps, on stderr, where that is a terminal, from the first word on
    to the last: downloads before it and uploads after it have bars of their own.
    """
    if not sys.stderr.isatty():
        yield lambda done, total: None
        return
    from rich import progress
    from rich.console import Console

    sizes = (progress.DownloadColumn(), progress.TransferSpeedColumn())
    counts = (progress.MofNCompleteColumn(),) if steps else sizes
    columns = (title, progress.BarColumn(), *counts, progress.TimeRemainingColumn())
    bar = progress.Progress(*columns, console=Console(stderr=True), transient=True)
    task = bar.add_task(title, total=None)

    def update(done: int, total: int) -> None:
        bar.start()
        bar.update(task, completed=done, total=total)
        if done >= total:
            bar.stop()

    try:
        yield update
    finally:
        bar.stop()


@contextmanager
def _stages() -> Iterator[Callable[[str, int, int, str], None]]:
    """A bar for each stage on stderr, where that is a terminal; otherwise a line now and then."""
    if not sys.stderr.isatty():

        def line(stage: str, done: int, total: int, words: str) -> None:
            if done == total or done % max(1, total // 10) == 0:
                print(f"{stage} {done}/{total} {words}".rstrip(), file=sys.stderr, flush=True)

        yield line
        return
    from rich.console import Console
    from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

    columns = (
        TextColumn("{task.description}"),
        BarColumn(20),
        MofNCompleteColumn(),
        TimeRemainingColumn(),
        TextColumn("{task.fields[words]}"),
    )
    with Progress(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, Any] = {}

        def update(stage: str, done: int, total: int, words: str) -> None:
            if stage not in tasks:
                tasks[stage] = bar.add_task(stage, total=total, words="")
            bar.update(tasks[stage], completed=done, words=words)

        yield update


if __name__ == "__main__":
    main()
