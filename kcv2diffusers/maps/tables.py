"""The weight maps: TOML tables expanded into slots, one for each pair of a Keras and a diffusers tensor.

The rows of a table map each KerasCV layer, in model order, to its diffusers module. The blocks give the
name and layout of each variable inside a layer. Shapes are written in symbols (c0, width, ...), which are
solved from the checkpoint, so that one table serves every width. Expanding a table for a part and a version
gives `Slot`s. The same slots are used for Keras -> diffusers and diffusers -> Keras.

Keras may store several diffusers tensors as one variable, side by side along its last axis, or the pieces of
a tensor in another order. Then a slot is the share of the variable (`Slot.columns`) that is a tensor or a
share of its first axis (`Slot.rows`).
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from kcv2diffusers.maps.layouts import Variable
from kcv2diffusers.maps.leaves import Condition, Leaf, Piece, Share
from kcv2diffusers.maps.parts import Family, family_of, invalid, table_data
from kcv2diffusers.maps.sizes import Size, solved

REPEAT = "repeat"
_LAYERS = "layers"


@dataclass(frozen=True, eq=False)
class Slot:
    """One tensor on both sides, or a piece of one.

    On the Keras side:

    - `group`: the name of the group of layers in a `.weights.h5` file, "layers" or ""
    - `layer`, `ordinal`: the outer layer is number `ordinal` (from 0) of the class `layer`
    - `path`: the inner layer within it; `attribute` is the same path as TensorFlow spells it
    - `stem`, `rank`: the inner layer is number `rank` (from 0) of the class `stem` within the outer layer
    - `index`: the variable's number in the inner layer; `variable.name` is its name
    - `shape`: the Keras shape of the variable in symbols
    - `columns`: the slot's share of its last axis; None: all

    On the diffusers side `target` is the name, `diffusers_shape` the shape in symbols, and `rows` the slot's
    share of the first axis (None: all). The tensor exists if the sizes of each of `conditions` differ, and if
    each of `flags` has the given value.
    """

    group: str
    layer: str
    ordinal: int
    path: str
    attribute: str
    stem: str
    rank: int
    index: int
    variable: Variable
    target: str
    shape: tuple[Size, ...]
    diffusers_shape: tuple[Size, ...]
    conditions: tuple[Condition, ...] = ()
    flags: tuple[tuple[str, bool], ...] = ()
    columns: Share | None = None
    rows: Share | None = None

    @property
    def keras_name(self) -> str:
        """The variable's path in a .weights.h5 file of Keras 3."""
        number = f"_{self.ordinal}" if self.ordinal else ""
        inner = f"{self.path}/" if self.path else ""
        outer = f"{self.group}/" if self.group else ""
        return f"{outer}{self.layer}{number}/{inner}vars/{self.index}"

    def has(self, flags: Mapping[str, int]) -> bool:
        """Whether a block with these flags (0 or 1 by name) has the tensor."""
        return all(bool(flags.get(name)) == wanted for name, wanted in self.flags)

    def exists(self, dims: Mapping[str, int]) -> bool:
        """Whether a model with the sizes and flags `dims` has the tensor."""
        return self.has(dims) and all(
            left.value(dims) != right.value(dims) for left, right in self.conditions
        )

    def whole_shape(self, dims: Mapping[str, int]) -> tuple[int, ...]:
        """The shape of the Keras variable. Raises ValueError for a size that `dims` does not determine."""
        shape = [size.value(dims) for size in self.shape]
        if None in shape:
            raise ValueError(f"{self.shape[shape.index(None)]} of {self.target} is unknown")
        return tuple(size or 0 for size in shape)

    def part_shape(self, dims: Mapping[str, int], *, keras: bool) -> tuple[int, ...]:
        """The shape of the slot's share of the tensor on one side; 0 for a size that `dims` lacks."""
        whole = [size.value(dims) or 0 for size in (self.shape if keras else self.diffusers_shape)]
        share = self.columns if keras else self.rows
        if share is not None:
            whole[-1 if keras else 0] = share.count.value(dims) or 0
        return tuple(whole)


@dataclass(frozen=True)
class Row:
    """A Keras layer, in model order, and its diffusers module; {i} in the module marks a repeated layer.

    `block` is the name of its leaves. `layer` is its class in snake case, with the name of the list that it
    is in ("blocks/res_net_block"), or, if `fixed`, its own name.
    """

    block: str
    layer: str
    fixed: bool
    module: str
    sizes: tuple[Size, ...]

    @classmethod
    def parse(cls, layer: str, module: str, sizes: str) -> Row:
        """Parse an entry of `rows`."""
        kind, _, name = layer.partition("@")
        found = tuple(Size.parse(size) for size in sizes.split())
        return cls(kind.rpartition("/")[2], name or kind, bool(name), module, found)

    @property
    def repeated(self) -> bool:
        """Whether the row stands for as many layers as the checkpoint has."""
        return "{i}" in self.module


