"""The folder of a server, and in it one folder for each visitor.

A visitor is known by the session that Gradio gives to an open page. Nothing leads from one visitor's folder
to another's. A folder is removed when its page closes, or when the page has long been silent. The folder of
a server that died is removed by the next one (`system.staging`).
"""

from __future__ import annotations

import os
import secrets
import shutil
import stat
import tempfile
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass, field
from pathlib import Path
from threading import Lock
from typing import Any

from kcv2diffusers.app.given import file_name
from kcv2diffusers.app.jobs import STOPPED, Job, environment
from kcv2diffusers.app.line import Line, Turn
from kcv2diffusers.errors import Error
from kcv2diffusers.system.staging import locked_staging, sweep

_MOST_FILES = 1000  # uploaded at a time
_SILENT = 3600  # seconds beyond the time limit after which a page counts as closed
_TIDY = 60  # seconds between looks for such pages


@dataclass(frozen=True)
class Settings:
    """What the server allows.

    `local` says that only this computer reaches it: then the computer's own login to the Hub may be used.
    `most_bytes` is the size of the largest file, `seconds` the time of a command.
    `trains` offers training.
    """

    local: bool = True
    most_bytes: int = 8 << 30
    seconds: float = 7200.0
    trains: bool = True


@dataclass
class Session:
    """A visitor's folder, and the command that runs for them.

    `turn` is the visitor's turn in the `line` while it is at work. `uploads` are the paths and inodes of
    what they took from Gradio's cache. `browser` is the secret of the visitor's browser, None where it keeps
    no cookies.
    """

    folder: Path
    handed: Path
    settings: Settings
    lock: int | None
    line: Line
    browser: str | None = None
    job: Job | None = None
    turn: Turn | None = None
    closed: bool = False
    used: float = field(default_factory=time.monotonic)
    kept: dict[str, Any] = field(default_factory=dict)
    uploads: set[tuple[Path, int]] = field(default_factory=set)
    _guard: Any = field(default_factory=Lock)

    def place(self, name: str) -> Path:
        """A new folder of that name; what an earlier command left there is removed."""
        folder = self.folder / name
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        return folder

    def take(self, files: Sequence[str] | None, folder: Path) -> list[str]:
        """Put uploaded files into `folder`, under harmless names, which are returned in their order.

        `files` are paths in Gradio's cache. Raises Error for too many or too large files.
        """
        given = [Path(path) for path in files or ()]
        if not all(path.exists() for path in given):
            raise Error("A file that was given is gone from the server. Give the files again.")
        if len(given) > _MOST_FILES:
            raise Error(f"At most {_MOST_FILES} files at a time.")
        if sum(path.stat().st_size for path in given) > 2 * self.settings.most_bytes:
            raise Error(f"The files are larger than {2 * self.settings.most_bytes / 2**30:g} GB together.")
        folder.mkdir(parents=True, exist_ok=True)
        names: list[str] = []
        for path in given:
            if not stat.S_ISREG(path.lstat().st_mode):
                raise Error("Only files can be given.")
            names.append(file_name(path.name, names))
            self.uploads.add((path, path.stat().st_ino))
            _link(path, folder / names[-1])
        return names

    def hand_out(self, path: Path, name: str | None = None) -> str:
        """A path for the browser: the file in a folder whose name cannot be guessed."""
        folder = self.handed / secrets.token_hex(16)
        folder.mkdir(parents=True)
        _link(path, folder / (name or path.name))
        return str(folder / (name or path.name))

    def run(
        self,
        words: Sequence[str],
        folder: Path,
        *,
        token: str | None = None,
        module: str = "kcv2diffusers",
    ) -> Job:
        """Start a command in `folder`.

        Raises Error while another one runs for this visitor, and after a Stop between two commands.
        """
        env = environment(local=self.settings.local, token=token, home=self.folder / "hub")
        with self._guard:
            if self.closed:
                raise Error("This page was closed. Load it again.")
            if self.turn is not None and self.turn.stopped:
                raise Error(STOPPED)
            if self.job is not None and self.job.code is None:
                raise Error("Something runs for you already. Wait for its end, or stop it.")
            self.job = Job(
                folder,
                words,
                env=env,
                seconds=self.settings.seconds,
                most_bytes=self.settings.most_bytes,
                lock=self.lock,
                module=module,
            )
            return self.job

    @contextmanager
    def working(self, turn: Turn) -> Iterator[None]:
        """The block is the work of `turn`."""
        self.turn = turn
        try:
            yield
        finally:
            self.turn = None

    def stop(self, tab: str | None = None) -> None:
        """Let the visitor's command save and end, and begin none that waits. Returns at once.

        With `tab`, only what was begun on that tab.
        """
        with self._guard:
            self.line.stop(self, tab)
            other = self.turn is not None and not self.turn.stopped
            if self.job is not None and self.job.code is None and not other:
                self.job.stop()

    def close(self) -> None:
        """End the visitor's command and remove all their files."""
        with self._guard:
            self.closed = True
        if self.job is not None:
            self.job.end()
        self.line.forget(self)
        for folder in (self.folder, self.handed):
            shutil.rmtree(folder, ignore_errors=True)


