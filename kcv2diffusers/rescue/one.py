"""One repository, from its listing to a published or stored pipeline.

    python -m kcv2diffusers.rescue.one

is the child process in which that happens: an order as a line of JSON on its standard input, a result on its
standard output. It ends when its standard input closes, so that it does not outlive its parent.
"""

from __future__ import annotations

import errno
import json
import os
import re
import shutil
import sys
import tempfile
import time
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import TYPE_CHECKING

from kcv2diffusers.errors import Error, TargetError, one_line, plain
from kcv2diffusers.hub.address import Address
from kcv2diffusers.hub.client import BadToken, Refused, Unreachable, redact
from kcv2diffusers.hub.download import SIBLINGS, cache_of_its_own, look, sibling
from kcv2diffusers.rescue.decide import Decision, decide
from kcv2diffusers.rescue.keep import (
    Kept,
    Source,
    in_folder,
    in_repository,
    look_at_license,
    no_license,
    put,
)
from kcv2diffusers.rescue.patience import patiently
from kcv2diffusers.system.children import end_with_parent, read_order
from kcv2diffusers.system.output import check_folder
from kcv2diffusers.system.staging import staging

if TYPE_CHECKING:
    from kcv2diffusers.verification.result import Verified

PUBLISHED, STORED, SKIPPED, FAILED = "published", "stored", "skipped", "failed"
POSTPONED, FORBIDDEN, PLANNED = "postponed", "forbidden", "planned"
ENDS = (PUBLISHED, STORED, SKIPPED, FAILED)
"""The outcomes that end a repository. `POSTPONED` means later; after a few `FORBIDDEN` the run ends."""

STAGING = ".rescue-now"
_DISK = (errno.ENOSPC, errno.EDQUOT, errno.EROFS, errno.EIO)  # no repository is to blame for these
_SAID, _NAME = 400, 60  # characters of a reason, and of a file's name in one
_SNAPSHOT = re.compile(r"\S*/models--([\w.-]+?)--([\w.-]+)/snapshots/[0-9a-f]{40}(/?)")


class _MayNotPublish(Error):
    """The token has no right to publish there."""


@dataclass(frozen=True, kw_only=True)
class Order:
    """What to do with one repository.

    The result goes to `folder`, or is published as `target`. `work` is the folder for what is in progress
    (None: the system's one for temporary files). A `dry` order only looks.
    """

    repository: str
    work: str | None
    folder: str | None = None
    target: str | None = None
    base: list[str] = field(default_factory=list)
    dtype: str | None = None
    license: str | None = None
    private: bool = False
    dry: bool = False


@dataclass(frozen=True, kw_only=True)
class Result:
    """How a repository ended. Sizes are in bytes.

    `where` is the folder or the address of the pipeline, `commit` that of the source, `license` that of the
    pipeline. `read` and `written` are the sizes of what was downloaded, and of the weights that were written.
    """

    repository: str
    outcome: str
    reason: str = ""
    where: str = ""
    commit: str = ""
    license: str = ""
    parts: dict[str, str] = field(default_factory=dict)
    read: int = 0
    written: int = 0
    seconds: float = 0.0


def rescue_one(order: Order) -> Result:
    """Carry out an order in this process. Whatever happens to it is a result, not an exception."""
    started = time.monotonic()
    folder: Path | None = None
    try:
        if order.dry:
            result = _look(order)
        else:
            parent = Path(order.work or tempfile.gettempdir()) / STAGING
            with staging(parent, order.repository.replace("/", "--")) as folder:
                result = _rescue(order, folder)
    except (BadToken, _MayNotPublish) as error:
        result = _ended(order, FORBIDDEN, error, folder)
    except (Unreachable, TargetError) as error:
        result = _ended(order, POSTPONED, error, folder)
    except Error as error:
        result = _ended(order, FAILED, error, folder)
    except OSError as error:
        file = Path(str(error.filename or "a file")).name[:_NAME]
        words = Error(f"{file}: {error.strerror or error}")
        result = _ended(order, POSTPONED if error.errno in _DISK else FAILED, words, folder)
    except (Exception, MemoryError) as error:
        result = _ended(
            order, FAILED, Error(f"a mistake in kcv2diffusers: {type(error).__name__}: {error}"), folder
        )
    return replace(result, seconds=round(time.monotonic() - started, 2))


