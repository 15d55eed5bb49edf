"""Behaviour shared by all commands: option groups in the help, old option names, `~` in paths, and "Did you
mean" for misspelt values. Typer itself suggests commands and options.
"""

from __future__ import annotations

import re
from collections.abc import Iterator, Sequence
from difflib import get_close_matches
from typing import Any

import typer
from typer.core import TyperCommand

from kcv2diffusers.system.home import expanded

# Old option names by command. They still work, but the help does not show them: a thing has one name.
RENAMED = {
    "verify": {
        "--guidance": "--guidance-scale",
        "--seeds": "--images-per-prompt",
        "--size": "--image-size",
    },
    "dreambooth": {"--gelu": "--unet-gelu"},
}
# Metavars of values that are or may be paths. `~` is expanded here, because shells do not expand `--out=~/x`.
PATHS = {
    "DIR",
    "OWNER|DIR",
    "FILE",
    "FILE[:STRENGTH]",
    "PATH",
    "PIPELINE",
    "SRC",
    "SRC|none",
    "SRC|tiny",
    "SRC|tiny|none",
    "STUDY.toml",
}
_REST = "Options"  # options without a group, listed last


class Command(TyperCommand):
    """The base class of all commands."""

    def parse_args(self, ctx: Any, args: list[str]) -> list[str]:
        """Parse the arguments, including old option names, and expand `~` in paths."""
        try:
            rest: list[str] = super().parse_args(ctx, list(self._renamed(args)))
        except typer.BadParameter as error:
            error.message += _proposal(error)
            raise
        for param in self.params:
            if param.metavar in PATHS:
                ctx.params[param.name] = expanded(ctx.params.get(param.name))
        return rest

    def _renamed(self, args: Sequence[str]) -> Iterator[str]:
        """Yield the arguments with old option names replaced, up to a `--`."""
        names = RENAMED.get(self.name or "", {})
        for at, word in enumerate(args):
            if word == "--":
                yield from args[at:]
                return
            name, equals, value = word.partition("=")
            yield f"{names.get(name, name)}{equals}{value}"

    def format_options(self, ctx: Any, formatter: Any) -> None:
        """Write arguments, then options grouped by their `rich_help_panel`.

        Typer groups them only with rich, whose import takes longer than the rest of the help.
        """
        groups: dict[str, list[tuple[str, str]]] = {"Arguments": []}
        for param in self.get_params(ctx):
            if record := param.get_help_record(ctx):
                is_argument = param.param_type_name == "argument"
                group = "Arguments" if is_argument else getattr(param, "rich_help_panel", None) or _REST
                groups.setdefault(group, []).append(record)
        groups[_REST] = groups.pop(_REST, [])
        for title, records in groups.items():
            if records:
                with formatter.section(title):
                    formatter.write_dl(records)


def _proposal(error: typer.BadParameter) -> str:
    """Return " Did you mean X?" for the choice closest to an invalid value, "" if none is close."""
    choices = [str(choice) for choice in getattr(getattr(error.param, "type", None), "choices", ())]
    given = re.match(r"'(.*)' is not one of", error.message)
    near = get_close_matches(given[1].lower(), choices, 1) if given else []
    return f" Did you mean {near[0]!r}?" if near else ""
