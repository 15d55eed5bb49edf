"""Stable Diffusion's original layout: the names that the tensors of a component have in a single file.

The tables in `weight_maps/original/` are a second naming of the diffusers side. A `Naming` maps the name of
a diffusers tensor to its `Place` in the file. The values are unchanged. A place is a whole tensor, possibly
with additional axes of size one, or a range of rows of a tensor that concatenates several along axis 0.
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

    `endings` maps the last step of the diffusers name to the suffix of the original name. `ones` is the
    number of additional trailing axes of size one that a weight has in the file.
    """

    endings: Mapping[str, str]
    ones: int = 0


OPERATIONS: dict[str, Operation] = {
    # One tensor that is a parameter of the model itself, not of a layer.
    "parameter": Operation({"weight": ""}),
    # A linear layer stored as a 1x1 convolution: (out, in) <-> (out, in, 1, 1).
    "conv1x1": Operation({"weight": ".weight", "bias": ".bias"}, ones=2),
    # PyTorch's MultiheadAttention: weights of several linear layers concatenated along axis 0, biases too.
    "in_proj": Operation({"weight": ".in_proj_weight", "bias": ".in_proj_bias"}),
}


@dataclass(frozen=True, slots=True)
class Place:
    """Where a diffusers tensor is in a single file.

    It is share `piece` (from 0) of `pieces` equal shares of the tensor `name` along axis 0. That tensor has
    `ones` additional trailing axes of size one.
    """

    name: str
    piece: int = 0
    pieces: int = 1
    ones: int = 0

    def shape(self, shape: Sequence[int]) -> tuple[int, ...]:
        """The shape of the tensor in the file, given the shape of the diffusers tensor."""
        return (shape[0] * self.pieces, *shape[1:], *(1,) * self.ones)


@dataclass(frozen=True, slots=True)
class _Leaf:
    """A module inside a row: its original name, its operation, and its share of the stored tensor."""

    name: str
    operation: str | None = None
    piece: int = 0
    pieces: int = 1


@dataclass(frozen=True, eq=False)
class Naming:
    """The original names of one component in one version ("any" if the versions share them).

    - `prefix`: precedes every name in a whole checkpoint
    - `also`: other prefixes that files have
    - `rows`: maps each diffusers module to its original name and its content: the name of a block of leaves,
      an operation, or None if the names inside are unchanged
    - `blocks`: the leaves of each block
    - `aliases`: maps other beginnings of names to those of this layout
    - `ignore`: the modules that have no counterpart in diffusers
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
        """The place of the diffusers tensor `target`, named without the prefix; None if no row matches it."""
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
        """The place of a tensor in a row's module; `steps` is its name below the module, split at dots."""
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
        """The places of diffusers tensors by name; tensors that no row matches are left out."""
        return {target: place for target in targets if (place := self.place(target)) is not None}

    def renamed(self, name: str) -> str:
        """Resolve aliases in the name of a tensor of a file; `name` is without the prefix."""
        for old, new in self.aliases.items():
            if name.startswith(old):
                return new + name[len(old) :]
        return name

    def ignores(self, name: str) -> bool:
        """Whether a tensor of the file has no counterpart in diffusers; `name` is without the prefix."""
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
    """The namings of a component by version, from the TOML `data` of its table."""
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
    """Every naming by component (the name of its weight map) and version.

    Raises SourceError for an invalid table.
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
    """The naming used to write a component in a version."""
    found = namings()[component]
    return found.get(version) or found["any"]
