"""Atomic output: a folder or file appears complete or not at all."""

from __future__ import annotations

import errno
import os
import shutil
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from kcv2diffusers.errors import TargetError
from kcv2diffusers.system.interruption import keeps

_SECONDS_OF_A_DAY = 86_400


@contextmanager
def new_folder(
    target: Path, *, overwrite: bool, replaceable: Callable[[Path], bool], needed: int
) -> Iterator[Path]:
    """A temporary folder beside `target` that is renamed to `target` when the block ends without an error.

    `replaceable` returns whether an existing folder may be replaced when `overwrite` is set; anything else is
    left unchanged. `needed` is the size in bytes of what will be written. Raises TargetError.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100  (a link is replaced, not followed)
    check_free(target, overwrite=overwrite, replaceable=replaceable)
    with _beside(target, needed) as temporary:
        yield temporary
        _move_into_place(temporary, target)
        keeps(f"{target} is complete")


@contextmanager
def new_file(
    target: Path, *, overwrite: bool, replaceable: Callable[[Path], bool], needed: int
) -> Iterator[Path]:
    """The path of a temporary file that is renamed to `target` when the block ends without an error.

    The arguments are those of `new_folder`; `replaceable` is called with the existing file. Raises
    TargetError.
    """
    target = Path(os.path.abspath(target))  # noqa: PTH100  (a link is replaced, not followed)
    check_free_file(target, overwrite=overwrite, replaceable=replaceable)
    with _beside(target, needed) as temporary:
        file = temporary / target.name
        yield file
        file.replace(target)
        keeps(f"{target} is complete")


@contextmanager
def _beside(target: Path, needed: int) -> Iterator[Path]:
    """A temporary folder beside `target` that is removed when the block ends."""
    parent = target.parent
    with _writing(parent), _made(parent):
        _remove_stale(target)
        _check_space(parent, needed)
        temporary = parent / f".{target.name}.tmp-{os.getpid()}"
        shutil.rmtree(temporary, ignore_errors=True)
        try:
            temporary.mkdir()
            yield temporary
        finally:
            shutil.rmtree(temporary, ignore_errors=True)


@contextmanager
def whole_file(path: Path) -> Iterator[Path]:
    """A temporary path beside `path`; it is renamed to `path` when the block ends without an error."""
    part = path.with_name(f".{path.name}.part")
    yield part
    part.replace(path)


def check_folder(folder: Path, needed: int = 0) -> None:
    """Raise TargetError unless files of `needed` bytes can be written into `folder`, which need not exist."""
    there = next(path for path in (folder, *folder.absolute().parents) if os.path.lexists(path))
    if not there.is_dir():
        raise TargetError(f"{there}: not a folder.\nRemove it yourself or choose another folder.")
    if not os.access(there, os.W_OK | os.X_OK):
        raise TargetError(f"{there}: cannot be written.\nCheck its permissions, or choose another folder.")
    _check_space(there, needed)


def check_target(target: Path, *, overwrite: bool, replaceable: Callable[[Path], bool], needed: int) -> None:
    """Do the checks of `new_folder` without creating anything. Raises TargetError."""
    check_free(target, overwrite=overwrite, replaceable=replaceable)
    check_folder(target.absolute().parent, needed)


def _check_space(folder: Path, needed: int) -> None:
    free = shutil.disk_usage(folder).free
    if free < needed:
        raise TargetError(
            f"{folder}: {needed / 1e9:.2f} GB are needed and {free / 1e9:.2f} GB are free.\n"
            "Free some space or choose another --out."
        )


def check_free(target: Path, *, overwrite: bool, replaceable: Callable[[Path], bool]) -> None:
    """Raise TargetError unless `target` does not exist, is an empty folder, or may be overwritten."""
    with _writing(target):
        if not (target.exists() or target.is_symlink()):
            return
        folder = target.is_dir() and not target.is_symlink()
        if folder and not any(target.iterdir()):
            return
        if not overwrite:
            raise TargetError(f"{target}: exists already.\nUse --overwrite to replace it, or another --out.")
        if not folder or not replaceable(target):
            raise TargetError(
                f"{target}: exists and is not an earlier output, so --overwrite leaves it alone.\n"
                "Remove it yourself or choose another --out."
            )


def check_free_file(target: Path, *, overwrite: bool, replaceable: Callable[[Path], bool]) -> None:
    """Raise TargetError if the file `target` exists and may not be overwritten."""
    with _writing(target):
        if not os.path.lexists(target):
            return
        if target.is_dir():
            raise TargetError(f"{target}: is a folder.\nChoose another --out.")
        if not overwrite:
            raise TargetError(f"{target}: exists already.\nUse --overwrite to replace it, or another --out.")
        if not replaceable(target):
            raise TargetError(
                f"{target}: exists and is not an earlier output, so --overwrite leaves it alone.\n"
                "Remove it yourself or choose another --out."
            )


@contextmanager
def _writing(folder: Path) -> Iterator[None]:
    """Turn an OSError while writing in `folder` into a TargetError that names no temporary file."""
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            raise TargetError(
                f"{folder}: no space left while writing; nothing was kept.\n"
                "Free some space or choose another --out."
            ) from error
        where = Path(error.filename or folder)
        raise TargetError(
            f"{folder if folder in where.parents else where}: cannot be written: "
            f"{error.strerror or error}.\n"
            "Check the path and its permissions, or choose another --out."
        ) from error


@contextmanager
def _made(folder: Path) -> Iterator[None]:
    """Create `folder` and its parents; after an error the newly created ones are removed."""
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    try:
        folder.mkdir(parents=True, exist_ok=True)
        yield
    except BaseException:
        for path in new:
            with suppress(OSError):
                path.rmdir()
        raise


def _move_into_place(temporary: Path, target: Path) -> None:
    """Rename `temporary` to `target`; an existing target is moved aside first and restored on failure."""
    if not target.exists():
        temporary.rename(target)
        return
    aside = temporary.with_name(f"{temporary.name}-old")
    try:
        target.rename(aside)
        temporary.rename(target)
    except BaseException:
        if aside.exists() and not target.exists():
            aside.rename(target)
        raise
    shutil.rmtree(aside, ignore_errors=True)


def _remove_stale(target: Path) -> None:
    """Remove the temporary folders that killed runs left behind."""
    for path in target.parent.glob(f".{target.name}.tmp-*"):
        process = path.name.rpartition("-")[2]
        if process.isdigit() and not _is_used(path, Path(f"/proc/{process}")):
            shutil.rmtree(path, ignore_errors=True)


def _is_used(temporary: Path, process: Path) -> bool:
    """Whether the process that owns a temporary folder is running.

    Without /proc (Windows, macOS) this is whether the folder was modified within the last day.
    """
    if process.parent.exists():
        return process.exists()
    with suppress(OSError):
        newest = max(path.stat().st_mtime for path in (temporary, *temporary.rglob("*")))
        return time.time() - newest < _SECONDS_OF_A_DAY
    return True
