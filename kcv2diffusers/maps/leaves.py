"""Leaves of a weight map: one layer inside a block, and the pieces of its variables.

Keras may store several diffusers tensors as one variable, side by side along its last axis, or the pieces of
a tensor in another order. Then the leaf has several pieces.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from dataclasses import dataclass, replace

from kcv2diffusers.maps.layouts import LAYOUTS, Layout
from kcv2diffusers.maps.sizes import Size

Condition = tuple[Size, Size]
"""Two sizes that must differ."""


@dataclass(frozen=True, slots=True)
class Share:
    """A range of an axis: its first index and its length."""

    first: Size
    count: Size


@dataclass(frozen=True, slots=True)
class Piece:
    """A piece of the last axis of a Keras variable, and the diffusers module it belongs to.

    `order` is its number among the pieces of that module along the first axis of the diffusers tensor.
    """

    module: str
    size: Size
    order: int = 0


@dataclass(frozen=True, slots=True)
class Leaf:
    """One layer inside a block: its path in Keras and its modules in diffusers, relative to the block.

    - `sizes`: the sizes of the layout; if there are several `pieces`, all but the last one
    - `pieces`: one for each module or part of a module, in Keras' order
    - `versions`: those that have the layer; None: all
    - `conditions`: pairs of sizes that must differ
    - `flags`: for each name whether the blocks that have the layer are those with that property
    - `ends`: for "first" and "last" whether the layer is in that block of a repeated row, or in the others
    """

    path: str
    attribute: str
    layout: Layout
    sizes: tuple[Size, ...]
    pieces: tuple[Piece, ...]
    versions: frozenset[str] | None = None
    conditions: tuple[Condition, ...] = ()
    flags: tuple[tuple[str, bool], ...] = ()
    ends: tuple[tuple[str, bool], ...] = ()

    @classmethod
    def parse(cls, entry: list[str], lists: Mapping[str, list[str]], versions: Collection[str]) -> Leaf:
        """Parse an entry of `leaves`. `lists` are the list attributes of the Keras layer.

        Raises ValueError for an invalid entry.
        """
        path, modules, layout, sizes, *tags = entry
        kind, found = LAYOUTS[layout], [Size.parse(size) for size in sizes.split()]
        names = modules.split() or [""]
        fixed, sizes_of_pieces = found[: len(kind.sizes) - 1], found[len(kind.sizes) - 1 :]
        if len(names) > 1 and any(variable.keras[-1] != kind.sizes[-1] for variable in kind.variables):
            raise ValueError(f"{path}: layers of layout {layout} have no pieces")
        pieces = [
            Piece(name.partition("[")[0], size, int(name.partition("[")[2].removesuffix("]") or 0))
            for name, size in zip(names, sizes_of_pieces, strict=True)
        ]
        leaf = cls(path, _attribute(path, lists), kind, tuple(fixed), tuple(pieces))
        for tag in tags:
            word, _, rest = tag.partition(" ")
            if word not in ("if", "unless"):
                if unknown := set(tag.split()) - set(versions):
                    raise ValueError(f"{path}: no version {min(unknown)}")
                leaf = replace(leaf, versions=frozenset(tag.split()))
            elif word == "if" and " != " in rest:
                left, right = rest.split(" != ")
                leaf = replace(leaf, conditions=(*leaf.conditions, (Size.parse(left), Size.parse(right))))
            elif rest in ("first", "last"):
                leaf = replace(leaf, ends=(*leaf.ends, (rest, word == "if")))
            elif not rest.isidentifier():
                raise ValueError(f"{path}: not a tag: {tag!r}")
            else:
                leaf = replace(leaf, flags=(*leaf.flags, (rest, word == "if")))
        return leaf

    def stands(self, repeat: int | None, count: int | None) -> bool:
        """Whether the layer is in block number `repeat` of `count` (None: unknown) of a repeated row."""
        there = {"first": repeat == 0, "last": count is not None and repeat == count - 1}
        return all(there[end] == wanted for end, wanted in self.ends)


def _attribute(path: str, lists: Mapping[str, list[str]]) -> str:
    """Number list items as TensorFlow does: entry_flow/padded_conv2d/conv2d -> entry_flow/2/conv2d."""
    first, *rest = path.split("/")
    if first in lists:
        rest[0] = str(lists[first].index(rest[0]))
    return "/".join([first, *rest])
