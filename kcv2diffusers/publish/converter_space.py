"""The folder of a Space that runs the web page: card, app, requirements and a copy of this package."""

from __future__ import annotations

import shutil
from collections.abc import Sequence
from importlib import metadata, resources
from os import PathLike
from pathlib import Path

from kcv2diffusers.environment import own_version
from kcv2diffusers.hub.client import require_hub
from kcv2diffusers.maps.parts import folders
from kcv2diffusers.pipeline_files import CARD
from kcv2diffusers.publish.space import APP, requirements_of, space_card
from kcv2diffusers.system.output import new_folder

_PACKAGE = "kcv2diffusers"
_REQUIREMENTS = "requirements.txt"
_FILES = {CARD, APP, _REQUIREMENTS, _PACKAGE}
_EXTRAS = ("", "diffusers", "hub", "keras", "verify")
# What the page asks of a visitor's login: to read private models, and to publish.
_SCOPES = ("read-repos", "write-repos", "manage-repos")
_PYTHON = "3.11"
_SIZE = 64 << 20  # bytes, more than the package has
_ABOUT = (
    "Convert KerasCV and KerasHub Stable Diffusion checkpoints to diffusers, compare the pictures of both "
    "sides, train on photos, publish.\n\n"
    "Variables of the Space: `MAX_SIZE` (GB of the largest file), `TIME_LIMIT` (minutes of a command), "
    "`NO_TRAIN=1` (no training)."
)


def converter_space(
    out: str | PathLike[str], *, title: str | None = None, tags: Sequence[str] = (), overwrite: bool = False
) -> Path:
    """Write the folder `out` of a Space that runs the web page, with a copy of this package.

    `tags` are added to those of the card. Raises Error with a message for the user; `out` is then unchanged.
    """
    require_hub()
    title = title or "KerasCV to diffusers"
    card = space_card(
        title,
        _ABOUT,
        python_version=_PYTHON,
        hf_oauth=True,
        hf_oauth_scopes=[*_SCOPES],
        license="apache-2.0",
        tags=["stable-diffusion", "keras", "diffusers", *tags],
    )
    package = Path(str(resources.files(_PACKAGE)))
    with new_folder(Path(out), overwrite=overwrite, replaceable=_is_ours, needed=_SIZE) as folder:
        copied = folder / _PACKAGE
        shutil.copytree(package, copied, ignore=shutil.ignore_patterns("__pycache__"))
        shutil.copytree(folders()[0], copied / "weight_maps", dirs_exist_ok=True)
        described = folder / f"{_PACKAGE}-{own_version()}.dist-info"  # by which the package knows its version
        described.mkdir()
        (described / "METADATA").write_text(_metadata(), encoding="utf-8")
        (folder / APP).write_text(
            (package / "publish" / "space_app" / "converter.py").read_text(encoding="utf-8"), encoding="utf-8"
        )
        (folder / _REQUIREMENTS).write_text("\n".join(requirements_of(*_EXTRAS)) + "\n", encoding="utf-8")
        (folder / CARD).write_text(card, encoding="utf-8")
    return Path(out)


def _metadata() -> str:
    needs = [f"Requires-Dist: {line}" for line in metadata.requires(_PACKAGE) or []]
    lines = ["Metadata-Version: 2.4", f"Name: {_PACKAGE}", f"Version: {own_version()}", *needs]
    return "\n".join(lines) + "\n"


def _is_ours(path: Path) -> bool:
    names = {entry.name for entry in path.iterdir() if not entry.match(f"{_PACKAGE}-*.dist-info")}
    return _PACKAGE in names and names <= _FILES
