"""`conversion.json` in a pipeline folder: the sources of the conversion, for the model card.

Hashes of checkpoints are not computed here: SHA-256 (0.8 GB/s on the machine of the benchmark) would take
longer than the conversion. `push` computes them from source files that are unchanged. The record therefore
contains their paths, relative to the pipeline; `push` removes the paths before it publishes the record. Files
from the Hub cache already have their hash in the name of their blob.
"""

from __future__ import annotations

import hashlib
import os
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import NoneType
from typing import Any

from kcv2diffusers.environment import own_version
from kcv2diffusers.errors import SourceError
from kcv2diffusers.hub.address import cached
from kcv2diffusers.json_text import parse_object
from kcv2diffusers.pipeline_files import CARD, CONVERSION_FILE
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.sources.source import Source

_BLOCK = 16 << 20  # bytes hashed at a time
_LICENSE = re.compile(r"^(license|license_name|license_link):[ \t]*['\"]?([\w.:/-]+)['\"]?[ \t]*$", re.M)
_FRONT_MATTER = re.compile(r"\A---\r?\n(.*?)\r?\n---", re.S)
_FORM = {
    "tool": str,
    "parts": {
        "*": {
            "from": str,
            "container": str,
            "keras": (str, NoneType),
            "checkpoint": bool,
            "files": [{"name": str, "bytes": int, "?sha256": str, "?modified": int, "?path": str}],
            "?inside": str,
            "?left_out": {"*": int},
        }
    },
    "bases": [str],
    "origins": [{"source": str, "?license": str, "?license_name": str, "?license_link": str}],
    "dtypes": {"*": str},
    "?loras": [{"name": str, "strength": (int, float), "bytes": int, "sha256": str}],
    "?rescued": {"repository": str, "commit": str, "license": str},
}
_SHA256 = re.compile(r"[0-9a-f]{64}")


def record(
    parts: Mapping[str, Match],
    bases: Sequence[Path],
    dtypes: Mapping[str, str],
    out: Path,
    loras: Iterable[tuple[Path, float]] = (),
) -> dict[str, Any]:
    """Return the record: the tool, the source of each part, the bases, and the licenses that these state.

    `out` is the future folder of the pipeline, `bases` are the paths that supplied missing parts, `loras` the
    files and strengths of the LoRAs merged into the weights. LoRA files are small: they are hashed here.
    """
    merged = [_lora(path, strength) for path, strength in loras]
    homes = {_home(path): None for path in (*(m.source.path for m in parts.values()), *bases)}
    stated = {home: license_of(home) for home in homes}
    return {
        "tool": f"kcv2diffusers {own_version()}",
        "parts": {part: _part(match, out) for part, match in parts.items()},
        "bases": sorted({_named(_home(path)) for path in bases}),
        "origins": [
            {"source": _named(home), **stated[home]} for home in homes if stated[home] or cached(home)
        ],
        "dtypes": dict(dtypes),
        **({"loras": merged} if merged else {}),
    }


def _lora(path: Path, strength: float) -> dict[str, Any]:
    found = cached(path)
    return {
        "name": str(found[0]) if found else path.name,
        "strength": strength,
        "bytes": path.stat().st_size,
        "sha256": _sha256(path, lambda size: None),
    }


def _sha256(path: Path, progress: Callable[[int], None]) -> str:
    """Return the SHA-256 of a file. `progress` is called with the size of each block."""
    digest = hashlib.sha256()
    with path.open("rb") as opened:
        while block := opened.read(_BLOCK):
            digest.update(block)
            progress(len(block))
    return digest.hexdigest()


def _home(path: Path) -> Path:
    """Return the folder that contains a source's model card, if it has one."""
    found = cached(path)
    return found[1] if found else path if path.is_dir() else path.parent


def _named(path: Path) -> str:
    """Return the Hub address of a folder, else its name. The record is published, so local paths stay out."""
    found = cached(path)
    return str(found[0]) if found else path.name


