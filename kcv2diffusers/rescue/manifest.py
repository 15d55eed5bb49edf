"""The journal of a run: one line of JSON for each change, each on the disk before the work goes on.

Only its end can be damaged, by a kill or a power failure in the middle of a line: such a rest is cut off, and
what it said is done again.
"""

from __future__ import annotations

import json
import os
from collections.abc import Iterable, Mapping
from contextlib import suppress
from dataclasses import asdict
from pathlib import Path
from typing import Any

from kcv2diffusers.errors import Error
from kcv2diffusers.rescue.one import ENDS, Result

_FORM = 1


class Manifest:
    """The journal at `path`, and what it says.

    `listed` are the repositories in order (None: not listed yet). `ended` are the results by repository.
    `settings` are those that a run must share with those before it. Raises Error for other settings, or for a
    file that is no journal.
    """

    def __init__(self, path: Path, settings: Mapping[str, Any]) -> None:
        self.path = path
        self.listed: list[str] | None = None
        self.ended: dict[str, Result] = {}
        path.parent.mkdir(parents=True, exist_ok=True)
        self._file = path.open("a+b")
        lines = self._whole_lines()
        if not lines:
            self._write({"rescue": _FORM, "settings": dict(settings)})
            return
        for number, line in enumerate(lines, 1):
            try:
                self._take(json.loads(line), settings, first=number == 1)
            except (ValueError, TypeError, KeyError, AttributeError):
                raise Error(
                    f"{path}: line {number} is not of a journal of rescue.\nGive another --work."
                ) from None

    def _whole_lines(self) -> list[bytes]:
        """The lines of the file; a last one that was not written to its end is cut off."""
        self._file.seek(0)
        data = self._file.read()
        whole = data.rfind(b"\n") + 1
        if whole < len(data):
            self._file.truncate(whole)
            os.fsync(self._file.fileno())
        return data[:whole].splitlines()

    def _take(self, line: dict[str, Any], settings: Mapping[str, Any], *, first: bool) -> None:
        if first:
            if line["rescue"] != _FORM:
                raise ValueError
            if changed := [n for n, v in settings.items() if line["settings"].get(n) != v]:
                raise Error(
                    f"{self.path}: is of a run with another {', '.join(changed)}.\n"
                    "Give the same again, or another --work."
                )
        elif "listed" in line:
            self.listed = list(map(str, line["listed"]))
        elif line["state"] == "ended":
            result = Result(**line["result"])
            self.ended[result.repository] = result
        elif line["state"] == "again":
            self.ended.pop(line["id"], None)

    def _write(self, line: Mapping[str, Any]) -> None:
        self._file.write(json.dumps(line).encode() + b"\n")
        self._file.flush()
        os.fsync(self._file.fileno())

    def note_listing(self, repositories: Iterable[str]) -> None:
        """Note the repositories of the run."""
        self.listed = [*repositories]
        self._write({"listed": self.listed})

    def start(self, repository: str) -> None:
        """Note that work on a repository begins."""
        self._write({"id": repository, "state": "started"})

    def note(self, result: Result) -> None:
        """Note a result, which may end the repository or not. A repository ends once."""
        assert result.repository not in self.ended
        if result.outcome in ENDS:
            self._write({"id": result.repository, "state": "ended", "result": asdict(result)})
            self.ended[result.repository] = result
        else:
            self._write({"id": result.repository, "state": result.outcome, "reason": result.reason})

    def again(self, repository: str) -> None:
        """Note that a repository that has ended is to be tried again."""
        self._write({"id": repository, "state": "again"})
        self.ended.pop(repository)

    def close(self) -> None:
        """Close the file."""
        with suppress(OSError):
            self._file.close()
