"""The weight maps: TOML tables expanded into slots, one for each pair of a Keras and a diffusers tensor.

The rows of a table map each KerasCV layer, in model order, to its diffusers module. The blocks give the
name and layout of each variable inside a layer. Shapes are written in symbols (c0, width, ...), which are
solved from the checkpoint, so that one table serves every width. Expanding a table for a part and a version
gives `Slot`s. The same slots are used for Keras -> diffusers and diffusers -> Keras.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from functools import cache, cached_property
from typing import Any

from kcv2diffusers.maps.layouts import LAYOUTS, Layout, Variable
from kcv2diffusers.maps.parts import Family, invalid, table_data

REPEAT = "repeat"
Condition = tuple["Size", "Size"]


@dataclass(frozen=True, slots=True)
class Size:
    """A sum of symbols with integer factors, such as 4*c0 or c3+c2; the symbol "" stands for the number 1."""

    terms: tuple[tuple[str, int], ...]

    @classmethod
    @cache
    def parse(cls, text: str) -> Size:
        """Parse a size such as "4*c0" or "c3+c2". Raises ValueError for anything else."""
        terms: dict[str, int] = {}
        for term in text.split("+"):
            *factor, last = term.split("*")
            count = int(factor[0]) if factor else 1
            if last.isdigit():
                count, last = count * int(last), ""
            elif not last.isidentifier():
                raise ValueError(f"not a size: {text!r}")
            terms[last] = terms.get(last, 0) + count
        return cls(tuple(sorted(terms.items())))

    def substitute(self, values: Mapping[str, Size]) -> Size:
        """The size with symbols replaced by sizes."""
        if len(self.terms) == 1 and self.terms[0][1] == 1:  # most sizes are one symbol
            return values.get(self.terms[0][0], self)
        terms: dict[str, int] = {}
        for symbol, count in self.terms:
            inner = values[symbol].terms if symbol in values else ((symbol, 1),)
            for name, factor in inner:
                terms[name] = terms.get(name, 0) + count * factor
        return Size(tuple(sorted(terms.items())))

    def value(self, dims: Mapping[str, int]) -> int | None:
        """The value for the symbols in `dims`, or None if one of its symbols is not among them."""
        total = 0
        for symbol, count in self.terms:
            if symbol and symbol not in dims:
                return None
            total += count * (dims[symbol] if symbol else 1)
        return total

    def solve(self, value: int) -> tuple[str, int] | None:
        """The symbol and its value, given the value of the size.

        None unless the size is one symbol with a factor that divides `value`.
        """
        if len(self.terms) == 1:
            symbol, count = self.terms[0]
            if symbol and value % count == 0:
                return symbol, value // count
        return None

    def __str__(self) -> str:
        return "+".join(
            (f"{count}*{symbol}" if count > 1 else symbol) if symbol else str(count)
            for symbol, count in self.terms
        )


@dataclass(frozen=True, slots=True)
class Leaf:
    """One layer inside a block: its path in Keras and its module in diffusers, both relative to the block.

    It exists only in `version` (None: in all) and only if the two sizes of `condition` differ (None: always).
    """

    path: str
    attribute: str
    module: str
    layout: Layout
    sizes: tuple[Size, ...]
    condition: Condition | None
    version: str | None


@dataclass(frozen=True, eq=False)
class Slot:
    """One tensor on both sides.

    On the Keras side:

    - `layer`, `ordinal`: the outer layer is number `ordinal` (from 0) of the class `layer`
    - `path`: the inner layer within it; `attribute` is the same path as TensorFlow spells it
    - `stem`, `rank`: the inner layer is number `rank` (from 0) of the class `stem` within the outer layer
    - `index`: the variable's number in the inner layer; `variable.name` is its name
    - `shape`: the Keras shape in symbols

    On the diffusers side `target` is the name and `diffusers_shape` the shape in symbols. The tensor exists
    if the two sizes of `condition` differ, or if there is no condition.
    """

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
    condition: Condition | None

    @property
    def keras_name(self) -> str:
        """The variable's path in a .weights.h5 file of Keras 3."""
        number = f"_{self.ordinal}" if self.ordinal else ""
        inner = f"{self.path}/" if self.path else ""
        return f"layers/{self.layer}{number}/{inner}vars/{self.index}"

    def exists(self, dims: Mapping[str, int]) -> bool:
        """Whether a model with the sizes `dims` has the tensor."""
        if self.condition is None:
            return True
        left, right = (size.value(dims) for size in self.condition)
        return left != right


@dataclass(frozen=True)
class Row:
    """A KerasCV layer, in model order, and its diffusers module; {i} in the module marks a repeated layer."""

    layer: str
    module: str
    sizes: tuple[Size, ...]

    @property
    def repeated(self) -> bool:
        """Whether the row stands for as many layers as the checkpoint has."""
        return "{i}" in self.module


@dataclass(frozen=True)
class Version:
    """Stable Diffusion 1 or 2: the sizes that identify its checkpoints, and its config entries."""

    name: str
    dims: Mapping[str, int]
    config: Mapping[str, Any]


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


