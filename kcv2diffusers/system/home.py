"""Expand `~` in paths that no shell has expanded: in `--out=~/x`, and in option files."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def expanded(value: Any) -> Any:
    """Replace a leading `~` with the home folder, in a path or in each item of a list or tuple of paths.

    Other values are returned unchanged.
    """
    if isinstance(value, (list, tuple)):
        return type(value)(map(expanded, value))
    if isinstance(value, (str, Path)) and str(value).startswith("~"):
        try:
            return type(value)(Path(value).expanduser())
        except RuntimeError:  # no such user; a file name may start with ~
            return value
    return value
