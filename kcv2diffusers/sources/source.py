"""What every reader returns: the layers of Keras models with their tensors, named as the container can.

A checkpoint may hold several models, or hold them inside of a trainer or of another model. Readers return one
`Source` for each group of layers, wherever it lies, and the tensors outside of all groups beside the first.

Containers differ in what they know of a tensor's place. Each `Style` is one way to spell it, as a key
that a table's slot can form by itself:

- PATH: `.weights.h5` and `.keras`: class, number within the class, path and variable index;
- ATTRIBUTE: SavedModels of Keras 2 and TensorFlow checkpoints: Python attributes, no class;
- ORDER: legacy `.h5`: class, and the rank of each inner layer among those of its class;
- FLAT: SavedModels exported by Keras 3: all variables of the model in order, nothing else;
- NAMED: single files in Stable Diffusion's original layout: each tensor by its name in diffusers.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory

from kcv2diffusers.maps.tables import Slot
from kcv2diffusers.sources.tensor import Tensor


class Style(Enum):
    """How a container spells the place of a tensor; see the module."""

    PATH = "path"
    ATTRIBUTE = "attribute"
    ORDER = "order"
    FLAT = "flat"
    NAMED = "named"


KEYS: dict[Style, Callable[[Slot], str]] = {
    Style.PATH: lambda slot: f"{slot.path}/vars/{slot.index}".lstrip("/"),
    Style.ATTRIBUTE: lambda slot: f"{slot.attribute}/{slot.variable.name}".lstrip("/"),
    Style.ORDER: lambda slot: f"{slot.stem}.{slot.rank}/{slot.variable.name}",
}


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One layer of the model: its class in snake case where known, its number, its tensors by key."""

    name: str
    layer: str | None
    ordinal: int | None
    tensors: dict[str, Tensor]


def counted(layers: list[StoredLayer]) -> list[StoredLayer]:
    """The layers in the order given, numbered from 0 within each class by the numbers that they have."""
    numbers: dict[str | None, list[int]] = {}
    for layer in layers:
        numbers.setdefault(layer.layer, []).append(-1 if layer.ordinal is None else layer.ordinal)
    ranks = {name: {n: rank for rank, n in enumerate(sorted(found))} for name, found in numbers.items()}
    return [
        replace(layer, ordinal=ranks[layer.layer][-1 if layer.ordinal is None else layer.ordinal])
        for layer in layers
    ]


@dataclass(frozen=True)
class Source:
    """A model as it lies in a file or folder: its container and its layers, nothing interpreted.

    `inside` is where in the checkpoint the model is ("" for the root), as the container names it. `others`
    are the tensors of the checkpoint that belong to no model; the first model of a checkpoint has them.

    A NAMED source is one part: `named` are its tensors by their names in diffusers, laid out as there, and
    `spelled` what the file calls each that it could have. `part` and `version` say which one it is (version
    None: the one that fits best), `leftovers` are the tensors of no part whose kind the reader knows, and
    `metadata` the texts that the file holds about itself.
    """

    path: Path
    container: str
    style: Style
    layers: list[StoredLayer] = field(default_factory=list)
    flat: list[Tensor] = field(default_factory=list)
    keras_version: str | None = None
    inside: str = ""
    others: list[Tensor] = field(default_factory=list)
    named: dict[str, Tensor] = field(default_factory=dict)
    spelled: Mapping[str, str] = field(default_factory=dict)
    part: str | None = None
    version: str | None = None
    leftovers: dict[str, list[Tensor]] = field(default_factory=dict)
    metadata: Mapping[str, str] = field(default_factory=dict)
    spool: TemporaryDirectory[str] | None = None  # keeps unpacked weights alive as long as the source

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor of the model."""
        stored = (tensor for layer in self.layers for tensor in layer.tensors.values())
        return [*self.flat, *stored, *self.named.values()]
