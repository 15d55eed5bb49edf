"""What visitors give, checked before it becomes an argument or a file name.

No field is a path. A source is an address on the Hub or `tiny`, and becomes `hf://` or `tiny://`, so that a
file of that name on the server is never read.
"""

from __future__ import annotations

import math
import re
import unicodedata
from collections.abc import Collection

from kcv2diffusers.errors import Error, is_unicode, plain
from kcv2diffusers.hub.address import SCHEME, website
from kcv2diffusers.sources.locate import TINY

_ID = re.compile(r"[A-Za-z0-9][\w.-]{0,95}/[A-Za-z0-9][\w.-]{0,95}", re.ASCII)
_NAME = re.compile(r"[^/\\@:~]{1,200}")  # a file or folder in a repository
_REVISION = re.compile(r"[\w.+/-]{1,200}", re.ASCII)
_UNUSUAL = re.compile(r"[^\w.()+ -]")
_LONGEST = 120  # characters of a file name
_MOST_TEXT = 1000  # characters of a prompt


def source(text: str, label: str = "Model") -> str:
    """The address of a source for a command: `tiny://` or `hf://user/repo[/path][@revision]`.

    Raises Error for anything else: a path, a web address, an empty field.
    """
    text = text.strip()
    if text.lower() in ("tiny", TINY):
        return TINY
    address = str(website(text) or text).removeprefix(SCHEME)
    place, at, revision = address.partition("@")
    user, _, rest = place.partition("/")
    name, _, path = rest.partition("/")
    names = path.split("/") if path else []
    if (
        not address.isprintable()
        or not _ID.fullmatch(f"{user}/{name}")
        or not all(_NAME.fullmatch(each) and each.strip(".") for each in names)
        or (at and (not _REVISION.fullmatch(revision) or ".." in revision))
    ):
        raise Error(f"{label} {_shown(text)!r}: give an id on the Hub (user/name), or tiny.")
    return f"{SCHEME}{address}"


def sources(text: str, label: str = "Model") -> list[str]:
    """The addresses in a field, which spaces or commas separate; [] for an empty field."""
    return [source(each, label) for each in re.split(r"[\s,]+", text.strip()) if each]


def repository(text: str) -> str:
    """The name of a repository to publish as: user/name, or a name. Raises Error for any other text."""
    from kcv2diffusers.publish.names import check_names

    text = text.strip()
    if not text or text.startswith("-") or not text.isprintable():
        raise Error("Repository: give USER/NAME, or a name of your own account.")
    check_names(text)
    return text


def prompt(text: str, label: str) -> str:
    """A prompt in one line, "" for an empty field. Raises Error for one that is too long, or not text."""
    text = " ".join(text.split())
    if len(text) > _MOST_TEXT:
        raise Error(f"{label}: give at most {_MOST_TEXT} characters.")
    if not is_unicode(text) or not text.isprintable():
        raise Error(f"{label}: holds characters that cannot be printed.")
    return text


def number(value: float | None, label: str, least: float, most: float) -> float:
    """A number from `least` to `most`. Raises Error for any other, and for an empty field."""
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
        raise Error(f"{label}: give a number.")
    if not least <= value <= most:
        raise Error(f"{label}: give a number from {least:g} to {most:g}.")
    return value


def whole(value: float | None, label: str, least: int, most: int) -> int:
    """A whole number from `least` to `most`. Raises Error for any other, and for an empty field."""
    found = number(value, label, least, most)
    if found != int(found):
        raise Error(f"{label}: give a whole number.")
    return int(found)


def file_name(given: str, taken: Collection[str] = ()) -> str:
    """A harmless name for an uploaded file, which keeps its ending and differs from those in `taken`."""
    name = unicodedata.normalize("NFC", re.split(r"[/\\]", given)[-1])
    name = _UNUSUAL.sub("_", name if is_unicode(name) else "").strip(" .-") or "file"
    name = name[-_LONGEST:].lstrip(" .-")
    found, number = name, 1
    while found.lower() in {each.lower() for each in taken}:
        number += 1
        stem, dot, ending = name.partition(".")
        found = f"{stem} ({number}){dot}{ending}"
    return found


def _shown(text: str) -> str:
    return plain(text)[:60]