@dataclass(frozen=True)
class Version:
    """One version of a model, such as SD1: the sizes that identify its checkpoints, and its config entries.

    `blocks` are the numbers of the blocks with each property that leaves are tagged with.
    """

    name: str
    dims: Mapping[str, int]
    config: Mapping[str, Any]
    blocks: Mapping[str, Sequence[int]] = field(default_factory=dict)


@dataclass(frozen=True)
class Entries:
    """Properties of the entries of a component's config.json.

    - `heads`: the entry with the number of attention heads, which no shape determines
    - `head_widths`: the symbols of the widths that the number of heads divides
    - `untold`: other entries that no shape determines
    - `structure`: entries that are not sizes but determine the tensors of the model
    - `choices`: entries with a size that may differ from the table's
    """

    heads: str | None = None
    head_widths: tuple[str, ...] = ()
    untold: frozenset[str] = frozenset()
    structure: frozenset[str] = frozenset()
    choices: frozenset[str] = frozenset()


@dataclass(frozen=True)
class Ancestor:
    """The model of stable-diffusion-tensorflow, KerasCV's ancestor, that has the same variables as a part.

    It is one layer of a Keras model; `layer` is its class in snake case. Its variables are in the order of
    its attributes: that of the part's rows, but for the diffusers modules in `first`, which come first.
    """

    layer: str
    first: tuple[str, ...] = ()


@dataclass(frozen=True, eq=False)
class Table:
    """One component of a diffusers pipeline.

    - `folder`: its folder in a pipeline
    - `weights`: the weight file in that folder
    - `diffusers`: its class as "library.Class"
    - `parts`: the rows of each Keras model that it consists of
    - `keras`: the Keras class of each part by version
    - `places`: the group that holds a part in the `.weights.h5` file of a whole model, "" if it has none
    - `groups`: the group inside it that holds the layers of a part
    - `ancestors`: the ancestor of each part that has one
    - `blocks`: the parameters and leaves of each kind of layer
    - `config`: the entries of config.json
    - `entries`: properties of these entries
    - `nominal`: sizes of the released models that are not used to identify a version
    - `aliases`: other spellings of diffusers' names, which are read but not written
    - `names`: other names of Keras layers, which are read but not written
    - `equal`: products of symbols that are equal to a symbol
    - `stated`: symbols whose values config.json states, and the names of its entries
    - `preset`: entries of config.json, and their names in the config.json of a KerasHub preset
    - `numerics`: what the Keras model computes otherwise, by name: an attribute of torch modules and its
      value
    """

    name: str
    folder: str
    weights: str
    diffusers: str
    versions: Mapping[str, Version]
    parts: Mapping[str, tuple[Row, ...]]
    keras: Mapping[str, Mapping[str, str]]
    blocks: Mapping[str, tuple[tuple[str, ...], tuple[Leaf, ...]]]
    config: Mapping[str, Any]
    entries: Entries
    places: Mapping[str, str] = field(default_factory=dict)
    groups: Mapping[str, str] = field(default_factory=dict)
    ancestors: Mapping[str, Ancestor] = field(default_factory=dict)
    nominal: Mapping[str, int] = field(default_factory=dict)
    aliases: Mapping[str, Any] = field(default_factory=dict)
    names: Mapping[str, str] = field(default_factory=dict)
    equal: Mapping[str, str] = field(default_factory=dict)
    stated: Mapping[str, str] = field(default_factory=dict)
    preset: Mapping[str, str] = field(default_factory=dict)
    numerics: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)

    @property
    def known_entries(self) -> frozenset[str]:
        """Every entry of config.json that the table has, in any version."""
        return frozenset([*self.config, *(name for v in self.versions.values() for name in v.config)])

    @property
    def untold(self) -> frozenset[str]:
        """The entries of config.json that the shapes of the weights do not determine."""
        return self.entries.untold.union(*(version.config for version in self.versions.values()))

    def leaves(self, layer: str, version: str) -> tuple[Leaf, ...]:
        """The layers inside a block in a version."""
        return tuple(
            leaf for leaf in self.blocks[layer][1] if leaf.versions is None or version in leaf.versions
        )

    @cached_property
    def flags(self) -> frozenset[str]:
        """The names of the properties that some blocks of a repeated row have and others have not."""
        leaves = (leaf for _, leaves in self.blocks.values() for leaf in leaves)
        return frozenset(name for leaf in leaves for name, _ in leaf.flags)

    def rename(self, name: str) -> str | None:
        """Resolve aliases in the name of a diffusers tensor; None for a tensor that carries no weight."""
        if name in self.aliases.get("ignore", ()):
            return None
        for old, new in self.aliases.get("prefix", {}).items():
            if name.startswith(old):
                return str(new) + name[len(old) :]
        for old, new in self.aliases.get("part", {}).items():
            name = name.replace(old, new)
        return name


