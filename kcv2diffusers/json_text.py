"""JSON in and out of files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def parse_object(data: bytes) -> dict[str, Any] | None:
    """The object that `data` holds in JSON, None if it holds none. It may be UTF-16 or UTF-32, and begin with
    a byte-order mark, as what editors on Windows write does.
    """
    try:
        found = json.loads(data)  # which finds out the encoding of bytes, but takes no mark in a text
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write an object, sorted and indented, into a file whose folder is made if it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
