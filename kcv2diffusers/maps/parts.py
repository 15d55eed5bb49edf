"""Parts and families, read from the weight maps.

A table (`weight_maps/NAME.toml`) describes one component of a pipeline and the parts it consists of. A family
(`weight_maps/families/NAME.toml`) lists the parts of a pipeline and its other files. This module does not
import NumPy, so that the command line can list the parts quickly.
"""

from __future__ import annotations

import os
import re
import tomllib
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from kcv2diffusers.errors import SourceError, reading

VARIABLE = "KCV2DIFFUSERS_MAPS"
"""The environment variable with a folder of additional tables and families."""


@dataclass(frozen=True)
class Part:
    """A Keras model that becomes a component of a pipeline, or a part of one.

    - `label`: its name in messages
    - `table`: the name of the table that describes it
    - `hint`: matches the names that people give its files and repositories
    - `rank`: hints are tried in ascending rank
    - `tolerances`: for verification, largest absolute difference / largest absolute value: `stock` for
      unmodified diffusers, `attributed` for diffusers with KerasCV's numerics, `block` for one block
    - `adapter`: the module of `verification.parts` that compares it
    """

    name: str
    label: str
    table: str
    hint: re.Pattern[str] | None
    rank: int
    tolerances: Mapping[str, float]
    adapter: str


@dataclass(frozen=True)
class Agreement:
    """Two sizes that must be equal in the parts of one model, as symbols of their weight maps."""

    part: str
    size: str
    other: str
    other_size: str


@dataclass(frozen=True)
class TokenizerFolder:
    """A tokenizer of a pipeline.

    - `name`: its folder
    - `part`: the part whose token embedding its ids index
    - `kind`: its class in transformers; that of CLIP is written from the vocabulary, others are copied
    - `also`: other folders that may hold it
    - `pad`: the padding token (None: the end-of-text token)
    """

    name: str
    part: str
    kind: str
    also: tuple[str, ...] = ()
    pad: str | None = None

    @property
    def copied(self) -> bool:
        """Whether the folder is copied."""
        return not self.kind.startswith("CLIPTokenizer")


@dataclass(frozen=True)
class Preset:
    """A preset of KerasHub.

    - `weights`: the name of its weight file
    - `model`: the template of its config.json
    - `attributes`: the attribute of the Keras model that is a part, by part
    """

    weights: str
    model: Mapping[str, Any]
    attributes: Mapping[str, str]

    @property
    def kind(self) -> str:
        """The class of the Keras model."""
        return str(self.model["class"]).split()[0].rpartition(":")[2]


@dataclass(frozen=True)
class LayerOrder:
    """An order of the layers of a KerasHub model.

    `parts` are the parts in a whole model. `rows` are, by part, the rows of its table in the order of the
    layers; a part that is not named has the order of its table.
    """

    parts: Sequence[str]
    rows: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Family:
    """A kind of pipeline.

    - `parts`: the parts in the order of messages; all but those in `optional` are required
    - `layer_orders`: the orders in which KerasHub may count the layers of a model; empty for none
    - `image_size`: default height and width in pixels
    - `index`: entries of model_index.json
    - `tokenizers`: the tokenizer folders; the placeholder tokens of textual inversion go into the first one
    - `scheduler_part`: the part whose noise schedule in training the scheduler config states; None if the
      pipeline has no scheduler folder
    - `scheduler`: the scheduler config of all models of the family; empty: that of each model
    - `version_of`: maps a part whose sizes may not determine its version to the part that determines it
    - `agreements`: sizes that must be equal in the parts of one model
    - `bases`: default sources of missing parts by version
    - `no_base`: a remark on each version that has no base
    - `modelspec`: metadata entries of a single file by version
    - `preset`: the preset of a Keras model that holds all parts; None if there is no such model
    - `library`: the Keras library whose models they are
    - `tags`: tags of its pipelines on the Hub
    - `references`: the Keras sides that a verification can compare with; the first one is the default
    """

    name: str
    label: str
    parts: tuple[str, ...]
    image_size: int
    index: Mapping[str, Any]
    optional: tuple[str, ...] = ()
    tokenizers: tuple[TokenizerFolder, ...] = ()
    scheduler_part: str | None = None
    scheduler: Mapping[str, Any] = field(default_factory=dict)
    version_of: Mapping[str, str] = field(default_factory=dict)
    agreements: tuple[Agreement, ...] = ()
    bases: Mapping[str, str] = field(default_factory=dict)
    no_base: Mapping[str, str] = field(default_factory=dict)
    modelspec: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    preset: Preset | None = None
    layer_orders: tuple[LayerOrder, ...] = ()
    library: str = "KerasCV"
    tags: tuple[str, ...] = ()
    references: tuple[str, ...] = ("builtin", "keras-cv")

    @property
    def tokenizer_part(self) -> str | None:
        """The part of the first tokenizer; None if the pipeline has none."""
        return self.tokenizers[0].part if self.tokenizers else None


