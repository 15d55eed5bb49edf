"""Where a rescued pipeline stays: a repository of the Hub, or a folder. Each is made once and never replaced.

The record in a pipeline (conversion.json) names the repository and the commit that it was made of. By that a
later run knows what an interrupted one had finished, and what somebody else made.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Any

from kcv2diffusers.errors import SourceError, plain
from kcv2diffusers.hub.address import parse
from kcv2diffusers.hub.client import NotThere, asking, connect, token_of
from kcv2diffusers.hub.listing import Listing
from kcv2diffusers.json_text import write_json
from kcv2diffusers.pipeline import record
from kcv2diffusers.pipeline_files import CARD, CONVERSION_FILE, VERIFICATION_FILE
from kcv2diffusers.publish.card import model_card
from kcv2diffusers.publish.card_facts import gather
from kcv2diffusers.publish.check import check
from kcv2diffusers.publish.push import push
from kcv2diffusers.verification.result import Verified

_TAKEN = "exists already, and was not made of this commit"
_UNLICENSED = "its card states no license (--license ID)"
_ENTRY = "rescued"  # in conversion.json
_LARGEST = 4 << 20  # bytes of a conversion.json


@dataclass(frozen=True)
class Source:
    """A repository and its commit. `license` is what its card states, "" if it states none."""

    repository: str
    commit: str
    license: str = ""


@dataclass(frozen=True)
class Kept:
    """A pipeline that is in its place; `reason` says why it is not, "" if it is.

    `parts` say where each part came from. `written` is the size of the weights in bytes.
    """

    license: str = ""
    parts: Mapping[str, str] = field(default_factory=dict)
    written: int = 0
    reason: str = ""


def look_at_license(repository: str, commit: str, listing: Listing, cache: Path) -> Source:
    """The repository with the license of its card; only the card is downloaded."""
    if CARD not in listing:
        return Source(repository, commit)
    card = _downloaded(repository, commit, CARD, cache)
    return Source(repository, commit, record.license_of(card.parent).get("license", ""))


def no_license(source: Source, given: str | None) -> str:
    """Why a repository may not be published, "" if it may: nobody but its author can license it."""
    return "" if source.license or given else _UNLICENSED


def in_repository(target: str, source: Source, cache: Path) -> Kept | None:
    """What there is at a repository of the Hub; None if it does not exist or is empty."""
    api = connect()
    try:
        with asking(target, token_of(api)):
            from huggingface_hub.hf_api import RepoFile

            tree = api.list_repo_tree(target, recursive=True)
            sizes = {entry.path: entry.size for entry in tree if isinstance(entry, RepoFile)}
    except NotThere:
        return None
    if not sizes.keys() - {".gitattributes"}:  # a run was interrupted between its making and its filling
        return None
    if not 0 < sizes.get(CONVERSION_FILE, 0) <= _LARGEST:
        return Kept(reason=_TAKEN)
    return _kept(_downloaded(target, None, CONVERSION_FILE, cache).parent, source, sizes)


def in_folder(folder: Path, source: Source) -> Kept | None:
    """What there is at a folder; None if it does not exist."""
    if not (folder.exists() or folder.is_symlink()):
        return None
    if folder.is_symlink() or not folder.is_dir():
        return Kept(reason=_TAKEN)
    return _kept(folder, source, _sizes(folder))


def _sizes(folder: Path) -> dict[str, int]:
    return {str(path.relative_to(folder)): path.stat().st_size for path in folder.rglob("*.safetensors")}


def _downloaded(repository: str, commit: str | None, name: str, cache: Path) -> Path:
    api = connect()
    with asking(repository, token_of(api)):
        return Path(api.hf_hub_download(repository, name, revision=commit, cache_dir=cache))


def _kept(folder: Path, source: Source, sizes: Mapping[str, int]) -> Kept:
    """What the record in `folder` says, if it was made of `source`."""
    try:
        data = record.read(folder)
    except SourceError:
        data = {}
    made_of = data.get(_ENTRY, {})
    if (made_of.get("repository"), made_of.get("commit")) != (source.repository, source.commit):
        return Kept(reason=_TAKEN)
    written = sum(size for name, size in sizes.items() if name.endswith(".safetensors"))
    parts = {name: _origin(part, source) for name, part in data["parts"].items()}
    return Kept(plain(made_of.get("license", "")), parts, written)


def _origin(part: Mapping[str, Any], source: Source) -> str:
    """Where a part came from: its container if that is in the repository itself, else the place too."""
    place = str(part["from"])
    if place.startswith("hf://"):
        repository = parse(place).repository
        return plain(part["container"] if repository == source.repository else repository)
    return plain(place)


def put(
    out: Path, source: Source, place: str | Path, verified: Verified, *, license: str | None, private: bool
) -> Kept:
    """Publish the pipeline in `out` as the repository `place`, or move it to the folder `place`.

    `license` is for a source that states none, or another one than its base. Raises Error if a published
    pipeline would have no license.
    """
    write_json(out / VERIFICATION_FILE, verified.to_dict())  # for the card; not published
    data = record.read(out)
    stated = {origin["license"] for origin in data["origins"] if "license" in origin}
    agreed = bool(source.license) and len(stated) == 1
    chosen = None if agreed else license or None
    entry = asdict(source) | {"license": chosen or (source.license if agreed else "")}
    write_json(out / CONVERSION_FILE, data | {_ENTRY: entry})
    if isinstance(place, str):
        push(out, place, private=private, license=chosen, message=f"Rescued from {source.repository}")
        return _kept(out, source, _sizes(out))
    _finish(out, place.name, chosen or source.license or None)
    try:
        out.rename(place)  # it appears whole
    except OSError:
        if there := in_folder(place, source):  # of another attempt at the same, on another computer
            return there
        raise
    return _kept(place, source, _sizes(place))


def _finish(out: Path, name: str, license: str | None) -> None:
    """Write the card and the record of a pipeline that is stored as `name`."""
    facts = gather(check(out), license=license, unlicensed=True)
    write_json(out / CONVERSION_FILE, facts.conversion)
    (out / CARD).write_text(model_card(facts, name), encoding="utf-8")
    (out / VERIFICATION_FILE).unlink()  # it names files that will be gone
