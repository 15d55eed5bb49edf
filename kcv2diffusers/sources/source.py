"""The result of every reader: the layers of Keras models with their tensors, named as in the container.

A checkpoint may hold several models, or models inside a trainer or another model. Readers return one `Source`
for each group of layers, at any depth. The first `Source` also has the tensors outside of all groups.

Containers differ in the information that they store on a tensor's place in the model. Each `Style` is one
form of it, as a key that can be computed from a table's slot:

- PATH: `.weights.h5` and `.keras`: class, number within the class, path and variable index;
- ATTRIBUTE: SavedModels of Keras 2 and TensorFlow checkpoints: Python attributes, no class;
- ORDER: legacy `.h5`: class, and the rank of each inner layer among those of its class;
- FLAT: SavedModels exported by Keras 3: only the order of all variables of the model;
- ANCESTRAL: `.h5` files of stable-diffusion-tensorflow: the same, in the order of that model's attributes;
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
    """The form in which a container stores the place of a tensor; see the module docstring."""

    PATH = "path"
    ATTRIBUTE = "attribute"
    ORDER = "order"
    FLAT = "flat"
    ANCESTRAL = "ancestral"
    NAMED = "named"


KEYS: dict[Style, Callable[[Slot], str]] = {
    Style.PATH: lambda slot: f"{slot.path}/vars/{slot.index}".lstrip("/"),
    Style.ATTRIBUTE: lambda slot: f"{slot.attribute}/{slot.variable.name}".lstrip("/"),
    Style.ORDER: lambda slot: f"{slot.stem}.{slot.rank}/{slot.variable.name}",
}


@dataclass(frozen=True, slots=True)
class StoredLayer:
    """One layer: its class in snake case (None: unknown), its number in the class, its tensors by key."""

    name: str
    layer: str | None
    ordinal: int | None
    tensors: dict[str, Tensor]


def counted(layers: list[StoredLayer]) -> list[StoredLayer]:
    """Renumber the layers from 0 within each class, in the order of their numbers; keeps the list order."""
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
    """A model in a file or folder as it is stored, not yet matched to a part.

    - `layers`: its layers; `flat`: the list of its variables (FLAT, ANCESTRAL and diffusers files)
    - `inside`: the model's place in the checkpoint, as the container names it ("" for the root)
    - `others`: the tensors of the checkpoint that belong to no model; only the first model has them
    - `part`, `version`: what the reader has determined (None: the best match); a NAMED or ANCESTRAL source is
      one part

    Of a NAMED source:

    - `named`: its tensors by their names in diffusers, in the layout of diffusers
    - `spelled`: the file's name of each tensor that the part may have, by its name in diffusers
    - `leftovers`: tensors that belong to no part but are of a kind that the reader knows, by kind
    - `metadata`: the metadata of the file
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
    spool: TemporaryDirectory[str] | None = None  # keeps unpacked weights on disk while the source exists

    @property
    def tensors(self) -> list[Tensor]:
        """Every tensor of the model."""
        stored = (tensor for layer in self.layers for tensor in layer.tensors.values())
        return [*self.flat, *stored, *self.named.values()]
