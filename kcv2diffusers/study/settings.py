"""The tables of a study's file besides [train]: every key defined once."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, fields, replace
from pathlib import Path
from typing import Any, TypeVar, get_args, get_type_hints

from kcv2diffusers.errors import Error, is_unicode, meant, plain
from kcv2diffusers.study.schedulers import KERASCV, NAMES

SUBJECT, CLASS, OTHER = "subject", "class", "other"
KINDS = (SUBJECT, CLASS, OTHER)
"""The kinds of prompts: of the subject, of its class, of anything else."""

Table = TypeVar("Table", "Sample", "Measure", "Page")


def _key(default: Any, least: float | None = None, choices: tuple[str, ...] = ()) -> Any:
    metadata = {"least": least, "choices": choices}
    if isinstance(default, list):
        return field(default_factory=lambda: list(default), metadata=metadata)
    return field(default=default, metadata=metadata)


@dataclass(frozen=True)
class Sample:
    """The sampling settings. The first four lists are dimensions of the grid."""

    scheduler: list[str] = _key([KERASCV], choices=NAMES)
    steps: list[int] = _key([25], least=1)
    guidance_scale: list[float] = _key([7.5], least=0)
    negative_prompt: list[str] = _key([""])
    seeds: list[int] = _key([0, 1], least=0)
    prompts: list[str] = _key([])
    class_prompts: list[str] = _key([])
    other_prompts: list[str] = _key([])
    batch_size: int = _key(4, least=1)

    def every_prompt(self) -> list[tuple[str, str]]:
        """Each prompt with its kind, in the order in which they are shown."""
        lists = (self.prompts, self.class_prompts, self.other_prompts)
        return [(kind, text) for kind, texts in zip(KINDS, lists, strict=True) for text in texts]

    def varied(self) -> list[str]:
        """The names of the dimensions with more than one value."""
        names = ("scheduler", "steps", "guidance_scale", "negative_prompt")
        return [name for name in names if len(getattr(self, name)) > 1]


@dataclass(frozen=True)
class Measure:
    """What is measured, and by which models: each a folder or a name on the Hub, "" for none.

    `judge` is "tiny" or "" ("auto": tiny for the tiny base). `thing` is what it calls the subject.
    `identifier` is the word that CLIP does not see in a prompt. `best` are the measures that rank the cells;
    none: all.
    """

    judge: str = _key("auto", choices=("auto", "tiny", ""))
    thing: str = _key("tiger")
    dino: str = _key("")
    clip: str = _key("")
    identifier: str = _key("")
    best: list[str] = _key([])

    def located(self, folder: Path, options: Mapping[str, Any]) -> Measure:
        """With paths that hold in every folder, and the judge chosen for a run's options."""
        judge = ("tiny" if options.get("base") == ["tiny"] else "") if self.judge == "auto" else self.judge

        def model(name: str) -> str:
            return str((folder / name).absolute()) if name and (folder / name).is_dir() else name

        return replace(self, judge=judge, dino=model(self.dino), clip=model(self.clip))


@dataclass(frozen=True)
class Page:
    """The pictures of the page: the largest edge of each in pixels, and the quality of WebP."""

    picture: int = _key(192, least=16)
    quality: int = _key(75, least=1)


def read_table(kind: type[Table], given: Any, where: str) -> Table:
    """A table of the file, checked. A value stands for a list of one. Raises Error."""
    if not isinstance(given, dict):
        raise Error(f"{where} is not a table.")
    known = {f.name: f for f in fields(kind)}
    hints = get_type_hints(kind)
    values: dict[str, Any] = {}
    for told, value in given.items():
        name = told.replace("-", "_")
        if name not in known:
            raise Error(
                f"{where}: unknown key {plain(told)}.{meant(name, known)}\nKnown are {', '.join(known)}."
            )
        values[name] = _checked(value, hints[name], known[name].metadata, f"{where}: {plain(told)}")
    if kind is Sample and not values.get("prompts"):
        raise Error(f"{where}: no prompts.\nGive a list of prompts of the subject.")
    return kind(**values)


def _checked(value: Any, hint: Any, metadata: Mapping[str, Any], where: str) -> Any:
    (item,) = get_args(hint) or (hint,)
    listed = hint is not item
    found = []
    for each in value if listed and isinstance(value, list) else [value]:
        each = float(each) if item is float and type(each) is int else each
        if type(each) is not item or (item is float and not math.isfinite(each)):
            raise Error(f"{where} is {plain(repr(each))}.\nGive a value of type {item.__name__}.")
        if item is str and not is_unicode(str(each)):
            raise Error(f"{where}: holds bytes that are not UTF-8.")
        if metadata["choices"] and each not in metadata["choices"]:
            names = ", ".join(name for name in metadata["choices"] if name)
            raise Error(f"{where} {plain(each)}: choose one of {names}.{meant(each, metadata['choices'])}")
        if metadata["least"] is not None and not each >= metadata["least"]:
            raise Error(f"{where} {each}: give at least {metadata['least']}.")
        if each not in found:
            found.append(each)
    if listed and isinstance(value, list) and not value:
        raise Error(f"{where} is an empty list.\nGive at least one value, or omit it.")
    return found if listed else found[0]
