"""Download from the Hub: list a repository, select the files that are needed, download them once.

huggingface_hub manages the cache, resumes interrupted downloads and shows the progress. All files are from
one commit. Offline, the cache provides the files and the listing.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from functools import cache
from pathlib import Path
from typing import TYPE_CHECKING

from kcv2diffusers.errors import Error, MissingExtra, pipeline_given, plain
from kcv2diffusers.hub.address import Address, parse, readings
from kcv2diffusers.hub.client import NoRevision, NotThere, Unreachable, asking, connect
from kcv2diffusers.hub.listing import (
    Listing,
    candidates,
    chosen,
    is_pipeline,
    lora_file,
    pipeline_files,
    small_files,
    tokenizer_files,
    unsafe,
)
from kcv2diffusers.maps.parts import label

if TYPE_CHECKING:
    from huggingface_hub import HfApi

SIBLINGS = ("-text-encoder", "-text_encoder", "_text_encoder")
_own: ContextVar[tuple[Path, frozenset[str]] | None] = ContextVar("own", default=None)


@contextmanager
def cache_of_its_own(folder: Path, repositories: Collection[str]) -> Iterator[None]:
    """A block in which the files of `repositories` are cached in `folder`, those of others as usual.

    The folder may be removed after the block, to free its space.
    """
    _fetch.cache_clear()  # its paths may be in a folder that was removed
    token = _own.set((folder, frozenset(repositories)))
    try:
        yield
    finally:
        _own.reset(token)
        _fetch.cache_clear()


def _cache_of(repository: str) -> Path | None:
    """The folder of the cache for a repository; None is the default one."""
    own = _own.get()
    return own[0] if own and repository in own[1] else None


def fetch(
    source: str,
    parts: Collection[str] | None = None,
    variant: str | None = None,
    *,
    pipelines: bool = True,
) -> list[Path]:
    """Download the files of `source` that hold `parts` (None: all parts; empty: only a tokenizer).

    Returns the paths of the checkpoints in the cache, or the single folder of a diffusers pipeline or of a
    tokenizer. `variant` is the preferred variant of a pipeline's weight files. Raises Error with a message
    for the user, also for a pipeline if `pipelines` is false.
    """
    return list(_fetch(source, None if parts is None else frozenset(parts), variant, pipelines))


@cache  # one request and one download, even if a source is given for two purposes
def _fetch(
    source: str, parts: frozenset[str] | None, variant: str | None, pipelines: bool
) -> tuple[Path, ...]:
    api = connect()
    address = parse(source)
    address, commit, listing = _found(api, source, address)
    if not pipelines and is_pipeline(listing, address.path):
        raise pipeline_given(source)
    names, found = _needed(address, listing, parts, variant)
    with asking(source):
        folder = _download(api, address.repository, commit, names)
    return tuple(folder / path for path in found)


@cache
def fetch_lora(source: str) -> Path:
    """Download the LoRA file at an hf:// address; returns its path in the cache.

    An address of a repository or folder stands for the LoRA file in it. Raises Error with a message for the
    user.
    """
    api = connect()
    address, commit, listing = _found(api, source, parse(source))
    name = lora_file(listing, address)
    with asking(source):
        return _download(api, address.repository, commit, [name]) / name


def _found(api: HfApi, source: str, address: Address) -> tuple[Address, str, Listing]:
    """The address, its commit and its listing. A branch may have slashes: user/repo@feature/x."""
    first: NoRevision | None = None
    for reading in readings(address):
        try:
            with asking(source):
                return reading, *_listing(api, reading)
        except NoRevision as error:
            first = first or error
    assert first is not None  # there is at least one reading
    raise first


def _needed(
    address: Address, listing: Listing, parts: frozenset[str] | None, variant: str | None
) -> tuple[list[str], list[str]]:
    """The files to download, and the paths in the repository that are sources."""
    found = candidates(listing, address.repository, address.path)
    if not (found or not address.path or any(f"{name}/".startswith(f"{address.path}/") for name in listing)):
        raise NotThere(f"{address}: there is no such file or folder in the repository.\nCheck the path.")
    if is_pipeline(listing, address.path):
        return pipeline_files(listing, address.path, parts, variant, address), [address.path]
    if parts is not None and not parts:
        either = (address.path, f"{address.path}/tokenizer".lstrip("/"))
        inside = [name for folder in either for name in tokenizer_files(listing, folder)]
        return ([address.path] if address.path in listing else inside), [address.path]
    if not found:
        raise Error(f"{address}: no checkpoint that is read here.\nGive the path of one in the repository.")
    picked = chosen(found, parts, address)
    folders = {"", *(c.path.rpartition("/")[0] for c in picked)}
    small = [name for folder in folders for name in small_files(listing, folder)]
    return [*(name for c in picked for name in c.files), *small], [c.path for c in picked]


def default_base(source: str, missing: Sequence[str], variant: str | None) -> Path:
    """Download the `missing` parts of the default base `source`; returns the folder in the cache.

    Raises Error if the base cannot be downloaded; the message lists the alternatives.
    """
    try:
        return fetch(source, missing, variant)[0]
    except (Unreachable, NotThere, MissingExtra) as error:
        options = " ".join(f"--{part.replace('_', '-')} SRC" for part in missing)
        raise Error(
            f"A pipeline still needs: {', '.join(label(part) for part in missing)}; no way to the default "
            f"base, {str(error).splitlines()[0].rstrip('.')}.\n"
            f"Give --base PIPELINE (a folder here), or {options}, or run this once online (then the cache "
            "serves); --base none writes only the rest."
        ) from None


def sibling(source: str, *, certain: bool = False) -> str | None:
    """The address of the repository whose name is that of `source` with a text encoder suffix, if it exists.

    None if there is none or if `source` has a path or such a suffix itself. If the Hub does not answer, the
    cache decides; with `certain` a repository that the cache lacks then raises Unreachable.
    """
    address = parse(source)
    if address.path or any(address.repository.endswith(end) for end in SIBLINGS):
        return None
    api = connect()
    for name in (address.repository + end for end in SIBLINGS):
        try:
            with asking(source):
                exists = api.repo_exists(name)
        except Unreachable:
            exists = _in_cache(name)
            if certain and not exists:
                raise
        if exists:
            return str(Address(name))
    return None


def _in_cache(repository: str) -> bool:
    from huggingface_hub import resolve_revision
    from huggingface_hub.errors import RevisionResolutionError

    try:
        return bool(resolve_revision(repository, local_files_only=True))
    except RevisionResolutionError:
        return False


def look(repository: str) -> tuple[str, Listing]:
    """The commit of a repository's default branch, and its files with sizes. Nothing is downloaded."""
    with asking(repository):
        return _listing(connect(), Address(repository))


