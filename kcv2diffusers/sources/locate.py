"""Resolve a source given by the user: a path, an address on the Hub, or the tiny base in the package."""

from __future__ import annotations

import re
from collections.abc import Collection
from importlib import resources
from os import PathLike
from pathlib import Path

from kcv2diffusers.errors import Error, SourceError, plain
from kcv2diffusers.hub.address import SCHEME, website

TINY = "tiny://"
_URL = re.compile(r"https?://|(www\.)?(huggingface|hf)\.co/", re.I)


def locate(source: str | PathLike[str], *, parts: Collection[str] | None = None) -> Path:
    """The path of one source: a pipeline folder, a tokenizer or a checkpoint.

    `source` is a path, which is returned unchanged, "tiny" for the base in the package, or an hf:// address,
    which is downloaded to the cache. `parts` limits the download (default: all parts). Raises Error if the
    source consists of several checkpoints.
    """
    first, *others = locate_all(source, pipelines=True, parts=parts)
    if others:
        two = f"{plain(first.name)} and {plain(others[0].name)}"
        raise Error(f"{source}: several checkpoints, {two} among them.\nName one.")
    return first


def locate_all(
    source: str | PathLike[str],
    *,
    pipelines: bool = False,
    parts: Collection[str] | None = None,
    variant: str | None = None,
) -> list[Path]:
    """The paths of a source: `tiny` or `tiny://` is in the package, `hf://` is downloaded, others are paths.

    A repository with several checkpoints gives several paths. `parts` (default: all; empty: only a tokenizer)
    and `variant` (the preferred weight files) limit the download. A diffusers pipeline on the Hub is accepted
    only if `pipelines` is true. Raises Error if `tiny` is also a file or folder here, for a web address, and
    for errors of the Hub.
    """
    if isinstance(source, str) and source.startswith(SCHEME):
        from kcv2diffusers.hub.download import fetch

        return fetch(source, parts, variant, pipelines=pipelines)
    _check_address(source)
    if source not in (TINY, "tiny"):
        return [Path(source)]
    if source != TINY and Path(source).exists():
        raise Error(
            f"{source}: a file or folder of that name is here.\n"
            f"Say ./{source} for it, or {TINY} for the base that ships with kcv2diffusers."
        )
    folder = Path(str(resources.files("kcv2diffusers") / "tiny"))
    if not folder.is_dir():
        raise SourceError(folder, "this installation lacks the tiny base.", "Install kcv2diffusers again.")
    return [folder]


def locate_lora(source: str | PathLike[str]) -> Path:
    """The path of a LoRA file: `hf://` is downloaded, others are paths.

    Raises Error for a web address and for errors of the Hub.
    """
    if isinstance(source, str) and source.startswith(SCHEME):
        from kcv2diffusers.hub.download import fetch_lora

        return fetch_lora(source)
    _check_address(source)
    return Path(source)


def _check_address(source: str | PathLike[str]) -> None:
    """Raise Error for a web address."""
    if isinstance(source, str) and _URL.match(source) and not Path(source).exists():
        address = website(source)
        remedy = f"Write {address} for it." if address else "Download it and give the file or folder."
        raise Error(f"{source}: a web address, which is not read.\n{remedy}")
