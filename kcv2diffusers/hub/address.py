"""Addresses of sources on the Hub, `hf://user/repo[/path][@revision]`, and their paths in the Hub's cache."""

from __future__ import annotations

import re
from collections.abc import Iterable
from dataclasses import dataclass, replace
from pathlib import Path

from kcv2diffusers.errors import Error, plain

SCHEME = "hf://"
_WEBSITE = re.compile(
    r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+/[\w.-]+)"
    r"(?:/(?:tree|blob|resolve|raw)/([^/?#]+)(?:/([^?#]*?))?)?/?(?:[?#].*)?"
)
_FORM = "Write hf://user/repo, hf://user/repo/path/in/repo.h5, and @revision behind either."


@dataclass(frozen=True)
class Address:
    """A model repository, a path in it ("" for all of it), a branch, tag or commit (None: the default)."""

    repository: str
    path: str = ""
    revision: str | None = None

    def __str__(self) -> str:
        path, end = (f"/{self.path}" if self.path else ""), (f"@{self.revision}" if self.revision else "")
        return f"{SCHEME}{self.repository}{path}{end}"

    def at(self, path: str) -> Address:
        """The address of another path in the same repository and revision."""
        return replace(self, path=path)


def website(source: str) -> Address | None:
    """The address that a URL of the Hub's website refers to; None for any other text."""
    if not (match := _WEBSITE.fullmatch(source)):
        return None
    repository, revision, path = match.groups()
    return Address(repository, path or "", None if revision in (None, "main") else revision)


def parse(source: str) -> Address:
    """Parse the hf:// address `source`. Raises Error unless it is one of a model repository."""
    from huggingface_hub import parse_hf_uri
    from huggingface_hub.errors import HfUriError

    user, _, rest = source.removeprefix(SCHEME).partition("/")
    name, _, path = rest.partition("/")
    if "@" not in name and "@" in path:  # huggingface_hub reads the revision only after the name
        path, _, revision = path.rpartition("@")
        source = f"{SCHEME}{user}/{name}@{revision.replace('/', '%2F')}/{path}"
    try:
        uri = parse_hf_uri(source.rstrip("/"))
    except HfUriError as error:
        raise Error(f"{source}: not an address on the Hub ({error.msg}).\n{_FORM}") from None
    if uri.type != "model":
        raise Error(f"{source}: a {uri.type}, not a model repository.\n{_FORM}")
    return Address(uri.id, uri.path_in_repo, uri.revision)


def readings(address: Address) -> list[Address]:
    """All readings of an address: in user/repo@feature/x the branch may be "feature" or "feature/x"."""
    names = address.path.split("/") if address.revision and address.path else []
    longer = [
        replace(address, path="/".join(names[at:]), revision="/".join([str(address.revision), *names[:at]]))
        for at in range(1, len(names) + 1)
    ]
    return [address, *longer]


def cached(path: Path) -> tuple[Address, Path] | None:
    """The address of a file or folder in the Hub's cache, with its commit, and the folder of its snapshot.

    None for a path outside the cache.
    """
    parts = path.parts
    for index, part in enumerate(parts[:-2]):
        if part.startswith("models--") and parts[index + 1] == "snapshots":
            repository = part.removeprefix("models--").replace("--", "/", 1)
            rest = "/".join(parts[index + 3 :])
            return Address(repository, rest, parts[index + 2]), Path(*parts[: index + 3])
    return None


def shown(path: Path) -> str:
    """The name of a source in messages; for one in the Hub's cache its address with a 7-digit commit."""
    if found := cached(path):
        return plain(replace(found[0], revision=(found[0].revision or "")[:7]))
    return plain(path)


def snapshots(paths: Iterable[Path]) -> list[Path]:
    """The snapshot folders of those `paths` that are in the Hub's cache; a tokenizer may be there."""
    return list(dict.fromkeys(found[1] for path in paths if (found := cached(path))))
