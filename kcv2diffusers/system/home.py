"""`~` in paths, where no shell saw it: in `--out=~/x`, and in files of options."""

from __future__ import annotations

from pathlib import Path
from typing import Any


def expanded(value: Any) -> Any:
    """A path, or several, with the home folder for a `~` in front."""
    if isinstance(value, (list, tuple)):
        return type(value)(map(expanded, value))
    if isinstance(value, (str, Path)) and str(value).startswith("~"):
        try:
            return type(value)(Path(value).expanduser())
        except RuntimeError:  # nobody of that name: a file may be called so
            return value
    return value
