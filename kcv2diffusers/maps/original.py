"""Stable Diffusion's original layout: the names that the tensors of a component have in a single file.

The tables in `weight_maps/original/` are a second naming of the diffusers side. A `Naming` turns the name of
a diffusers tensor into its `Place` in the file. No value changes: a place is a whole tensor, perhaps with
more axes of size one, or some rows of a tensor that holds several, one below the other.
"""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from typing import Any

from kcv2diffusers.maps.parts import invalid, naming_data, table_data


@dataclass(frozen=True, slots=True)
class Operation:
    """How a layer is stored in the original layout.

    `endings` are what follows the original name, by the last step of the diffusers name. `ones` is the number
    of axes of size one behind the axes of a weight.
    """

    endings: Mapping[str, str]
    ones: int = 0


OPERATIONS: dict[str, Operation] = {
    # One tensor that is a parameter of the model itself, not of a layer.
    "parameter": Operation({"weight": ""}),
    # A linear layer as a convolution of one point: (out, in) <-> (out, in, 1, 1).
    "conv1x1": Operation({"weight": ".weight", "bias": ".bias"}, ones=2),
    # PyTorch's MultiheadAttention: the weights of several linear layers one below the other, biases likewise.
    "in_proj": Operation({"weight": ".in_proj_weight", "bias": ".in_proj_bias"}),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a diffusers tensor is in a single file.

    It is the `piece`-th of `pieces` equal shares of the first axis of the tensor `name`, which has `ones`
    more axes of size one.
    """

    name: str
    piece: int = 0
    pieces: int = 1
    ones: int = 0

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the tensor in the file, from that of the diffusers tensor."""
        return (shape[0] * self.pieces, *shape[1:], *(1,) * self.ones)


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A module inside a row: its original name, and which of the pieces of an operation it is."""

    name: str
    operation: str | None = None
    piece: int = 0
    pieces: int = 1


@dataclass(frozen=True, eq=False)
class Naming:
    """The original names of one component in one version ("any" where the versions share them).

    `prefix` stands before every name in a whole checkpoint. `also` are other prefixes that files have,
    `aliases` other beginnings of names, and `ignore` the modules without a counterpart in diffusers. `rows`
    gives each module its original name and what is inside of it: a block of leaves, or an operation.
    """

    component: str
    version: str
    prefix: str
    also: tuple[str, ...]
    rows: Mapping[str, tuple[str, str | None]]
    blocks: Mapping[str, Mapping[str, _Leaf]]
    aliases: Mapping[str, str]
    ignore: tuple[str, ...]

    def place(self, target: str) -> Place | None:
        """Where the diffusers tensor `target` is, None if no row names it; its name has no prefix."""
        steps = target.split(".")
        for end in range(len(steps) - 1, 0, -1):
            module = ".".join(steps[:end])
            index = ""
            row = self.rows.get(module)
            if row is None and steps[end - 1].isdigit():  # a row of a repeated layer
                index = steps[end - 1]
                row = self.rows.get(".".join([*steps[: end - 1], "{i}"]))
            if row is not None:
                name, inside = row
                return self._inside(name.replace("{i}", index), inside, steps[end:])
        return None

    def _inside(self, name: str, inside: str | None, steps: Sequence[str]) -> Place | None:
        """The place of the tensor `steps` of a row's module."""
        if inside is None:
            return Place(".".join([name, *steps]))
        if inside in OPERATIONS:
            return _placed(name, _Leaf("", inside), steps)
        block = self.blocks[inside]
        for end in range(len(steps) - 1, 0, -1):
            if leaf := block.get(".".join(steps[:end])):
                return _placed(f"{name}.{leaf.name}", leaf, steps[end:])
        return Place(".".join([name, *steps]))

    def places(self, targets: Iterable[str]) -> dict[str, Place]:
        """The places of diffusers tensors, those that no row names left out."""
        return {target: place for target in targets if (place := self.place(target)) is not None}

    def renamed(self, name: str) -> str:
        """The name of this layout for a tensor of a file (its name without the prefix)."""
        for old, new in self.aliases.items():
            if name.startswith(old):
                return new + name[len(old) :]
        return name

    def ignores(self, name: str) -> bool:
        """Whether a tensor of the file (its name without the prefix) has no counterpart in diffusers."""
        return any(name == module or name.startswith(f"{module}.") for module in self.ignore)


def _placed(name: str, leaf: _Leaf, steps: Sequence[str]) -> Place | None:
    if leaf.operation is None:
        return Place(".".join([name, *steps]))
    operation = OPERATIONS[leaf.operation]
    ending = operation.endings.get(".".join(steps))
    if ending is None:
        return None
    return Place(f"{name}{ending}", leaf.piece, leaf.pieces, operation.ones if steps[-1] == "weight" else 0)


def load(component: str, data: Mapping[str, Any]) -> dict[str, Naming]:
    """The namings of a table, by version."""
    return {
        version: Naming(
            component=component,
            version=version,
            prefix=entry["prefix"],
            also=tuple(entry.get("also", ())),
            rows=_rows(entry["rows"]),
            blocks={name: _leaves(leaves) for name, leaves in entry.get("blocks", {}).items()},
            aliases=entry.get("aliases", {}),
            ignore=tuple(entry.get("ignore", ())),
        )
        for version, entry in data.items()
    }


def _rows(rows: Iterable[Sequence[str]]) -> dict[str, tuple[str, str | None]]:
    found: dict[str, tuple[str, str | None]] = {}
    for module, name, *inside in rows:
        if module in found:
            raise ValueError(f"two rows for {module}")
        found[module] = name, (inside[0] if inside else None)
    return found


def _leaves(leaves: Iterable[Sequence[str]]) -> dict[str, _Leaf]:
    found: dict[str, _Leaf] = {}
    for modules, name, *operation in leaves:
        pieces = modules.split()
        for number, module in enumerate(pieces):
            found[module] = _Leaf(name, operation[0] if operation else None, number, len(pieces))
    return found


@cache
def namings() -> dict[str, dict[str, Naming]]:
    """Every naming by component (the name of its weight map) and version. Raises SourceError for a table of
    another form.
    """
    found = {}
    for name, data in naming_data().items():
        if name not in table_data():
            raise invalid(f"original/{name}.toml", ValueError(f"there is no {name}.toml that it names"))
        try:
            found[name] = load(name, data)
        except (KeyError, ValueError, TypeError, AttributeError) as error:
            raise invalid(f"original/{name}.toml", error) from error
    return found


def naming(component: str, version: str) -> Naming:
    """The naming that a component of a version is written in."""
    found = namings()[component]
    return found.get(version) or found["any"]
