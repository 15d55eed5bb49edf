"""The model card of a pipeline: metadata and text, from the records in its folder."""

from __future__ import annotations

import json
import re
from collections.abc import Callable, Iterable, Sequence
from typing import Any

from kcv2diffusers.hub.client import redact
from kcv2diffusers.maps.parts import label
from kcv2diffusers.publish.card_facts import Facts

# Warnings for users of the pipeline: the condition and the text. The publisher can set the keys in STATED.
CAVEATS: dict[str, tuple[Callable[[Facts], bool], str]] = {
    "linear-betas": (
        lambda facts: "linear-betas" in facts.trained_with,
        "It was trained with linear betas (1e-4 to 0.02), KerasCV's default, not with the scaled linear ones "
        "of Stable Diffusion, with which it draws: colours and contrast can be off.",
    ),
    "old-image-encoder": (
        lambda facts: "old-image-encoder" in facts.trained_with,
        "It was trained with the image encoder of KerasCV before 0.5, which padded symmetrically: "
        "what it learnt is shifted by up to 8 pixels.",
    ),
    "old-stack": (
        lambda facts: facts.old_stack and not facts.trained_with,
        "Its checkpoint was written by Keras 2.12 or older. If it was trained with KerasCV before 0.5, "
        "what it learnt is shifted by up to 8 pixels, and scripts of that time often used linear betas, "
        "not those of Stable Diffusion. The weights do not tell.",
    ),
    "gelu": (
        lambda facts: "unet" in facts.checkpoints and (not facts.run or facts.run.get("unet_gelu") == "tanh"),
        "Its UNet was trained with KerasCV's approximation of the GELU (tanh); diffusers computes the exact "
        "one. Pictures differ a little from those of KerasCV.",
    ),
    "gelu-text-encoder": (
        lambda facts: facts.checked.version == "sd2" and "text_encoder" in facts.checkpoints,
        "KerasCV's SD2 text encoder had the exact GELU up to 0.6.0 and an approximation (tanh) since; "
        "`hidden_act` in `text_encoder/config.json` says which this pipeline uses.",
    ),
}
_REPOSITORY = re.compile(r"[A-Za-z0-9][A-Za-z0-9_.-]*/[A-Za-z0-9_.-]+")
_COMMIT = re.compile(r"[0-9a-f]{40}")
STATED = ("linear-betas", "old-image-encoder")


def model_card(facts: Facts, repository: str) -> str:
    """Return README.md for a repository: metadata, then text. Anything like an access token is redacted."""
    from huggingface_hub import ModelCard, ModelCardData

    tags = [*facts.checked.family.tags, "text-to-image", "diffusers", "keras"]
    prompts = facts.instance_prompts
    prompts += [prompt for prompt in facts.run.get("sample_prompt", []) if prompt not in prompts]
    data = ModelCardData(
        base_model=facts.base_model,
        library_name="diffusers",
        pipeline_tag="text-to-image",
        tags=[*tags, *(["dreambooth"] if facts.run else []), *facts.tags],
        inference=True,
        instance_prompt=next(iter(facts.instance_prompts), None),
        widget=[{"text": prompt} for prompt in prompts] or None,
        **facts.license,  # type: ignore[arg-type]
    )
    card = ModelCard(f"---\n{data.to_yaml()}\n---\n\n{_text(facts, repository)}")
    return redact(str(card))


def _text(facts: Facts, repository: str) -> str:
    version = facts.checked.version.removeprefix("sd").replace("-", " ")
    about = f"A Stable Diffusion {version} pipeline for diffusers"
    if facts.run:
        about += ", fine-tuned with DreamBooth in Keras"
    if facts.base_model:
        about += f", from [{facts.base_model}](https://huggingface.co/{facts.base_model})"
    sections = [
        f"# {repository.split('/')[-1]}",
        f"{about}.",
        _pictures(facts),
        _section("Use", _snippet(facts, repository)),
        _section("Origin", _origin(facts)),
        _section("Read this first", _caveats(facts)),
        _section("Training", _training(facts)),
        _section("Conversion", _conversion(facts)),
        _section("Verification", _verification(facts)),
    ]
    return "\n\n".join(section for section in sections if section) + "\n"