def license_of(folder: Path) -> dict[str, str]:
    """Return the entries `license`, `license_name` and `license_link` that the model card in a folder has."""
    try:
        text = (folder / CARD).read_bytes()[: 1 << 20].decode("utf-8-sig", "replace")
    except OSError:
        return {}
    front = _FRONT_MATTER.match(text)
    return dict(_LICENSE.findall(front[1])) if front else {}


def read(folder: Path) -> dict[str, Any]:
    """Return the record in a pipeline folder, {} if there is none. Raises SourceError if it is invalid."""
    path = folder / CONVERSION_FILE
    try:
        found = parse_object(path.read_bytes()[: 4 << 20])
    except FileNotFoundError:
        return {}
    if found is None or not _fits(found, _FORM):
        raise SourceError(path, "not what `convert` writes.", "Remove it, or convert again.")
    return found


def _fits(data: Any, form: Any) -> bool:
    """Return whether JSON data matches a schema.

    A schema is a type, [schema of each item], {"*": schema of each value}, or {name: schema}. Names that
    begin with "?" are optional.
    """
    if isinstance(form, list):
        return isinstance(data, list) and all(_fits(item, form[0]) for item in data)
    if not isinstance(form, dict):
        return isinstance(data, form)
    if not isinstance(data, dict):
        return False
    if "*" in form:
        return all(_fits(item, form["*"]) for item in data.values())
    needed = {name for name in form if not name.startswith("?")}
    known = {name.lstrip("?"): inner for name, inner in form.items()}
    return needed <= data.keys() <= known.keys() and all(_fits(data[name], known[name]) for name in data)


def published(folder: Path, progress: Callable[[int, int], None]) -> dict[str, Any]:
    """Return the record for publication: with the hashes of unchanged source files, without local paths.

    `progress` is called with the bytes hashed and in total.
    """
    data = read(folder)
    files = [file for part in data.get("parts", {}).values() for file in part["files"]]
    there = [(path, file) for file in files if (path := _unchanged(folder, file))]
    total, done = sum(file["bytes"] for _, file in there), 0

    def more(size: int) -> None:
        nonlocal done
        progress(done := done + size, total)

    for path, file in there:
        file["sha256"] = _sha256(path, more)
    for file in files:
        for name in ("path", "modified"):
            file.pop(name, None)
    return data


def _unchanged(folder: Path, file: Mapping[str, Any]) -> Path | None:
    """Return the path of a file of the record if it has no hash yet and is unchanged since the conversion."""
    if "path" not in file or "sha256" in file:
        return None
    path = folder / str(file["path"])
    with suppress(OSError):
        state = path.stat()
        if (state.st_size, state.st_mtime_ns) == (file["bytes"], file.get("modified")):
            return path
    return None


def _part(match: Match, out: Path) -> dict[str, Any]:
    source = match.source
    more = {
        "inside": source.inside,
        "left_out": {kind: len(tensors) for kind, tensors in match.leftovers.items()},
    }
    return {
        "from": _named(source.path),
        "container": source.container,
        "keras": source.keras_version,
        "checkpoint": match.keras,
        "files": [_file(path, source.path, out) for path in _files(source)],
        **{name: value for name, value in more.items() if value},
    }


def _files(source: Source) -> list[Path]:
    """Return the files of a checkpoint that contain tensors. For an unpacked archive, return the archive."""
    if source.spool is not None or (source.path.is_file() and source.path.suffix != ".json"):
        return [source.path]
    return sorted({tensor.path for tensor in source.tensors})


def _file(path: Path, source: Path, out: Path) -> dict[str, Any]:
    state = path.stat()
    name = path.relative_to(source.parent).as_posix() if source.parent in path.parents else path.name
    if found := cached(path):
        blob = path.resolve().name
        known = {"sha256": blob} if _SHA256.fullmatch(blob) else {}
        return {"name": str(found[0]), "bytes": state.st_size, **known}
    return {
        "name": name,
        "bytes": state.st_size,
        "modified": state.st_mtime_ns,
        "path": os.path.relpath(path, out),
    }
