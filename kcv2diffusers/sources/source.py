"""What every reader returns: the layers of a Keras model with their tensors, named as the container can.

Containers differ in what they know of a tensor's place. Each `Style` is one way to spell it, as a key
that a table's slot can form by itself:

- PATH: `.weights.h5` and `.keras`: class, number within the class, path and variable index;
- ATTRIBUTE: SavedModels of Keras 2 and TensorFlow checkpoints: Python attributes, no class;
- ORDER: legacy `.h5`: class, and the rank of each inner layer among those of its class;
- FLAT: SavedModels exported by Keras 3: all variables of the model in order, nothing else.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from enum import Enum
from pathlib import Path
from tempfile import TemporaryDirectory

from kcv2diffusers.sources.tensor import Tensor
from kcv2diffusers.tables import Slot


class Style(Enum):
    PATH = "path"
    ATTRIBUTE = "attribute"
    ORDER = "order"
    FLAT = "flat"


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


@dataclass(frozen=True)
class Source:
    """A checkpoint as it lies in a file or folder: its container and its layers, nothing interpreted."""

    path: Path
    container: str
    style: Style
    layers: list[StoredLayer] = field(default_factory=list)
    flat: list[Tensor] = field(default_factory=list)
    keras_version: str | None = None
    spool: TemporaryDirectory[str] | None = None  # keeps unpacked weights alive as long as the source

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.flat, *(t for layer in self.layers for t in layer.tensors.values())]
