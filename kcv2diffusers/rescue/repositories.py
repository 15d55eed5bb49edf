"""Which repositories to rescue: those of an author, an organisation, a collection, or a file of ids."""

from __future__ import annotations

import re
from collections import Counter
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import TypeVar

from kcv2diffusers.errors import Error, plain, reading
from kcv2diffusers.hub.address import SCHEME, website
from kcv2diffusers.hub.client import asking, connect, token_of
from kcv2diffusers.hub.download import SIBLINGS
from kcv2diffusers.rescue.patience import patiently

_ID = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_][A-Za-z0-9_.-]*")
_LENGTH = 96  # of an id, at most
_USER = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*")
_COLLECTION = re.compile(
    r"(?:(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/collections/)?([\w.-]+/[\w.-]+-[0-9a-f]{24})/?"
)
_PAGE = re.compile(r"(?:https?://)?(?:www\.)?(?:huggingface\.co|hf\.co)/([\w.-]+)/?")
_MOST = 1 << 20  # characters of a file of ids

T = TypeVar("T")


def is_id(text: str) -> bool:
    """Whether a text is an id, user/name, as the Hub allows it. Such an id is safe in paths and in markup."""
    tail = text[-1:] in (".", "-") or text.endswith(".git")
    return bool(_ID.fullmatch(text)) and len(text) <= _LENGTH and not tail and not re.search(r"--|\.\.", text)


def named(what: str) -> list[str]:
    """The ids of the models of an author, an organisation or a collection, sorted, each once.

    `what` is a name, the slug of a collection, or the address of the page of either. Ids may be invalid: the
    caller checks them. Waits while the Hub refuses for its rate limit. Raises Error if there are none.
    """
    if match := _COLLECTION.fullmatch(what):
        found = _asked(what, lambda: _of_collection(match[1]))
    else:
        page = _PAGE.fullmatch(what)
        name = page[1] if page else what
        if not _USER.fullmatch(name):
            raise Error(
                f"{plain(what)}: not an organisation, a user or a collection of the Hub.\n"
                "Give its name or the address of its page, or --list FILE for single repositories."
            )
        found = _asked(what, lambda: _of_author(name))
    if not found:
        raise Error(f"{plain(what)}: has no models that can be seen.\nCheck the name, or log in.")
    return sorted(set(found))


def _asked(what: str, ask: Callable[[], T]) -> T:
    api = connect()

    def once() -> T:
        with asking(what, token_of(api)):
            return ask()

    return patiently(once)


def _of_author(name: str) -> list[str]:
    return [model.id for model in connect().list_models(author=name)]


def _of_collection(slug: str) -> list[str]:
    return [item.item_id for item in connect().get_collection(slug).items if item.item_type == "model"]


def in_file(path: Path) -> list[str]:
    """The ids in a text file, sorted, each once: user/name, hf://user/name or the address of a page a line.

    Empty lines and lines that begin with # are left out. Raises Error for any other line.
    """
    with reading(path), path.open(encoding="utf-8-sig", errors="replace") as file:
        text = file.read(_MOST + 1)
    if len(text) > _MOST:
        raise Error(f"{path}: has more than {_MOST >> 20} MB.\nGive a text file with one id a line.")
    found = set()
    for number, line in enumerate(text.split("\n"), 1):
        words = line.strip()
        if not words or words.startswith("#"):
            continue
        page = website(words)
        name = page.repository if page else words.removeprefix(SCHEME).rstrip("/")
        if not is_id(name):
            raise Error(
                f"{plain(path)}, line {number}: {plain(words)[:100]} is not the id of a repository.\n"
                "Write user/name, one a line; # begins a comment."
            )
        found.add(name)
    if not found:
        raise Error(f"{plain(path)}: no repository is in it.\nWrite user/name, one a line.")
    return sorted(found)


def folder_name(repository: str) -> str:
    """The name of the folder of a repository's pipeline. Ids have no --, so that each has its own."""
    return repository.replace("/", "--")


def targets(repositories: Iterable[str], owner: str) -> dict[str, str]:
    """Map each repository to the one of `owner` that it is published as.

    That is its own name, or user-name where several have the same name. The Hub ignores the case of names.
    """
    valid = [each for each in repositories if is_id(each)]
    names = Counter(each.partition("/")[2].casefold() for each in valid)
    found = {}
    for each in valid:
        user, _, name = each.partition("/")
        found[each] = f"{owner}/{name if names[name.casefold()] == 1 else f'{user}-{name}'}"
    return found


def companion_of(repository: str, others: Sequence[str] | set[str]) -> str | None:
    """The repository of `others` that takes its text encoder from this one; None if there is none."""
    for end in SIBLINGS:
        if repository.endswith(end) and (main := repository.removesuffix(end)) in others:
            return main
    return None