class Root:
    """The folder of a server, `folder`; `cache` in it is Gradio's own."""

    def __init__(self, folder: Path, settings: Settings, lock: int | None = None) -> None:
        self.folder, self.settings, self.lock = folder, settings, lock
        self.cache = folder / "gradio"
        self.cache.mkdir()
        self.line = Line()
        self.rates: dict[tuple[str, str], float] = {}  # steps in a second by base and preset
        self._sessions: dict[str, Session] = {}
        self._guard = Lock()
        self._looked = time.monotonic()

    def session(self, key: str | None, browser: str | None = None) -> Session:
        """The visitor of Gradio's session `key`, with the secret of their browser; new at the first call."""
        if not key:
            raise Error("This page has no session. Load it again.")
        self._tidy()
        with self._guard:
            if key not in self._sessions:
                name = secrets.token_hex(16)
                folder = self.folder / "sessions" / name
                folder.mkdir(parents=True)
                self._sessions[key] = Session(
                    folder, self.cache / "handed" / name, self.settings, self.lock, self.line, browser
                )
            found = self._sessions[key]
            found.used = time.monotonic()
            return found

    def may_read(self, path: str, browser: str | None) -> bool:
        """Whether a browser may read what is at the address `path`: not what another one was handed."""
        with self._guard:
            return all(
                each.handed.name not in path.lower()
                for each in self._sessions.values()
                if each.browser not in (None, browser)
            )

    def close(self, key: str | None) -> None:
        """Forget a visitor whose page was closed."""
        with self._guard:
            found = self._sessions.pop(key or "", None)
        if found is not None:
            found.close()
            self._remove_uploads(found)

    def _remove_uploads(self, gone: Session) -> None:
        """Remove what a visitor took from Gradio's cache, unless another one has taken it too.

        Gradio names an upload by its content: the same file of two visitors is the same path. The inode says
        whether somebody has uploaded it anew.
        """
        with self._guard:
            used = {upload for each in self._sessions.values() for upload in [*each.uploads]}
        for path, inode in gone.uploads - used:
            with suppress(OSError):
                if self.cache in path.parents and path.stat().st_ino == inode:
                    path.unlink()
                    path.parent.rmdir()

    def close_all(self) -> None:
        """End all commands: all are asked first, so that they save at the same time."""
        for session in [*self._sessions.values()]:
            session.stop()
        for key in [*self._sessions]:
            self.close(key)

    def _tidy(self) -> None:
        """Close the sessions of pages that have been silent for long, and what dead servers left."""
        now = time.monotonic()
        if now - self._looked < _TIDY:
            return
        self._looked = now
        sweep(self.folder.parent)
        longest = self.settings.seconds + _SILENT
        silent = [
            key
            for key, each in self._sessions.items()
            if now - each.used > longest and not self.line.holds(each)
        ]
        for key in silent:
            self.close(key)


@contextmanager
def rooted(work: Path | None, settings: Settings) -> Iterator[Root]:
    """The folder of a server in the folder `work` (default: the system's temporary one), while it runs."""
    parent = work or Path(tempfile.gettempdir()) / f"kcv2diffusers-app-{_user()}"
    parent.mkdir(mode=0o700, parents=True, exist_ok=True)
    if hasattr(os, "getuid") and parent.stat().st_uid != os.getuid():
        raise Error(f"{parent}: belongs to another user.\nGive a folder of your own with --work.")
    with locked_staging(parent, "server") as (folder, lock):
        root = Root(folder, settings, lock)
        try:
            yield root
        finally:
            root.close_all()


def _user() -> str:
    return str(os.getuid()) if hasattr(os, "getuid") else os.environ.get("USERNAME", "user")


def _link(source: Path, target: Path) -> None:
    """The same file at another path; a copy where the disk has no hard links."""
    with suppress(OSError):
        os.link(source, target, follow_symlinks=False)
        return
    shutil.copy(source, target, follow_symlinks=False)
