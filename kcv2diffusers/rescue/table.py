"""The table at the end of a run: as text, CSV, and an HTML page that needs nothing else."""

from __future__ import annotations

import html
from collections import Counter
from collections.abc import Sequence
from pathlib import Path

from kcv2diffusers.csv_text import csv_text
from kcv2diffusers.errors import plain
from kcv2diffusers.maps.parts import label
from kcv2diffusers.rescue.one import ENDS, Result
from kcv2diffusers.system.output import whole_file

COLUMNS = (
    "repository",
    "outcome",
    "where",
    "reason",
    "commit",
    "license",
    "parts",
    "read_mb",
    "written_mb",
    "seconds",
)
_STYLE = """
body { font: 15px/1.5 system-ui, sans-serif; margin: 2rem; color: #222; background: #fff; }
table { border-collapse: collapse; }
th, td { padding: .3rem .7rem; border-bottom: 1px solid #ccc; text-align: left; vertical-align: top; }
td { overflow-wrap: anywhere; }
.number { text-align: right; font-variant-numeric: tabular-nums; white-space: nowrap; }
.failed { color: #a11; } .published, .stored { color: #161; }
@media (prefers-color-scheme: dark) {
  body { color: #ddd; background: #181818; } th, td { border-color: #444; }
  .failed { color: #f77; } .published, .stored { color: #7d7; } a { color: #8bf; }
}
"""


def cells(result: Result) -> dict[str, str]:
    """The cells of a row, by column. No cell has a character that is not printable."""
    parts = ", ".join(f"{label(part)}: {origin}" for part, origin in result.parts.items())
    row = {
        "repository": result.repository,
        "outcome": result.outcome,
        "where": result.where,
        "reason": result.reason,
        "commit": result.commit,
        "license": result.license,
        "parts": parts,
        "read_mb": f"{result.read / 1e6:.1f}" if result.read else "",
        "written_mb": f"{result.written / 1e6:.1f}" if result.written else "",
        "seconds": f"{result.seconds:.1f}" if result.seconds else "",
    }
    return {name: plain(row[name]) for name in COLUMNS}


def summary(results: Sequence[Result]) -> str:
    """How many repositories ended how, in one line."""
    counts = Counter(result.outcome for result in results)
    order = [*ENDS, *(name for name in counts if name not in ENDS)]
    told = ", ".join(f"{counts[name]} {name}" for name in order if counts[name])
    return f"{len(results)} repositories: {told or 'none'}"


def as_text(results: Sequence[Result]) -> str:
    """The table for a terminal: a line for each repository, and the summary."""
    width = max((len(plain(result.repository)) for result in results), default=0)
    lines = []
    for result in results:
        row = cells(result)
        size = f" ({row['read_mb']} MB)" if row["read_mb"] else ""
        lines.append(
            f"{row['repository']:{min(width, 48)}}  {row['outcome']:9}  {row['reason'] or row['where']}{size}"
        )
    return "\n".join([*lines, summary(results)])


def as_csv(results: Sequence[Result]) -> str:
    """The table as CSV. A cell that a spreadsheet would take for a formula begins with an apostrophe."""
    return csv_text(COLUMNS, (cells(result).values() for result in results))


def as_html(results: Sequence[Result], title: str) -> str:
    """The table as a page without scripts or requests. Repositories of the Hub are links."""
    numbers = {"read_mb", "written_mb", "seconds"}
    heads = "".join(f'<th scope="col">{name.replace("_mb", " (MB)")}</th>' for name in COLUMNS)
    rows = []
    for result in results:
        row = {name: html.escape(value) for name, value in cells(result).items()}
        if result.commit:  # only repositories with a valid id have a commit
            row["repository"] = (
                f'<a href="https://huggingface.co/{row["repository"]}">{row["repository"]}</a>'
            )
        row["commit"] = row["commit"][:7]
        kind = f' class="{result.outcome}"' if result.outcome in ENDS else ""
        marks = {"outcome": kind, **dict.fromkeys(numbers, ' class="number"')}
        rows.append("<tr>" + "".join(f"<td{marks.get(n, '')}>{v}</td>" for n, v in row.items()) + "</tr>")
    name = html.escape(plain(title))
    policy = "default-src 'none'; style-src 'unsafe-inline'"
    return "\n".join(
        [
            '<!doctype html>\n<html lang="en">\n<head>\n<meta charset="utf-8">',
            f'<meta http-equiv="Content-Security-Policy" content="{policy}">',
            '<meta name="viewport" content="width=device-width">',
            f"<title>{name}</title>\n<style>{_STYLE}</style>\n</head>\n<body>",
            f"<h1>{name}</h1>\n<p>{html.escape(summary(results))}</p>",
            f"<table>\n<thead><tr>{heads}</tr></thead>\n<tbody>",
            *rows,
            "</tbody>\n</table>\n</body>\n</html>\n",
        ]
    )


def write_tables(folder: Path, results: Sequence[Result], title: str) -> list[Path]:
    """Write rescue.csv and rescue.html into `folder`; returns their paths."""
    texts = {"rescue.csv": as_csv(results), "rescue.html": as_html(results, title)}
    for name, text in texts.items():
        with whole_file(folder / name) as part:
            part.write_text(text, encoding="utf-8", newline="")
    return [folder / name for name in texts]
