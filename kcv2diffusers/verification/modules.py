"""The second level: the same inputs through each part and each block on both sides."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from kcv2diffusers.maps.parts import family_of, parts
from kcv2diffusers.verification.blocks import Module, modules_of
from kcv2diffusers.verification.exchange import Arrays
from kcv2diffusers.verification.metrics import relative_error
from kcv2diffusers.verification.parts import known
from kcv2diffusers.verification.sides import Side

# Labels of the numerics that `Adapter.kinds` returns; {} is the Keras library.
KINDS = {
    "stock": "stock diffusers",
    "epsilon": "{}'s epsilon",
    "gelu": "{}'s GELU",
    "gelu, epsilon": "{}'s GELU and epsilon",
}


def kind_label(kind: str, part: str) -> str:
    """The label of numerics for messages."""
    return KINDS[kind].format(family_of([part]).library)


@dataclass(frozen=True)
class Deviation:
    """The largest absolute difference, and its ratio to the largest absolute value of the Keras side."""

    largest: float
    relative: float


@dataclass(frozen=True)
class Block:
    """A block's own error on correct inputs, and whether it exceeds the tolerance (`departs`)."""

    module: Module
    error: float
    departs: bool


@dataclass
class Part:
    """The result of a part.

    `errors` maps each kind of numerics to one deviation per entry of `inputs`. `bar` and `bar_attributed` are
    the tolerances. `blocks` are in the order of the layers.
    """

    part: str
    name: str
    inputs: list[str]
    errors: dict[str, list[Deviation]]
    bar: float
    bar_attributed: float
    blocks: list[Block] = field(default_factory=list)

    @property
    def stock(self) -> float:
        """The largest relative error of unchanged diffusers."""
        return max(error.relative for error in self.errors["stock"])

    @property
    def attributed(self) -> float:
        """The largest relative error with all of KerasCV's numerics in the torch model."""
        return max(error.relative for error in list(self.errors.values())[-1])

    @property
    def departing(self) -> list[Block]:
        """The blocks whose error exceeds the tolerance."""
        return [block for block in self.blocks if block.departs]

    def failures(self) -> list[str]:
        """The errors that exceed a tolerance, with the first departing block."""
        beyond = []
        if not self.stock <= self.bar:
            beyond.append(f"{self.stock:.1e} (limit {self.bar:.0e})")
        if not self.attributed <= self.bar_attributed and self.attributed != self.stock:
            how = kind_label(list(self.errors)[-1], self.part)
            beyond.append(f"{self.attributed:.1e} with {how} (limit {self.bar_attributed:.0e})")
        if self.departing and not beyond:
            beyond.append(f"{self.stock:.1e}")
        if not beyond:
            return []
        where = ""
        if self.departing:
            block, more = self.departing[0], len(self.departing) - 1
            where = f"; first block that departs: {block.module.name} ({block.error:.1e}; {block.module.row}"
            where += f"), and {more} more" if more else ")"
        return [f"{self.name}: error {', '.join(beyond)}{where}"]


def measure(folder: Path, sides: Mapping[str, Side], wanted: Mapping[str, list[str]]) -> list[Part]:
    """Compare the arrays of each part that both sides wrote to `folder`."""
    keras, torch = Arrays(folder / "keras"), Arrays(folder / "diffusers")
    told = json.loads((folder / "diffusers" / "results.json").read_text())
    measured = []
    for part in wanted:
        side = sides[part]
        labels, tolerances = list(known(part).LABELS), parts()[part].tolerances
        count = len(labels) or next(n for n in range(100) if (part, n) not in keras)
        errors = {
            kind: [
                Deviation(*relative_error(torch.load(part, kind, n), keras.load(part, n)))
                for n in range(count)
            ]
            for kind in KINDS
            if (part, kind, 0) in torch
        }
        # If both sides use the exact GELU, the looser tolerance is not needed.
        loose = known(part).LOOSE in (None, *errors)
        blocks = [
            Block(module, error, not error <= tolerances["block"])
            for module in modules_of(side.source)
            if (error := told["blocks"][part].get(module.name)) is not None
        ]
        attributed = tolerances["attributed"]
        bar = tolerances["stock"] if loose else attributed
        labels = labels or [f"input {n + 1}" for n in range(count)]
        measured.append(Part(part, side.name, labels, errors, bar, attributed, blocks))
    return measured