def _section(title: str, text: str) -> str:
    return f"## {title}\n\n{text}" if text else ""


def _pictures(facts: Facts) -> str:
    return "\n".join(f"![{name.rsplit('.')[0]}]({name})" for name in facts.pictures)


def _snippet(facts: Facts, repository: str) -> str:
    arguments = {"variant": f'"{facts.variant}"'} if facts.variant else {}
    given = "".join(
        f", {name}={value}" for name, value in (arguments | dict.fromkeys(facts.absent, "None")).items()
    )
    pipeline = facts.checked.family.index["_class_name"]
    prompt = json.dumps(next(iter(facts.instance_prompts), "a photo of a cat"), ensure_ascii=False)
    return f"""```python
from diffusers import {pipeline}

pipeline = {pipeline}.from_pretrained("{repository}"{given})
pipeline({prompt}).images[0].save("picture.png")
```"""


def _origin(facts: Facts) -> str:
    """Return who made the weights of a rescued pipeline and where they are."""
    rescued = facts.conversion.get("rescued", {})
    repository, commit = rescued.get("repository", ""), rescued.get("commit", "")
    if not (_REPOSITORY.fullmatch(repository) and _COMMIT.fullmatch(commit)):
        return ""
    author, page = repository.partition("/")[0], f"https://huggingface.co/{repository}"
    return (
        f"The weights are by [{author}](https://huggingface.co/{author}), from [{repository}]({page}) at "
        f"commit [`{commit[:7]}`]({page}/tree/{commit}). They were converted to "
        "the format of diffusers. The author's page tells how they were trained."
    )


def _caveats(facts: Facts) -> str:
    return "\n".join(f"- {words}" for applies, words in CAVEATS.values() if applies(facts))


def _training(facts: Facts) -> str:
    if not facts.run:
        return ""
    rows = [(f"`{name}`", _plain(value)) for name, value in facts.run.items()]
    about = (
        "With `kcv2diffusers dreambooth` ([arXiv:2208.12242](https://arxiv.org/abs/2208.12242)), in Stable "
        "Diffusion's own noise schedule"
        + (", rescaled to zero terminal SNR" if facts.run.get("zero_terminal_snr") else "")
        + ". Options that are not at their defaults:"
    )
    return f"{about}\n\n" + _table(["option", "value"], rows)


def _conversion(facts: Facts) -> str:
    if not facts.conversion:
        return ""
    rows = []
    for part, source in facts.conversion["parts"].items():
        for file in source["files"]:
            digest = f"`{_plain(file['sha256'])}`" if "sha256" in file else "not known"
            rows.append((label(part), f"{_plain(file['name'])} ({_plain(source['container'])})", digest))
    head = f"By `{_plain(facts.conversion['tool'])}` from these files:"
    text = f"{head}\n\n" + _table(["part", "file", "SHA-256"], rows)
    if loras := facts.conversion.get("loras"):
        merged = [
            (_plain(one["name"]), f"{one['strength']:g}", f"`{_plain(one['sha256'])}`") for one in loras
        ]
        text += "\n\nThese LoRAs are merged into the weights:\n\n"
        text += _table(["LoRA", "strength", "SHA-256"], merged)
    return text


def _verification(facts: Facts) -> str:
    if not facts.figures:
        return ""
    intro = "The Keras model and this pipeline side by side (`kcv2diffusers verify`):"
    return f"{intro}\n\n" + _table(["what", "figure"], [tuple(map(_plain, row)) for row in facts.figures])


def _table(heads: Sequence[str], rows: Iterable[Sequence[str]]) -> str:
    return "\n".join("| " + " | ".join(cells) + " |" for cells in (heads, ["---"] * len(heads), *rows))


def _plain(value: Any) -> str:
    """Return a value as text for a table cell, with markup characters escaped or replaced."""
    text = ", ".join(map(str, value)) if isinstance(value, list) else str(value)
    return " ".join(text.split()).replace("|", "\\|").replace("<", "&lt;").replace("`", "'")