@dataclass(frozen=True)
class Spec:
    """One part in one version: the tensors that a source has to contain."""

    part: str
    version: str
    table: Table

    @property
    def rows(self) -> tuple[Row, ...]:
        """The part's rows, in the order of the Keras model's layers."""
        return self.table.parts[self.part]

    @property
    def keras_class(self) -> str:
        """The KerasCV class of the model."""
        return self.table.keras[self.part][self.version]

    @property
    def nominal(self) -> dict[str, int]:
        """The sizes and flags of the released model of this version."""
        version = self.table.versions[self.version]
        flags = {
            flag(name, i): int(i in version.blocks.get(name, ()))
            for name in self.table.flags
            for i in range(version.dims.get(REPEAT, 0))
        }
        return solved({**self.table.nominal, **version.dims}, self.table.equal) | flags

    @property
    def place(self) -> str:
        """The group that holds the part in the `.weights.h5` file of a whole model, "" if it has none."""
        return self.table.places.get(self.part, "")

    def existing(self, dims: Mapping[str, int]) -> list[Slot]:
        """The slots of a model with the sizes `dims`."""
        return [slot for slot in self.slots(dims.get(REPEAT, 0)) if slot.exists(dims)]

    @cached_property
    def repeated_layer(self) -> str | None:
        return next((row.layer for row in self.rows if row.repeated), None)

    def block(
        self, row: Row, ordinal: int, repeat: int | None = None, count: int | None = None
    ) -> list[Slot]:
        """The slots of one layer: `ordinal` is its number in its class, `repeat` that in a repeated row.

        `count` is the number of layers of the repeated row (None: unknown).
        """
        params, _ = self.table.blocks[row.block]
        bound = dict(zip(params, row.sizes, strict=True))
        module = row.module.replace("{i}", str(repeat))
        slots, ranks = [], dict[str, int]()
        for leaf in self.table.leaves(row.block, self.version):
            if not leaf.stands(repeat, count):
                continue
            rank = ranks.get(leaf.layout.layer, 0)
            ranks[leaf.layout.layer] = rank + 1
            *names, last = leaf.layout.sizes
            sizes = dict(zip(names, leaf.sizes, strict=True)) | {last: _sum(p.size for p in leaf.pieces)}
            sizes = {name: size.substitute(bound) for name, size in sizes.items()}
            for index, variable in enumerate(leaf.layout.variables):
                for number, piece in enumerate(leaf.pieces):
                    mine = [other for other in leaf.pieces if other.module == piece.module]
                    whole = _sum(other.size for other in mine).substitute(bound)
                    inner = sizes | {last: whole}
                    slots.append(
                        Slot(
                            group=self.table.groups.get(self.part, _LAYERS),
                            layer=row.layer,
                            ordinal=ordinal,
                            path=leaf.path,
                            attribute=leaf.attribute,
                            stem=leaf.layout.layer,
                            rank=rank,
                            index=index,
                            variable=variable,
                            target=".".join(p for p in (module, piece.module, variable.suffix) if p),
                            shape=tuple(Size.parse(s).substitute(sizes) for s in variable.keras),
                            diffusers_shape=tuple(
                                Size.parse(s).substitute(inner) for s in variable.diffusers
                            ),
                            conditions=tuple(
                                (left.substitute(bound), right.substitute(bound))
                                for left, right in leaf.conditions
                            ),
                            flags=tuple((flag(name, repeat), wanted) for name, wanted in leaf.flags),
                            columns=_share(leaf.pieces[:number], piece, bound) if leaf.pieces[1:] else None,
                            rows=_share([p for p in mine if p.order < piece.order], piece, bound)
                            if mine[1:]
                            else None,
                        )
                    )
        return slots

    @cache  # noqa: B019  (specs live as long as the process)
    def slots(self, repeat: int) -> tuple[Slot, ...]:
        """All slots in Keras' weight order, with repeated rows expanded `repeat` times."""
        return tuple(slot for layer in self.layers(repeat) for slot in self.block(*layer, repeat))

    def ancestral(self, repeat: int) -> list[Slot]:
        """All slots in the order of the part's ancestor, with repeated rows expanded `repeat` times."""
        first = tuple(f"{module}." for module in self.table.ancestors[self.part].first)
        return sorted(self.slots(repeat), key=lambda slot: not slot.target.startswith(first))

    def layers(self, repeat: int) -> Iterator[tuple[Row, int, int | None]]:
        """Each layer in Keras' order: its row, its number within its class, and its repetition.

        The repetition is 0 to `repeat` - 1 for a repeated row and None for any other.
        """
        ordinals: dict[str, int] = {}
        for row in self.rows:
            for i in range(repeat) if row.repeated else (None,):
                ordinal = 0 if row.fixed else ordinals.get(row.layer, 0)
                ordinals[row.layer] = ordinal + 1
                yield row, ordinal, i


