"""push, space, and publishing at the end of other commands."""

from __future__ import annotations

from enum import StrEnum
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from kcv2diffusers.cli.app import print_json
from kcv2diffusers.cli.options import CARD, HUB, Json, License, Overwrite, Private, Quiet, Tag
from kcv2diffusers.cli.progress import progress_bar, say, tell

if TYPE_CHECKING:
    from kcv2diffusers.publish.push import Pushed


class Stated(StrEnum):
    linear_betas = "linear-betas"
    old_image_encoder = "old-image-encoder"


def push(
    pipeline: Annotated[Path, typer.Argument(metavar="PIPELINE", help="A diffusers pipeline folder.")],
    repository: Annotated[str, typer.Argument(metavar="REPO_ID", help="user/name, made if it is not there.")],
    private: Private = False,
    revision: Annotated[
        str | None,
        typer.Option(metavar="BRANCH", help="The branch, made if it is not there.", rich_help_panel=HUB),
    ] = None,
    create_pr: Annotated[
        bool, typer.Option("--create-pr", help="Open a pull request.", rich_help_panel=HUB)
    ] = False,
    message: Annotated[
        str | None, typer.Option(metavar="TEXT", help="The commit's message.", rich_help_panel=HUB)
    ] = None,
    token: Annotated[
        str | None,
        typer.Option(
            help="Default: HF_TOKEN, then that of `hf auth login`.", show_default=False, rich_help_panel=HUB
        ),
    ] = None,
    license: License = None,
    base_model: Annotated[
        str | None,
        typer.Option(
            metavar="REPO_ID", help="What it was fine-tuned from, for the card.", rich_help_panel=CARD
        ),
    ] = None,
    tag: Tag = None,
    trained_with: Annotated[
        list[Stated] | None,
        typer.Option(help="What weights do not tell, as a warning in the card.", rich_help_panel=CARD),
    ] = None,
    overwrite_card: Annotated[
        bool,
        typer.Option("--overwrite-card", help="Replace a README.md that is there.", rich_help_panel=CARD),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Check it and print the card; ask the Hub nothing.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Check a pipeline and publish it on the Hugging Face Hub.

    A model card is written for it.
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
    quiet: Quiet = False,
) -> None:
    """Write the folder of a Space with a demo of a pipeline.

    The pipeline is a published one; the folder has a card, a Gradio app and its requirements.
    """
    from kcv2diffusers.publish.space import space as run

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
    tell(f"Space written to {out}; publish it:")
    tell(f"  hf repos create {repository}-demo --type space --space-sdk gradio")
    tell(f"  hf upload {repository}-demo {out} . --repo-type space")


def publish(pipeline: Path, repository: str, **options: Any) -> Pushed:
    from kcv2diffusers.publish.push import push as run

    with progress_bar("Checking") as progress:
        return run(pipeline, repository, progress=progress, **options)


def log_in(repository: str, license: str | None = None) -> None:
    """Refuse now, not after the work, what cannot be published."""
    from kcv2diffusers.publish.push import log_in

    log_in(repository, license=license)
