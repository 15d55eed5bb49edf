"""Reading and writing JSON files."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any


def parse_object(data: bytes) -> dict[str, Any] | None:
    """Parse a JSON object; return None if `data` is not one.

    `data` may be UTF-8, UTF-16 or UTF-32, with or without a byte-order mark, which Windows editors write.
    """
    try:
        found = json.loads(data)  # detects the encoding of bytes; it refuses a str with a byte-order mark
    except (ValueError, RecursionError):
        return None
    return found if isinstance(found, dict) else None


def write_json(path: Path, data: Mapping[str, Any]) -> None:
    """Write an object, sorted and indented. The folder is created if it does not exist."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(data, indent=2, sort_keys=True) + "\n", encoding="utf-8", newline="\n")