def flag(name: str, repeat: int | None) -> str:
    """The flag that says whether block number `repeat` has the property `name`."""
    return f"{name}.{repeat}"


def _sum(sizes: Iterable[Size]) -> Size:
    first, *rest = sizes
    for size in rest:
        first += size
    return first


def _share(before: Sequence[Piece], piece: Piece, bound: Mapping[str, Size]) -> Share:
    first = _sum(p.size for p in before).substitute(bound) if before else Size(())
    return Share(first, piece.size.substitute(bound))


def _load(name: str, data: Mapping[str, Any]) -> Table:
    return Table(
        name=name,
        folder=data["folder"],
        weights=data["weights"],
        diffusers=data["diffusers"],
        versions={
            n: Version(n, v["dims"], v["config"], v.get("blocks", {})) for n, v in data["versions"].items()
        },
        parts={
            part: tuple(Row.parse(*row) for row in entry["rows"]) for part, entry in data["parts"].items()
        },
        keras={part: entry["keras"] for part, entry in data["parts"].items()},
        places={part: entry.get("within", "") for part, entry in data["parts"].items()},
        groups={part: entry.get("group", _LAYERS) for part, entry in data["parts"].items()},
        ancestors={
            part: Ancestor(entry["ancestor"]["layer"], tuple(entry["ancestor"].get("first", ())))
            for part, entry in data["parts"].items()
            if "ancestor" in entry
        },
        blocks={
            name: (
                tuple(block["params"]),
                tuple(
                    Leaf.parse(entry, block.get("lists", {}), data["versions"]) for entry in block["leaves"]
                ),
            )
            for name, block in data["blocks"].items()
        },
        config=data["config"],
        entries=_entries(data.get("entries", {})),
        nominal=data.get("nominal", {}),
        aliases=data.get("aliases", {}),
        names=data.get("names", {}),
        equal=data.get("equal", {}),
        stated=data.get("stated", {}),
        preset=data.get("preset", {}),
        numerics=data.get("numerics", {}),
    )


def _entries(data: Mapping[str, Any]) -> Entries:
    return Entries(
        heads=data.get("heads"),
        head_widths=tuple(data.get("head_widths", ())),
        **{name: frozenset(data.get(name, ())) for name in ("untold", "structure", "choices")},
    )


@cache
def tables() -> dict[str, Table]:
    """Every table by name. Raises SourceError for an invalid one."""
    found = {}
    for name, data in table_data().items():
        try:
            found[name] = _load(name, data)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise invalid(f"{name}.toml", error) from error
    return found


def tables_of(family: Family) -> list[Table]:
    """The tables of the components of a family's pipelines."""
    return [table for table in tables().values() if set(table.parts) & set(family.parts)]


def served_versions(table: Table) -> list[str]:
    """The versions that a table is for, in capitals; without versions of its own, those of its family."""
    several = [table] if "any" not in table.versions else tables_of(family_of(table.parts))
    return list(dict.fromkeys(name.upper() for each in several for name in each.versions if name != "any"))


@cache
def specs() -> tuple[Spec, ...]:
    """Every part in every version."""
    return tuple(
        Spec(part, version, table)
        for table in tables().values()
        for part in table.parts
        for version in table.versions
    )


@cache
def layer_classes() -> frozenset[str]:
    """The classes of all layers that have a row in some table, in snake case."""
    return frozenset(row.layer for spec in specs() for row in spec.rows)


@cache
def ancestors() -> dict[str, str]:
    """The part of each class of an ancestor's model, in snake case."""
    found = (table.ancestors.items() for table in tables().values())
    return {ancestor.layer: part for items in found for part, ancestor in items}


@cache
def open_places() -> dict[str, frozenset[str]]:
    """The places of parts whose layers are in no group, and the names of their lists of layers."""
    return {
        spec.place: frozenset(row.layer.partition("/")[0] for row in spec.rows if "/" in row.layer)
        for spec in specs()
        if spec.place and not spec.table.groups[spec.part]
    }


def table_of(part: str) -> Table:
    """The table of the component that a part belongs to."""
    return next(table for table in tables().values() if part in table.parts)


def spec(part: str, version: str) -> Spec:
    """The spec of a part in a version; a table's version "any" matches every version."""
    return next(s for s in specs() if s.part == part and s.version in (version, "any"))
