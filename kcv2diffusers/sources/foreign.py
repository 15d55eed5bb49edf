"""Identify files that are often in the place of weights but are not weights, with a remedy for each.

Only a file's name and first bytes are read, and an archive's list of members.
"""

from __future__ import annotations

import re
import tarfile
import zipfile
from collections.abc import Callable
from itertools import islice
from pathlib import Path

from kcv2diffusers.errors import SourceError

HEAD = 1024  # bytes that are read
_MAX_MEMBERS = 1000
_WEIGHTS = re.compile(r"\.(h5|hdf5|keras|index)$|(^|/)saved_model\.pb$")
_LFS = re.compile(rb"version https://git-lfs\.github\.com/spec/.*?(?:\nsize (\d{1,18})\n|\Z)", re.S)
_UNFINISHED = (".incomplete", ".crdownload", ".part", ".partial", ".download", ".aria2", ".opdownload")
_PICKLE = "They can run code and are never opened: get a .safetensors file, or see convert --allow-pickle."
_UNPACK = "Unpack it and give what is inside."

# A pattern for the first bytes, the problem, and the remedy.
_SIGNATURES = (
    (rb"\x1f\x8b", "compressed with gzip.", "Unpack it first: gunzip, or tar xzf for a .tar.gz."),
    (rb"BZh[1-9]", "compressed with bzip2.", "Unpack it first: bunzip2, or tar xjf for a .tar.bz2."),
    (rb"\xfd7zXZ\0", "compressed with xz.", "Unpack it first: unxz, or tar xJf for a .tar.xz."),
    (rb"\x28\xb5\x2f\xfd", "compressed with Zstandard.", "Unpack it first: unzstd."),
    (rb"7z\xbc\xaf\x27\x1c", "a 7-Zip archive.", _UNPACK),
    (rb"Rar!", "a RAR archive.", _UNPACK),
    (rb"\x80[\x02-\x05]", "a pickle (PyTorch or Python).", _PICKLE),
    (rb"\0\x05\x16[\0\x07]", "what macOS notes beside a file (._), not the file.", "Give the file itself."),
    (rb"\0\0\0\x01Bud1", "a .DS_Store of macOS, not weights.", "Give the file itself."),
    (
        rb"\s*<(!doctype|html|head|\?xml)",
        "a web page, not weights: what a server sent instead of the file.",
        "Download it again; the Hub's links to files have /resolve/ in them, not /blob/.",
    ),
    (
        rb'\s*\{\s*"error"|Invalid username|Entry not found|Repository not found|Access to model',
        "an error message of a server, not weights.",
        "Download it again; log in first where that is needed (hf auth login).",
    ),
)
_SAFETENSORS = re.compile(rb".{6}\0\0\{", re.S)
_PATTERNS = [(re.compile(p, re.I | re.S), problem, remedy) for p, problem, remedy in _SIGNATURES]


def require_own(path: Path) -> None:
    """Raise SourceError if `path` has the content of another known kind of file, such as a Git LFS pointer.

    A file that cannot be opened passes: its reader reports that.
    """
    try:
        with path.open("rb") as file:
            head = file.read(HEAD)
    except OSError:
        return
    if found := _by_name(path) or _by_head(head):
        raise SourceError(path, *found)


def reason(path: Path) -> tuple[str, str] | None:
    """The problem and the remedy for a file that is not weights; None if its kind is unknown."""
    with path.open("rb") as file:
        head = file.read(HEAD)
    if _SAFETENSORS.match(head):
        problem = "a .safetensors file, which is read only under that ending and if it is given itself."
        return problem, "Give the file, or the folder of its pipeline with --base or to to-keras."
    return _by_name(path) or _by_head(head) or _archive(path, head)


def _by_name(path: Path) -> tuple[str, str] | None:
    if path.suffix.lower() in _UNFINISHED:
        return "a download that was not finished.", "Download it again, or rename it if it is complete."
    return None


def _by_head(head: bytes) -> tuple[str, str] | None:
    if pointer := _LFS.match(head):
        stated = f" that stands for {int(pointer[1]) / 1e6:,.1f} MB" if pointer[1] else ""
        return f"a Git LFS pointer{stated}, not the file.", "Fetch the file: git lfs pull, or hf download."
    return next(((problem, remedy) for p, problem, remedy in _PATTERNS if p.match(head)), None)


def _archive(path: Path, head: bytes) -> tuple[str, str] | None:
    if head[257:262] == b"ustar":
        return _members(path, "a tar archive", _tar_names)
    if head[:4] == b"PK\x03\x04":
        return _members(path, "a zip archive", _zip_names)
    return None


def _members(path: Path, kind: str, names: Callable[[Path], list[str]]) -> tuple[str, str] | None:
    try:
        inside = names(path)
    except Exception:  # tarfile and zipfile raise many exception types for damaged archives
        return None
    if any(name.endswith("data.pkl") for name in inside):
        return "PyTorch's pickled weights.", _PICKLE
    weights = [name for name in inside if _WEIGHTS.search(name) and not name.startswith("__MACOSX/")]
    return (f"{kind} with {weights[0]} inside.", _UNPACK) if weights else None


def _zip_names(path: Path) -> list[str]:
    with zipfile.ZipFile(path) as archive:
        return archive.namelist()


def _tar_names(path: Path) -> list[str]:
    with tarfile.open(path, "r:") as archive:
        return [member.name for member in islice(archive, _MAX_MEMBERS)]