def folders() -> list[Path]:
    """The folders with tables: that of the package (in a checkout: beside it), then the user's folder."""
    package = Path(__file__).parents[1]
    inside = package / "weight_maps"
    ours = inside if inside.is_dir() else package.parent / "weight_maps"
    more = os.environ.get(VARIABLE)
    return [ours, *([Path(more)] if more else [])]


@cache
def table_data() -> dict[str, dict[str, Any]]:
    """The TOML data of each table by name: the shipped ones in alphabetical order, then the user's.

    A table that is `like` another one has what that table has, except for its own entries and sections.
    Raises SourceError for a file that is not TOML, or for an unknown table in `like`.
    """
    found = _read("*.toml")
    for name, data in found.items():
        if (other := data.get("like")) is not None:
            if other == name or "like" in found.get(other, {"like": other}):
                raise invalid(f"{name}.toml", ValueError(f"there is no table {other} that it could be like"))
            found[name] = found[other] | data
    return found


@cache
def naming_data() -> dict[str, dict[str, Any]]:
    """The TOML data of each naming of the original layout by name, in the same order; see `table_data`."""
    return _read("original/*.toml")


@cache
def parts() -> dict[str, Part]:
    """Every part by name: in the order of the families, then the parts without a family.

    Raises SourceError for an invalid table or family.
    """
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
    """The label of a part for messages; an unknown name is returned unchanged."""
    known = parts().get(part)
    return known.label if known else part


@cache
def families() -> tuple[Family, ...]:
    """Every family: the shipped ones, then the user's. Raises SourceError for an invalid one."""
    found = []
    for name, data in _read("families/*.toml").items():
        try:
            found.append(_family(name, data))
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise invalid(f"families/{name}.toml", error) from error
    return tuple(found)


def family_of(held: Iterable[str]) -> Family:
    """The family that has most of the parts `held`, by name."""
    given = set(held)
    return max(families(), key=lambda family: len(given & set(family.parts)))


def family_named(pipeline_class: str) -> Family | None:
    """The family whose pipelines have the diffusers class `pipeline_class`; None if there is none."""
    return next((family for family in families() if family.index["_class_name"] == pipeline_class), None)


def invalid(file: str | Path, error: Exception) -> SourceError:
    """The SourceError for a table or family with a missing or invalid entry."""
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
        adapter=data.get("adapter", name),
    )


def _family(name: str, data: Mapping[str, Any]) -> Family:
    # diffusers writes [null, null] for an omitted component. TOML has no null, so tables have ["", ""].
    index = {key: [None, None] if value == ["", ""] else value for key, value in data["index"].items()}
    return Family(
        name=name,
        label=data["label"],
        parts=tuple(data["parts"]),
        image_size=data["image_size"],
        index=index,
        optional=tuple(data.get("optional", ())),
        tokenizers=tuple(
            TokenizerFolder(
                folder, entry["part"], entry["class"], tuple(entry.get("also", ())), entry.get("pad")
            )
            for folder, entry in data.get("tokenizers", {}).items()
        ),
        scheduler_part=data.get("scheduler", {}).get("part"),
        scheduler=data.get("scheduler", {}).get("config", {}),
        version_of=data.get("version_of", {}),
        agreements=tuple(Agreement(*entry) for entry in data.get("same", {}).get("sizes", ())),
        bases=data.get("bases", {}),
        no_base=data.get("no_base", {}),
        modelspec=data.get("modelspec", {}),
        preset=Preset(**data["preset"]) if "preset" in data else None,
        layer_orders=tuple(LayerOrder(**entry) for entry in data.get("layer_orders", ())),
        library=data.get("library", Family.library),
        tags=tuple(data.get("tags", ())),
        references=tuple(data.get("references", Family.references)),
    )