def _listing(api: HfApi, address: Address) -> tuple[str, dict[str, int]]:
    """The commit and its files with sizes. A commit never changes, so a cached listing is used if present."""
    import httpx2
    from huggingface_hub import get_cached_repo_tree
    from huggingface_hub.errors import CachedRepoTreeNotFoundError, OfflineModeIsEnabled
    from huggingface_hub.hf_api import RepoFile

    folder = _cache_of(address.repository)
    commit = api.resolve_revision(address.repository, revision=address.revision, cache_dir=folder).resolved
    try:
        entries = get_cached_repo_tree(address.repository, revision=commit, cache_dir=folder)
    except CachedRepoTreeNotFoundError:
        try:
            tree = api.list_repo_tree(address.repository, revision=commit, recursive=True)
            entries = [entry for entry in tree if isinstance(entry, RepoFile)]
        except (OfflineModeIsEnabled, httpx2.TransportError):  # an older huggingface_hub cached no listing
            return commit, _cached_files(address.repository, commit)
    if bad := next((entry.path for entry in entries if unsafe(entry.path)), None):
        raise Error(
            f"{address}: the Hub lists a file outside of the repository: {plain(bad)}.\nDo not use it."
        )
    return commit, {entry.path: entry.size for entry in entries}


def _cached_files(repository: str, commit: str) -> dict[str, int]:
    from huggingface_hub import snapshot_download

    folder = Path(
        snapshot_download(repository, revision=commit, cache_dir=_cache_of(repository), local_files_only=True)
    )
    files = [path for path in folder.rglob("*") if path.is_file()]
    return {path.relative_to(folder).as_posix(): path.stat().st_size for path in files}


def _download(api: HfApi, repository: str, commit: str, names: Collection[str]) -> Path:
    from huggingface_hub import snapshot_download

    # Escape wildcards, so that each pattern matches only its own name: file names may contain them.
    patterns = [re.sub(r"([*?[])", r"[\1]", name) for name in names]
    folder = _cache_of(repository)
    return Path(
        snapshot_download(
            repository, revision=commit, cache_dir=folder, allow_patterns=patterns, token=api.token
        )
    )
