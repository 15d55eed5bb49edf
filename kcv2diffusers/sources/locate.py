"""What a user may write for a source: a path, or the name of the base that ships with the package."""

from __future__ import annotations

from importlib import resources
from os import PathLike
from pathlib import Path

from kcv2diffusers.errors import Error, SourceError

TINY = "tiny://"


def locate(source: str | PathLike[str], *, base: bool = False) -> Path:
    """Where a source lies: `tiny://` in the package, anything else at its path.

    For a `base` the name may be written `tiny`. Raises Error if that is also a file or folder here.
    """
    if source != TINY and not (base and source == "tiny"):
        return Path(source)
    if source != TINY and Path(source).exists():
        raise Error(
            f"{source}: a file or folder of that name is here.\n"
            f"Say ./{source} for it, or {TINY} for the base that ships with kcv2diffusers."
        )
    folder = Path(str(resources.files("kcv2diffusers") / "tiny"))
    if not folder.is_dir():
        raise SourceError(folder, "this installation lacks the tiny base.", "Install kcv2diffusers again.")
    return folder
