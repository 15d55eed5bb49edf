"""Parts and families: what models are made of, as the weight maps describe them.

A table (`weight_maps/NAME.toml`) describes one component of a pipeline and the parts it is made of. A family
(`weight_maps/families/NAME.toml`) says which parts make a pipeline and what stands around them. Nothing here
needs NumPy, so that the command line can ask which parts there are.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from kcv2diffusers.errors import SourceError, reading

VARIABLE = "KCV2DIFFUSERS_MAPS"
"""The environment variable that names a folder of more tables and families."""


@dataclass(frozen=True)
class Part:
    """A Keras model that becomes (a part of) a component of a pipeline.

    `label` is what messages call it. `hint` matches the names that people give its files and repositories;
    hints are tried by `rank`, lowest first. `tolerances` are those of verification: largest absolute
    difference / largest absolute value, for `stock` diffusers, `attributed` (with KerasCV's numerics) and one
    `block`.
    """

    name: str
    label: str
    table: str
    hint: re.Pattern[str] | None
    rank: int
    tolerances: Mapping[str, float]


@dataclass(frozen=True)
class Agreement:
    """Two sizes that are equal in parts of one model: the symbols of their weight maps."""

    part: str
    size: str
    other: str
    other_size: str


@dataclass(frozen=True)
class Family:
    """A kind of pipeline.

    `parts` are all required, in the order of messages. `index` are entries of model_index.json.
    `tokenizer_part` is the part whose token embedding the tokenizer's tokens index, `scheduler_part` the
    one whose training the scheduler config states (None: the pipeline has no such folder). `version_of`
    says of a part whose version is taken where its own sizes do not tell it. `bases` are default sources of
    missing parts by version, `no_base` a remark on versions without one, `modelspec` what the metadata of a
    single file say of a version. `image_size` is in pixels.
    """

    name: str
    label: str
    parts: tuple[str, ...]
    image_size: int
    index: Mapping[str, Any]
    tokenizer_part: str | None = None
    scheduler_part: str | None = None
    version_of: Mapping[str, str] = field(default_factory=dict)
    agreements: tuple[Agreement, ...] = ()
    bases: Mapping[str, str] = field(default_factory=dict)
    no_base: Mapping[str, str] = field(default_factory=dict)
    modelspec: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)


def folders() -> list[Path]:
    """Where tables are: inside the installed package or beside it in a checkout, then the user's folder."""
    package = Path(__file__).parents[1]
    inside = package / "weight_maps"
    ours = inside if inside.is_dir() else package.parent / "weight_maps"
    more = os.environ.get(VARIABLE)
    return [ours, *([Path(more)] if more else [])]


@cache
def table_data() -> dict[str, dict[str, Any]]:
    """The TOML of each table by name: ours in alphabetical order, then the user's. Raises SourceError for a
    file that is no TOML.
    """
    return _read("*.toml")


@cache
def naming_data() -> dict[str, dict[str, Any]]:
    """The TOML of each naming of the original layout, as `table_data` has that of each table."""
    return _read("original/*.toml")


@cache
def parts() -> dict[str, Part]:
    """Every part by name: in the order of the families, then any that is in no family."""
    found: dict[str, Part] = {}
    for table, data in table_data().items():
        try:
            found |= {name: _part(name, table, entry) for name, entry in data["parts"].items()}
        except (KeyError, TypeError, AttributeError, re.error) as error:
            raise invalid(f"{table}.toml", error) from error
    order = dict.fromkeys([*(part for family in families() for part in family.parts), *found])
    if unknown := order.keys() - found.keys():
        raise invalid("families", ValueError(f"no table has the part {min(unknown)}"))
    return {name: found[name] for name in order}


def label(part: str) -> str:
    """What messages call a part; a name that is no part's stays as it is."""
    known = parts().get(part)
    return known.label if known else part


@cache
def families() -> tuple[Family, ...]:
    """Every family: ours, then the user's."""
    found = []
    for name, data in _read("families/*.toml").items():
        try:
            found.append(_family(name, data))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise invalid(f"families/{name}.toml", error) from error
    return tuple(found)


def family_of(held: Iterable[str]) -> Family:
    """The family that has all of these parts; the one that has most of them where none has all."""
    given = set(held)
    return max(families(), key=lambda family: len(given & set(family.parts)))


def family_named(pipeline_class: str) -> Family | None:
    """The family whose pipelines are of a class of diffusers, None if there is none."""
    return next((family for family in families() if family.index["_class_name"] == pipeline_class), None)


def invalid(file: str | Path, error: Exception) -> SourceError:
    """The refusal of a table or a family that lacks an entry or has one of another form."""
    problem = f"has no entry {error}" if isinstance(error, KeyError) else str(error)
    return SourceError(file, f"not a weight map: {problem}.", "Correct it; docs/develop/add-a-component.md.")


def _read(pattern: str) -> dict[str, dict[str, Any]]:
    found: dict[str, dict[str, Any]] = {}
    for folder in folders():
        with reading(folder):
            for path in sorted(folder.glob(pattern)):
                try:
                    found[path.stem] = tomllib.loads(path.read_text(encoding="utf-8"))
                except ValueError as error:
                    raise invalid(path, error) from None
    return found


def _part(name: str, table: str, data: Mapping[str, Any]) -> Part:
    hint = data.get("hint", {})
    return Part(
        name=name,
        label=data.get("label", name),
        table=table,
        hint=re.compile(hint["pattern"], re.I) if hint else None,
        rank=hint.get("rank", 0),
        tolerances=data.get("tolerances", {}),
    )


def _family(name: str, data: Mapping[str, Any]) -> Family:
    # TOML has no null, which diffusers writes for a component that is left out.
    index = {key: [None, None] if value == ["", ""] else value for key, value in data["index"].items()}
    return Family(
        name=name,
        label=data["label"],
        parts=tuple(data["parts"]),
        image_size=data["image_size"],
        index=index,
        tokenizer_part=data.get("tokenizer", {}).get("part"),
        scheduler_part=data.get("scheduler", {}).get("part"),
        version_of=data.get("version_of", {}),
        agreements=tuple(Agreement(*entry) for entry in data.get("same", {}).get("sizes", ())),
        bases=data.get("bases", {}),
        no_base=data.get("no_base", {}),
        modelspec=data.get("modelspec", {}),
    )
