"""The run over all repositories: what has ended is left alone, the rest is done, one after the other."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import suppress
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any, NoReturn

from kcv2diffusers.errors import plain
from kcv2diffusers.hub.client import Refused, require_hub
from kcv2diffusers.rescue import repositories
from kcv2diffusers.rescue.child import in_child
from kcv2diffusers.rescue.manifest import Manifest
from kcv2diffusers.rescue.one import (
    ENDS,
    FAILED,
    FORBIDDEN,
    POSTPONED,
    PUBLISHED,
    SKIPPED,
    STAGING,
    Order,
    Result,
    rescue_one,
)
from kcv2diffusers.rescue.table import write_tables
from kcv2diffusers.system.children import locked
from kcv2diffusers.system.interruption import keeps
from kcv2diffusers.system.output import check_folder
from kcv2diffusers.system.staging import sweep

MANIFEST = "rescue.jsonl"
_LOCK = ".rescue.lock"
_REFUSALS = 3  # for want of rights, one after the other, after which the run stops
_ROUNDS = 3  # how often a repository is begun that the Hub broke off
_BETWEEN = 60.0  # seconds between rounds
_LOCK_SECONDS = 10.0  # for the processes of a run that was killed to end

Engine = Callable[[Iterable[Order]], Iterator[Result]]
"""Carries out orders, and yields the results in any order. An order is taken when its work begins."""
Tell = Callable[[int, int, Result], None]
"""Called with the number of repositories done, their total, and the last result."""


@dataclass(frozen=True, kw_only=True)
class Options:
    """The options of a run. `target` is an owner on the Hub, `folder` a folder here: one of them is given.

    `work` is the folder of the journal and of what is in progress. `minutes` is the time that a repository
    may take.
    """

    work: Path
    target: str | None = None
    folder: Path | None = None
    base: Sequence[str] = ()
    dtype: str | None = None
    license: str | None = None
    private: bool = False
    minutes: float = 120.0

    def shared(self, what: str) -> dict[str, Any]:
        """What must be the same when a run is gone on with."""
        return {
            "repositories": what,
            "to": self.target or str(self.folder),
            "base": list(self.base),
            "dtype": self.dtype,
        }


@dataclass(frozen=True)
class Outcome:
    """The results of a run in the order of the repositories, and the tables that were written."""

    results: list[Result]
    tables: list[Path]

    @property
    def complete(self) -> bool:
        """Whether every repository has ended."""
        return all(result.outcome in ENDS for result in self.results)

    def to_dict(self) -> dict[str, Any]:
        """The fields for JSON."""
        return {
            "complete": self.complete,
            "results": [asdict(result) for result in self.results],
            "tables": list(map(str, self.tables)),
        }


def silent(done: int, total: int, result: Result) -> None:
    """Report nothing."""


def rescue(
    what: str,
    find: Callable[[], Sequence[str]],
    options: Options,
    *,
    engine: Engine | None = None,
    retry: bool = False,
    tell: Tell = silent,
) -> Outcome:
    """Rescue the repositories that `find` returns, or go on with that where it was interrupted.

    `what` says in words which they are. `engine` carries out the orders (default: each in a process of its
    own, one after the other). With `retry` the repositories are listed again, and those that failed or were
    skipped are tried again. Raises Error if nothing can be done, for example without the right to publish.
    """
    require_hub()
    place = options.folder or options.work
    for folder in {options.work, place}:
        check_folder(folder)
    fresh = retry or not (options.work / MANIFEST).exists()
    found = find() if fresh else []  # before anything is written
    options.work.mkdir(parents=True, exist_ok=True)
    taken = f"{options.work}: another rescue works there.\nWait for its end, or give another --work."
    with locked(options.work / _LOCK, _LOCK_SECONDS, taken) as lock:
        sweep(place / STAGING)  # what a run left that was killed
        manifest = Manifest(options.work / MANIFEST, options.shared(what))
        keeps("the same command goes on")
        try:
            if manifest.listed is None or retry:
                manifest.note_listing(sorted({*(manifest.listed or ()), *(found or find())}))
            if retry:
                for result in [*manifest.ended.values()]:
                    if result.outcome in (FAILED, SKIPPED):
                        manifest.again(result.repository)
            later = _work(manifest, options, engine or _one_by_one(options, lock), tell)
        finally:
            sweep(place / STAGING)
            with suppress(OSError):  # it is not empty, or was never made
                (place / STAGING).rmdir()
            manifest.close()
        ended = [manifest.ended.get(each) or later[each] for each in manifest.listed or ()]
        tables = write_tables(options.work, ended, f"Rescue of {what}")
    return Outcome(ended, tables)


def plan(find: Callable[[], Sequence[str]], options: Options, tell: Tell = silent) -> list[Result]:
    """What `rescue` would do, by the listings of the repositories. Nothing is downloaded or written."""
    require_hub()
    listed = sorted(set(find()))
    results = []
    for order, ended in _orders(listed, options):
        results.append(ended or rescue_one(Order(**{**asdict(order), "dry": True})))
        tell(len(results), len(listed), results[-1])
    return results


def _orders(listed: Sequence[str], options: Options) -> Iterator[tuple[Order, Result | None]]:
    """An order for each repository, or its result where its name says that nothing is to be done."""
    targets = repositories.targets(listed, options.target or "")
    taken = [name.casefold() for name in targets.values()]
    everything = set(listed)
    for each in listed:
        place = options.folder or options.work
        order = Order(
            repository=each,
            work=str(place.absolute()),
            folder=str(options.folder.absolute()) if options.folder else None,
            target=targets.get(each) if options.target else None,
            base=[_absolute(base) for base in options.base],
            dtype=options.dtype,
            license=options.license,
            private=options.private,
        )
        reason = ""
        if not repositories.is_id(each):
            reason = "not a name that the Hub allows"
        elif main := repositories.companion_of(each, everything):
            reason = f"the text encoder of {main}, which takes it"
        elif options.target and each == order.target:
            reason = "is where it would be published"
        elif options.target and taken.count((order.target or "").casefold()) > 1:
            reason = f"another repository would be published as {order.target} too"
        yield order, Result(repository=each, outcome=SKIPPED, reason=reason) if reason else None


def _absolute(base: str) -> str:
    """A base that is a path here as one from everywhere: the process of a repository may run elsewhere."""
    return base if base == "tiny" or not Path(base).exists() else str(Path(base).absolute())


def _work(manifest: Manifest, options: Options, engine: Engine, tell: Tell) -> dict[str, Result]:
    """Do what has not ended. Returns the last results of those that have not ended then."""
    listed, waiting = manifest.listed or [], list[Order]()
    for order, ended in _orders(listed, options):
        if order.repository not in manifest.ended:
            if ended:
                manifest.note(ended)
            else:
                waiting.append(order)
    later: dict[str, Result] = {}
    refused, published = 0, False
    for number in range(_ROUNDS):
        if number and waiting:
            time.sleep(_BETWEEN)
        for result in engine(_started(waiting, manifest)):
            later.pop(result.repository, None)
            manifest.note(result)
            if result.outcome not in ENDS:
                later[result.repository] = result
            tell(len(manifest.ended), len(listed), result)
            published |= result.outcome == PUBLISHED
            refused = refused + 1 if result.outcome == FORBIDDEN else 0
            if refused == _REFUSALS:
                _stop(result)
        waiting = [o for o in waiting if o.repository in later and later[o.repository].outcome == POSTPONED]
        if not waiting:
            break
    for result in [*later.values()]:
        if result.outcome == FORBIDDEN:
            if not published:
                _stop(result)
            manifest.note(replace(later.pop(result.repository), outcome=FAILED))  # it is about this one
    return later


def _stop(result: Result) -> NoReturn:
    raise Refused(f"{plain(result.reason)}\nThe run stops here; the same command goes on.")


def _started(orders: Iterable[Order], manifest: Manifest) -> Iterator[Order]:
    for order in orders:
        manifest.start(order.repository)
        yield order


def _one_by_one(options: Options, lock: int | None) -> Engine:
    return lambda orders: (in_child(order, 60 * options.minutes, lock) for order in orders)


def in_this_process(orders: Iterable[Order]) -> Iterator[Result]:
    """An engine without processes of their own: faster, but a crash ends the run."""
    return map(rescue_one, orders)
