"""The pictures of a report of `verify`, for the page."""

from __future__ import annotations

from base64 import b64decode
from html.parser import HTMLParser
from pathlib import Path

_PNG = "data:image/png;base64,"


def of_report(report: Path, folder: Path) -> list[tuple[Path, str]]:
    """Write the pictures of `report`, an HTML page, into `folder`. Returns their paths and descriptions."""
    images = _Images()
    images.feed(report.read_text(encoding="utf-8"))
    folder.mkdir(parents=True, exist_ok=True)
    found = []
    for number, (source, alt) in enumerate(images.found):
        path = folder / f"{number:02}.png"
        path.write_bytes(b64decode(source.removeprefix(_PNG)))
        found.append((path, alt))
    return found


class _Images(HTMLParser):
    def __init__(self) -> None:
        super().__init__()
        self.found: list[tuple[str, str]] = []

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        values = dict(attrs)
        source = values.get("src") or ""
        if tag == "img" and source.startswith(_PNG):
            self.found.append((source, values.get("alt") or ""))
