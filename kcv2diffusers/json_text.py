"""JSON from files of others."""

from __future__ import annotations

import json
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