def _look(order: Order) -> Result:
    """The plan for a repository."""
    commit, listing = patiently(lambda: look(order.repository))
    decision = decide(order.repository, listing)
    outcome = SKIPPED if decision.reason else PLANNED
    return Result(
        repository=order.repository,
        outcome=outcome,
        reason=decision.reason,
        where="" if decision.reason else _name(order.target or _folder(order)),
        commit=commit,
        read=decision.bytes,
    )


def _folder(order: Order) -> Path:
    return Path(order.folder or "") / order.repository.replace("/", "--")


def _rescue(order: Order, temporary: Path) -> Result:
    cache, place = temporary / "cache", order.target or _folder(order)
    names = {order.repository, *(order.repository + end for end in SIBLINGS)}
    with cache_of_its_own(cache, names):
        commit, listing = patiently(lambda: look(order.repository))
        decision = decide(order.repository, listing)
        result = Result(repository=order.repository, outcome=SKIPPED, reason=decision.reason, commit=commit)
        if decision.reason:
            return result
        source = patiently(lambda: look_at_license(order.repository, commit, listing, cache))
        if order.target and (reason := no_license(source, order.license)):
            return replace(result, reason=reason)
        kept = patiently(lambda: _there(place, source, cache))
        if kept is None:
            _check_space(temporary, 2 * decision.bytes)
            out = temporary / "pipeline"
            verified = patiently(lambda: _converted(order, source, decision, out))
            try:
                kept = patiently(
                    lambda: put(out, source, place, verified, license=order.license, private=order.private)
                )
            except Refused as error:
                raise _MayNotPublish(str(error)) from None
    if kept.reason:
        return replace(result, reason=f"{_name(place)} {kept.reason}")
    return replace(
        result,
        outcome=PUBLISHED if order.target else STORED,
        where=_name(place),
        license=kept.license,
        parts=dict(kept.parts),
        read=decision.bytes,
        written=kept.written,
    )


def _check_space(folder: Path, needed: int) -> None:
    """Raise TargetError if there is too little space now, and another Error if there never is enough."""
    if needed > (size := shutil.disk_usage(folder).total):
        raise Error(f"{needed / 1e9:.0f} GB are needed, and the disk has {size / 1e9:.0f} GB.")
    check_folder(folder, needed)


def _name(place: str | Path) -> str:
    return place if isinstance(place, str) else place.name


def _there(place: str | Path, source: Source, cache: Path) -> Kept | None:
    return in_repository(place, source, cache) if isinstance(place, str) else in_folder(place, source)


def _converted(order: Order, source: Source, decision: Decision, out: Path) -> Verified:
    """Download, convert and verify. It may be done again after the Hub broke it off."""
    from kcv2diffusers.conversion.to_diffusers import convert
    from kcv2diffusers.verification.run import verify

    address = str(Address(order.repository, decision.path, source.commit))
    shutil.rmtree(out, ignore_errors=True)
    asked = not decision.text_encoder and not decision.path
    beside = asked and sibling(address, certain=True) is not None  # else the base's would take its place
    converted = convert(address, out=out, base=order.base or None, dtype=order.dtype, with_sibling=beside)
    named = {part: str(path) for part, path in converted.sources.items()}
    verified = verify(
        out,
        base=[str(converted.base)] if converted.base else [],
        level="weights",
        **named,  # type: ignore[arg-type]
    )
    if not verified.passed:
        raise Error(verified.reason)
    return verified


def _ended(order: Order, outcome: str, error: Exception, temporary: Path | None) -> Result:
    """The result of an order that raised `error`; its reason has no path of a temporary folder."""
    words = one_line(error)
    if temporary is not None:
        words = _SNAPSHOT.sub(lambda found: "" if found[3] else f"{found[1]}/{found[2]}", words)
        words = words.replace(f"{temporary}{os.sep}", "").replace(str(temporary), "the result")
    words = re.sub(rf"^(hf://)?{re.escape(order.repository)}(@[0-9a-f]{{40}})?: ", "", words)
    return Result(repository=order.repository, outcome=outcome, reason=plain(redact(words))[:_SAID])


def main() -> None:
    """Read an order, carry it out, write the result."""
    results = os.dup(1)
    os.dup2(2, 1)  # what a library prints is no result
    line = read_order()
    if not line:
        return
    end_with_parent()
    result = rescue_one(Order(**json.loads(line)))
    with os.fdopen(results, "w", encoding="utf-8") as file:
        file.write(json.dumps(asdict(result)))


if __name__ == "__main__":
    main()
    sys.stdout.flush()
