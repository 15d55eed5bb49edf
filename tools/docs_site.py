"""mkdocs' hook: files of the repository that lie outside docs/ but belong to the site.

The changelog and the like are pages of the site as they are; notebooks and pictures are files that pages link
to. Links in a page are those of the repository, which a reader of its files can follow; here they become
those of the site.
"""

from __future__ import annotations

import posixpath
import re
from pathlib import Path
from typing import Any

from mkdocs.structure.files import File

ROOT = Path(__file__).parent.parent
PAGES = {"CHANGELOG.md": "changelog.md", "CONTRIBUTING.md": "contributing.md", "SECURITY.md": "security.md"}
FILES = ("LICENSE", "notebooks/*.ipynb", "kcv2diffusers/tiny/*.png")
_LINK = re.compile(r"(\]\()(?![a-z]+:|[#/<])([^)#\s]+)")


def _on_site(path: str) -> str:
    """Where a file of the repository is on the site, both relative to their roots."""
    return PAGES.get(path, path.removeprefix("docs/"))


def on_files(files: Any, config: Any) -> Any:
    """Add what lies outside docs/."""
    found = [path.relative_to(ROOT).as_posix() for pattern in FILES for path in sorted(ROOT.glob(pattern))]
    for path in (*PAGES, *found):
        files.append(File.generated(config, _on_site(path), abs_src_path=str(ROOT / path)))
    return files


def on_page_markdown(markdown: str, page: Any, **_: Any) -> str:
    """Turn links between files of the repository into links within the site."""
    home = next(
        (name for name, uri in PAGES.items() if uri == page.file.src_uri), f"docs/{page.file.src_uri}"
    )
    below, here = posixpath.dirname(home), posixpath.dirname(page.file.src_uri)

    def link(match: re.Match[str]) -> str:
        target = _on_site(posixpath.normpath(posixpath.join(below, match[2])))
        return match[1] + posixpath.relpath(target, here or ".")

    return _LINK.sub(link, markdown)
