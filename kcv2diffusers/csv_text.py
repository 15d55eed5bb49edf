"""CSV that a spreadsheet can open without computing what a file or a server says."""

from __future__ import annotations

import csv
import io
from collections.abc import Iterable, Sequence

_FORMULA = ("=", "+", "-", "@", "\t", "\r")  # a spreadsheet computes a cell that begins with one of these


def csv_text(columns: Sequence[str], rows: Iterable[Iterable[str | float]]) -> str:
    """A table as CSV. A text that a spreadsheet would take for a formula begins with an apostrophe."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    writer.writerow(columns)
    for row in rows:
        writer.writerow(f"'{v}" if isinstance(v, str) and v.startswith(_FORMULA) else v for v in row)
    return text.getvalue()
