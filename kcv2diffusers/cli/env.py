"""The command env."""

from __future__ import annotations

from kcv2diffusers.cli.app import print_json
from kcv2diffusers.cli.options import Json
from kcv2diffusers.cli.progress import say


def env(as_json: Json = False) -> None:
    """Show versions, Keras backends and devices, for a bug report.

    No path and no token is in it.
    """
    from kcv2diffusers.environment import environment

    found = environment()
    if as_json:
        return print_json(found.to_dict())
    say(found.text())
