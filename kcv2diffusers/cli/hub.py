"""The commands push and space, and publishing at the end of other commands."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kcv2diffusers.cli.app import print_json
from kcv2diffusers.cli.options import CARD, HUB, Json, License, Overwrite, Private, Quiet, Tag
from kcv2diffusers.cli.progress import progress_bar, say, tell
from kcv2diffusers.errors import Error

if TYPE_CHECKING:
    from kcv2diffusers.publish.push import Pushed


class Stated(StrEnum):
    """Facts about the training that cannot be inferred from the weights."""

    linear_betas = "linear-betas"
    old_image_encoder = "old-image-encoder"


def push(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="A diffusers pipeline folder.")],
    repository: Annotated[
        str,
        typer.Argument(metavar="REPO_ID", help="Repository, user/name. It is created if it does not exist."),
    ],
    private: Private = False,
    revision: Annotated[
        str | None,
        typer.Option(
            metavar="BRANCH", help="Branch. It is created if it does not exist.", rich_help_panel=HUB
        ),
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request.", rich_help_panel=HUB)
    ] = False,
    message: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Commit message.", rich_help_panel=HUB)
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            help="Access token (default: HF_TOKEN, then the token of `hf auth login`).",
            show_default=False,
            rich_help_panel=HUB,
        ),
    ] = None,
    license: License = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="REPO_ID", help="Base model of the fine-tuning, for the model card.", rich_help_panel=CARD
        ),
    ] = None,
    tag: Tag = None,
    trained_with: Annotated[
        list[Stated] | None,
        typer.Option(
            help="A warning in the model card about the training, which weights do not tell.",
            rich_help_panel=CARD,
        ),
    ] = None,
    overwrite_card: Annotated[
        bool,
        typer.Option("--overwrite-card", help="Replace an existing README.md.", rich_help_panel=CARD),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run", help="Run all checks and print the model card. Nothing is sent to the Hub."
        ),
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Check a pipeline and publish it on the Hugging Face Hub.

    The command writes a model card.
    """
    pushed = publish(
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
        return print_json(pushed.to_dict())
    (say if dry_run else tell)(pushed.text())


def space(
    pipeline: Annotated[
        Path | None, typer.Argument(metavar="PIPELINE", help="Folder of the published pipeline.")
    ] = None,
    repository: Annotated[
        str | None, typer.Argument(metavar="REPO_ID", help="Repository of the published pipeline.")
    ] = None,
    out: Annotated[Path, typer.Option(metavar="DIR", help="The folder to write.")] = ...,  # type: ignore[assignment]
    title: Annotated[
        str | None, typer.Option(metavar="TEXT", help="Title (default: the name of the repository).")
    ] = None,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="Example prompt (default: the prompts of the training run)."),
    ] = None,
    tag: Tag = None,
    license: License = None,
    converter: Annotated[
        bool, typer.Option("--converter", help="A Space that runs the web page of `app`; no pipeline.")
    ] = False,
    overwrite: Overwrite = False,
    quiet: Quiet = False,
) -> None:
    """Write the folder of a Space with a demo of a pipeline.

    The pipeline must be published. The folder has a card, a Gradio app and its requirements.
    """
    from kcv2diffusers.publish.converter_space import converter_space
    from kcv2diffusers.publish.space import space as run

    if converter:
        if pipeline or prompt or license:
            raise Error(
                "--converter writes the Space of the web page; it takes no pipeline, prompt or license."
            )
        converter_space(out, title=title, tags=tag or (), overwrite=overwrite)
        return _how_to_publish(out, "USER/kcv2diffusers")
    if pipeline is None or repository is None:
        raise Error("Give the pipeline and its repository, or --converter for a Space of the web page.")
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
    _how_to_publish(out, f"{repository}-demo")


def _how_to_publish(folder: Path, repository: str) -> None:
    tell(f"Space written to {folder}; publish it:")
    tell(f"  hf repos create {repository} --type space --space-sdk gradio")
    tell(f"  hf upload {repository} {folder} . --repo-type space")


def publish(pipeline: Path, repository: str, **options: Any) -> Pushed:
    """Check and publish a pipeline, with a progress bar. `options` are those of `push`."""
    from kcv2diffusers.publish.push import push as run

    with progress_bar("Checking") as progress:
        return run(pipeline, repository, progress=progress, **options)


def log_in(repository: str, license: str | None = None) -> None:
    """Raise Error before the work, not after it, if its result could not be published."""
    from kcv2diffusers.publish.push import log_in

    log_in(repository, license=license)