@dataclass(frozen=True, eq=False)
class Table:
    """One component of a diffusers pipeline.

    - `folder`: its folder in a pipeline
    - `weights`: the weight file in that folder
    - `diffusers`: its class as "library.Class"
    - `parts`: the rows of each Keras model that it consists of
    - `keras`: the KerasCV class of each part by version
    - `blocks`: the parameters and leaves of each kind of layer
    - `config`: the entries of config.json
    - `entries`: properties of these entries
    - `nominal`: sizes of the released models that are not used to identify a version
    - `aliases`: other spellings of diffusers' names, which are read but not written
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
    nominal: Mapping[str, int] = field(default_factory=dict)
    aliases: Mapping[str, Any] = field(default_factory=dict)

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
        return tuple(leaf for leaf in self.blocks[layer][1] if leaf.version in (None, version))

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
        """The sizes of the released model of this version."""
        return {**self.table.nominal, **self.table.versions[self.version].dims}

    def existing(self, dims: Mapping[str, int]) -> list[Slot]:
        """The slots of a model with the sizes `dims`."""
        return [slot for slot in self.slots(dims.get(REPEAT, 0)) if slot.exists(dims)]

    @cached_property
    def repeated_layer(self) -> str | None:
        return next((row.layer for row in self.rows if row.repeated), None)

    def block(self, row: Row, ordinal: int, repeat: int | None = None) -> list[Slot]:
        """The slots of one layer: `ordinal` is its number in its class, `repeat` that in a repeated row."""
        params, _ = self.table.blocks[row.layer]
        bound = dict(zip(params, row.sizes, strict=True))
        module = row.module.replace("{i}", str(repeat))
        slots, ranks = [], dict[str, int]()
        for leaf in self.table.leaves(row.layer, self.version):
            rank = ranks.get(leaf.layout.layer, 0)
            ranks[leaf.layout.layer] = rank + 1
            sizes = {
                name: size.substitute(bound) for name, size in zip(leaf.layout.sizes, leaf.sizes, strict=True)
            }
            condition = leaf.condition and (
                leaf.condition[0].substitute(bound),
                leaf.condition[1].substitute(bound),
            )
            for index, variable in enumerate(leaf.layout.variables):
                slots.append(
                    Slot(
                        layer=row.layer,
                        ordinal=ordinal,
                        path=leaf.path,
                        attribute=leaf.attribute,
                        stem=leaf.layout.layer,
                        rank=rank,
                        index=index,
                        variable=variable,
                        target=".".join(p for p in (module, leaf.module, variable.suffix) if p),
                        shape=tuple(Size.parse(s).substitute(sizes) for s in variable.keras),
                        diffusers_shape=tuple(Size.parse(s).substitute(sizes) for s in variable.diffusers),
                        condition=condition,
                    )
                )
        return slots

    @cache  # noqa: B019  (specs live as long as the process)
    def slots(self, repeat: int) -> tuple[Slot, ...]:
        """All slots in Keras' weight order, with repeated rows expanded `repeat` times."""
        return tuple(slot for layer in self.layers(repeat) for slot in self.block(*layer))

    def layers(self, repeat: int) -> Iterator[tuple[Row, int, int | None]]:
        """Each layer in Keras' order: its row, its number within its class, and its repetition.

        The repetition is 0 to `repeat` - 1 for a repeated row and None for any other.
        """
        ordinals: dict[str, int] = {}
        for row in self.rows:
            for i in range(repeat) if row.repeated else (None,):
                ordinal = ordinals.get(row.layer, 0)
                ordinals[row.layer] = ordinal + 1
                yield row, ordinal, i


def _leaf(entry: list[str], lists: Mapping[str, list[str]]) -> Leaf:
    path, module, layout, sizes, *tag = entry
    version, condition = (tag[0] if tag else None), None
    if version and version.startswith("if "):
        left, right = version.removeprefix("if ").split(" != ")
        version, condition = None, (Size.parse(left), Size.parse(right))
    return Leaf(
        path=path,
        attribute=_attribute(path, lists),
        module=module,
        layout=LAYOUTS[layout],
        sizes=tuple(Size.parse(s) for s in sizes.split()),
        condition=condition,
        version=version,
    )


def _attribute(path: str, lists: Mapping[str, list[str]]) -> str:
    """Number list items as TensorFlow does: entry_flow/padded_conv2d/conv2d -> entry_flow/2/conv2d."""
    first, *rest = path.split("/")
    if first in lists:
        rest[0] = str(lists[first].index(rest[0]))
    return "/".join([first, *rest])


def _load(name: str, data: Mapping[str, Any]) -> Table:
    return Table(
        name=name,
        folder=data["folder"],
        weights=data["weights"],
        diffusers=data["diffusers"],
        versions={n: Version(n, v["dims"], v["config"]) for n, v in data["versions"].items()},
        parts={
            part: tuple(
                Row(layer, module, tuple(Size.parse(s) for s in sizes.split()))
                for layer, module, sizes in entry["rows"]
            )
            for part, entry in data["parts"].items()
        },
        keras={part: entry["keras"] for part, entry in data["parts"].items()},
        blocks={
            name: (
                tuple(block["params"]),
                tuple(_leaf(entry, block.get("lists", {})) for entry in block["leaves"]),
            )
            for name, block in data["blocks"].items()
        },
        config=data["config"],
        entries=_entries(data.get("entries", {})),
        nominal=data.get("nominal", {}),
        aliases=data.get("aliases", {}),
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


def table_of(part: str) -> Table:
    """The table of the component that a part belongs to."""
    return next(table for table in tables().values() if part in table.parts)


def spec(part: str, version: str) -> Spec:
    """The spec of a part in a version; a table's version "any" matches every version."""
    return next(s for s in specs() if s.part == part and s.version in (version, "any"))
