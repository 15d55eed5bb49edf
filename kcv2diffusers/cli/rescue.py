"""The command rescue."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from kcv2diffusers.cli.app import print_json
from kcv2diffusers.cli.options import RESULT, SOURCES, Dtype, Json, License, Private, Quiet
from kcv2diffusers.cli.progress import note, say, tell
from kcv2diffusers.errors import Error, plain

if TYPE_CHECKING:
    from kcv2diffusers.rescue.one import Result
    from kcv2diffusers.rescue.run import Engine, Options


def rescue(
    source: Annotated[
        str | None,
        typer.Argument(
            metavar="ORGANISATION",
            help="An organisation or user of the Hub, or a collection: its name, or the address of its page.",
        ),
    ] = None,
    list_file: Annotated[
        Path | None,
        typer.Option(
            "--list",
            metavar="FILE",
            help="A text file with the ids of repositories instead, one a line.",
            rich_help_panel=SOURCES,
        ),
    ] = None,
    to: Annotated[
        str,
        typer.Option(
            metavar="OWNER|DIR",
            help="Where the pipelines go: a user or an organisation of the Hub, or a folder. A folder is one "
            "that exists, or whose name has a slash.",
            rich_help_panel=RESULT,
        ),
    ] = "rescued/",
    work: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder of the journal and the tables (default: the folder of --to, else rescue-OWNER/).",
            rich_help_panel=RESULT,
        ),
    ] = None,
    base: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SRC|tiny",
            help="Source of the missing parts, as in convert. Default for SD1: stable-diffusion-v1-5.",
            rich_help_panel=SOURCES,
        ),
    ] = None,
    dtype: Annotated[
        Dtype | None,
        typer.Option(help="Dtype of the weights (default: as stored).", rich_help_panel=RESULT),
    ] = None,
    license: License = None,
    private: Private = False,
    ray: Annotated[
        str | None,
        typer.Option(
            metavar="ADDRESS|auto|local",
            help="Spread the repositories over a Ray cluster: one at an address, the one that runs here, or "
            "one started here.",
        ),
    ] = None,
    time_limit: Annotated[
        float, typer.Option(metavar="MINUTES", help="The longest time for one repository.")
    ] = 120.0,
    retry: Annotated[
        bool,
        typer.Option(
            "--retry", help="List again, and try again what failed or was skipped in an earlier run."
        ),
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Print what would be done, with sizes. Download nothing.")
    ] = False,
    quiet: Quiet = False,
    as_json: Json = False,
) -> None:
    """Convert and publish all repositories of an organisation.

    The pipelines are published, or stored in a folder. A run that was interrupted goes on where it was.
    """
    from kcv2diffusers.hub.client import require_hub

    require_hub()
    from kcv2diffusers.rescue import repositories
    from kcv2diffusers.rescue.run import plan
    from kcv2diffusers.rescue.run import rescue as run
    from kcv2diffusers.rescue.table import as_text

    if (source is None) == (list_file is None):
        raise Error("Give an organisation, or --list FILE.")
    options = _options(to, work, base, dtype, license, private, time_limit)
    what = str(list_file) if list_file else str(source)

    def find() -> list[str]:
        return repositories.in_file(list_file) if list_file else repositories.named(what)

    def line(done: int, total: int, result: Result) -> None:
        where = f" {result.where}" if result.where else ""
        reason = f": {result.reason}" if result.reason else ""
        note(plain(f"[{done}/{total}] {result.repository}: {result.outcome}{where}{reason}"))

    if dry_run:
        planned = plan(find, options)
        return print_json([vars(result) for result in planned]) if as_json else say(as_text(planned))
    if options.target:
        from kcv2diffusers.cli.hub import log_in

        log_in(f"{options.target}/x", license)
    with _engine(ray, options) as engine:
        outcome = run(what, find, options, engine=engine, retry=retry, tell=line)
    if as_json:
        print_json(outcome.to_dict())
    else:
        say(as_text(outcome.results))
        tell(f"Tables: {', '.join(map(str, outcome.tables))}")
    if not outcome.complete:
        raise Error("Not all repositories have ended: the Hub or the disk broke some off.\nRun it again.")


@contextmanager
def _engine(ray: str | None, options: Options) -> Iterator[Engine | None]:
    if ray is None:
        yield None
        return
    from kcv2diffusers.rescue.ray_run import on_ray

    with on_ray(ray, options.minutes) as engine:
        yield engine


def _options(
    to: str,
    work: Path | None,
    base: list[str] | None,
    dtype: Dtype | None,
    license: str | None,
    private: bool,
    minutes: float,
) -> Options:
    from kcv2diffusers.publish.names import check_names
    from kcv2diffusers.rescue.run import Options

    folder = Path(to) if "/" in to or to in (".", "..") or Path(to).is_dir() else None
    check_names("x" if folder else f"{to}/x", license)
    if folder and private:
        raise Error("--private is for repositories of the Hub.\nOmit it, or give --to OWNER.")
    if not minutes > 0:
        raise Error(f"--time-limit {minutes:g}: give minutes.")
    return Options(
        work=work or folder or Path(f"rescue-{to}"),
        target=None if folder else to,
        folder=folder,
        base=base or [],
        dtype=dtype.value if dtype else None,
        license=license,
        private=private,
        minutes=minutes,
    )
