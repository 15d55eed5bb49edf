"""The folder of a Space with a demo of a published pipeline: card, app and requirements."""

from __future__ import annotations

import json
import re
from collections.abc import Sequence
from importlib import metadata, resources
from os import PathLike
from pathlib import Path
from typing import Any

from kcv2diffusers.hub.client import require_hub
from kcv2diffusers.pipeline_files import CARD
from kcv2diffusers.publish.card_facts import Facts, gather
from kcv2diffusers.publish.check import check
from kcv2diffusers.publish.names import check_names
from kcv2diffusers.system.output import new_folder

GRADIO = "6.31.0"  # the version that the tests run
APP = "app.py"
_EXTRA = re.compile(r"extra == ['\"]([\w-]+)")
_NONE = ("", "")
_FILES = {CARD, APP, "demo.json", "requirements.txt"}


def space(
    pipeline: str | PathLike[str],
    repository: str,
    *,
    out: str | PathLike[str],
    title: str | None = None,
    prompts: Sequence[str] = (),
    tags: Sequence[str] = (),
    license: str | None = None,
    overwrite: bool = False,
) -> Path:
    """Write folder `out` of a Space with a demo of `repository`, as which the pipeline folder is published.

    Prompts and license are those of the pipeline unless given. `tags` are added to the Space's card. Raises
    Error with a message for the user; `out` is then unchanged.
    """
    require_hub()
    check_names(repository, license)
    facts = gather(check(Path(pipeline)), license=license)
    demo = _demo(facts, repository, title, prompts)
    texts = {
        APP: (resources.files("kcv2diffusers.publish") / "space_app" / APP).read_text(encoding="utf-8"),
        "demo.json": json.dumps(demo, indent=2, ensure_ascii=False) + "\n",
        "requirements.txt": "\n".join(requirements_of("diffusers")) + "\n",
        CARD: _card(facts, repository, demo["title"], tags),
    }
    with new_folder(Path(out), overwrite=overwrite, replaceable=_is_space, needed=1 << 20) as folder:
        for name, text in texts.items():
            (folder / name).write_text(text, encoding="utf-8")
    return Path(out)


def _demo(facts: Facts, repository: str, title: str | None, prompts: Sequence[str]) -> dict[str, Any]:
    """Return the content of demo.json, which app.py reads."""
    trained = [*facts.run.get("sample_prompt", []), *facts.instance_prompts]
    asked = [*prompts] or trained or ["a photo of a cat"]
    return {
        "model": repository,
        "variant": facts.variant,
        "absent": facts.absent,
        "title": title or repository.split("/")[-1],
        "about": f"Pictures by [{repository}](https://huggingface.co/{repository}).",
        "prompts": asked,
        "steps": 25,
        "guidance_scale": facts.run.get("guidance_scale", 7.5),
    }


def _card(facts: Facts, repository: str, title: str, tags: Sequence[str]) -> str:
    trained = ["dreambooth"] if facts.run else []
    return space_card(
        title,
        f"A demo of [{repository}](https://huggingface.co/{repository}).",
        models=[repository],
        tags=["stable-diffusion", "text-to-image", "keras", *trained, *tags],
        **facts.license,
    )


def space_card(title: str, text: str, **entries: Any) -> str:
    """Return the README.md of a Gradio Space with `text`; `entries` are further ones of its front matter."""
    from huggingface_hub import SpaceCard, SpaceCardData

    data = SpaceCardData(title=title, sdk="gradio", sdk_version=GRADIO, app_file=APP, **entries)
    return str(SpaceCard(f"---\n{data.to_yaml()}\n---\n\n# {title}\n\n{text}\n"))


def requirements_of(*extras: str) -> list[str]:
    """Return what our `extras` require, except each other; "" stands for what we always require."""
    lines = [line.partition(";") for line in metadata.requires("kcv2diffusers") or []]
    found = [
        requirement.strip()
        for requirement, _, when in lines
        if (_EXTRA.search(when) or _NONE)[1] in extras and not requirement.startswith("kcv2diffusers")
    ]
    return sorted(dict.fromkeys(found))


def _is_space(path: Path) -> bool:
    return all(entry.name in _FILES for entry in path.iterdir())
