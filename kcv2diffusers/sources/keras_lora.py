"""Read KerasHub's LoRA files (`.lora.h5`), the factors of layers that the file identifies by numbers.

`Backbone.save_lora_weights` counts all layers with weights: depth first, each layer before the layers inside
it. The layers inside a layer are counted from the last to the first. So the numbers depend on the model: on
its number of blocks, on which of them have a second attention, and on whether it has a T5. They depend on the
backend too: on PyTorch the outer layers have another order. The families have the orders; the sizes come from
a model that is given, else from the released ones. The model and the order that fit all numbers and shapes
are the right ones.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from kcv2diffusers.errors import SourceError
from kcv2diffusers.maps.leaves import Share
from kcv2diffusers.maps.parts import LayerOrder, families
from kcv2diffusers.maps.tables import REPEAT, Row, Slot, Spec, specs
from kcv2diffusers.sources.hdf5 import Tree, read_tree
from kcv2diffusers.sources.lora import Lora, Update
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.sources.tensor import Tensor, in_memory, values_of

ENDING = ".lora.h5"
SPELLING = "keras-hub"
_PATH = re.compile(r"lora/(\d{1,6})/vars/lora_kernel_([ab])")
_RANK = "lora/vars/rank"
_LOADED = ("transformer", "text_encoder", "text_encoder_2")  # components for which diffusers loads a LoRA
_READ = "Files of KerasHub's save_lora_weights are read."
_Factors = dict[int, tuple[np.ndarray, np.ndarray]]


@dataclass(frozen=True)
class _Model:
    """A part with its sizes and flags by symbol."""

    spec: Spec
    dims: Mapping[str, int]


@dataclass
class _Layer:
    """A Keras layer: the slots of its own variables, and the layers inside it in Keras' order."""

    slots: list[Slot] = field(default_factory=list)
    inside: dict[str, _Layer] = field(default_factory=dict)

    def below(self) -> Iterator[_Layer]:
        """The layers inside this one in the order in which KerasHub counts them."""
        for layer in reversed(self.inside.values()):
            yield layer
            yield from layer.below()


def read_keras_lora(path: Path, models: Mapping[str, Match] | None = None) -> Lora:
    """Read a `.lora.h5` file.

    `models` are the parts of the model that it was trained on, by name (default: the released models). The
    rank of an update is that of Keras, times the number of heads for a layer whose outputs have an axis of
    heads: there Keras has the same second factor for all heads. Raises SourceError for any other file and for
    one that fits none of the models or several.
    """
    factors = _factors(read_tree(path))
    given = {part: _Model(match.spec, match.dims) for part, match in (models or {}).items()}
    found: list[dict[tuple[str, str], Update]] = []
    for layers in _candidates(given):
        updates = _updates(path, factors, layers)
        if updates is not None and not any(updates.keys() == other.keys() for other in found):
            found.append(updates)
    if len(found) != 1:
        how = (
            "fits several models"
            if found
            else f"fits no {'part of the model' if given else 'released model'}"
        )
        raise SourceError(
            path,
            f"{how}: KerasHub numbers the layers of a LoRA.",
            "Give --base the pipeline or the weights of the model that it was trained on.",
        )
    if strange := {component for component, _ in found[0]} - set(_LOADED):
        raise SourceError(path, f"changes {min(strange)}, for which diffusers loads no LoRA.")
    return Lora(path, SPELLING, found[0], {})


def _factors(tree: Tree) -> _Factors:
    """Both factors by the number of the layer. Raises SourceError for a file without them."""
    pairs: dict[int, dict[str, Tensor]] = {}
    for name, tensor in tree.tensors.items():
        if match := _PATH.fullmatch(name):
            pairs.setdefault(int(match[1]), {})[match[2]] = tensor
        elif name != _RANK:
            raise SourceError(tree.path, f"{name[:60]}: not a tensor of a KerasHub LoRA.", _READ)
    if not pairs:
        raise SourceError(tree.path, "not a LoRA of KerasHub.", _READ)
    found: _Factors = {}
    for number, pair in pairs.items():
        if len(pair) != 2 or any(t.dtype.kind != "f" and t.dtype.itemsize != 2 for t in pair.values()):
            raise SourceError(tree.path, f"lora/{number}: not two factors of numbers.", _READ)
        a, b = values_of(pair["a"]), values_of(pair["b"])
        if a.ndim < 2 or b.ndim != 2 or not 0 < a.shape[-1] == b.shape[0]:
            shapes = f"{list(a.shape)} and {list(b.shape)}"
            raise SourceError(tree.path, f"lora/{number}: factors of shapes {shapes} have no common rank.")
        found[number] = a, b
    return found


def _candidates(given: Mapping[str, _Model]) -> Iterator[dict[int, tuple[_Model, _Layer]]]:
    """The numbered layers of each model that a LoRA may be of."""
    for family in families():
        for order in family.layer_orders:
            for models in [given] if given else _released(order.parts):
                parts = [models[part] for part in order.parts if part in models]
                yield from (dict(enumerate(_alone(model, order))) for model in parts)
                if len(parts) > 1:
                    yield dict(enumerate(layer for model in parts for layer in _nested(model, order)))


def _released(parts: Sequence[str]) -> Iterator[dict[str, _Model]]:
    """The released models, each with all parts and without those that presets do not have."""
    by_part = {part: [_Model(spec, spec.nominal) for spec in specs() if spec.part == part] for part in parts}
    for last in by_part[parts[-1]]:
        models = {part: of[0] for part, of in by_part.items()} | {parts[-1]: last}
        yield models
        for part in parts[2:-1]:
            yield {name: model for name, model in models.items() if name != part}


def _outer(model: _Model, order: LayerOrder) -> list[_Layer]:
    """The outer layers of a part with those inside them, in an order of Keras."""
    repeat, rows = model.dims.get(REPEAT, 0), model.spec.rows
    of_row: dict[Row, list[_Layer]] = {row: [] for row in rows}
    for row, ordinal, i in model.spec.layers(repeat):
        outer = _Layer()
        for slot in model.spec.block(row, ordinal, i, repeat):
            if slot.exists(model.dims):
                layer = outer
                for step in filter(None, slot.path.split("/")):
                    layer = layer.inside.setdefault(step, _Layer())
                layer.slots.append(slot)
        of_row[row].append(outer)
    ordered = order.rows.get(model.spec.part, range(len(rows)))
    return [layer for number in ordered for layer in of_row[rows[number]]]


def _alone(model: _Model, order: LayerOrder) -> Iterator[tuple[_Model, _Layer]]:
    for outer in _outer(model, order):
        yield model, outer
        for layer in outer.below():
            yield model, layer


def _nested(model: _Model, order: LayerOrder) -> Iterator[tuple[_Model, _Layer]]:
    """The layers of a part that is a layer of a whole model, which is counted too."""
    whole = _Layer(inside={str(number): outer for number, outer in enumerate(_outer(model, order))})
    for layer in (whole, *whole.below()):
        yield model, layer


def _updates(
    path: Path, factors: _Factors, layers: Mapping[int, tuple[_Model, _Layer]]
) -> dict[tuple[str, str], Update] | None:
    """The updates by component and module; None if a layer is another one than its factors need."""
    updates: dict[tuple[str, str], Update] = {}
    for number, (a, b) in factors.items():
        if number not in layers:
            return None
        model, layer = layers[number]
        kernels = [slot for slot in layer.slots if slot.variable.reverses]
        if not kernels or a.shape[:-1] + b.shape[1:] != tuple(s.value(model.dims) for s in kernels[0].shape):
            return None
        by_module: dict[str, list[Slot]] = {}
        for slot in kernels:
            by_module.setdefault(slot.target.rpartition(".")[0], []).append(slot)
        component = model.spec.table.folder
        for module, slots in by_module.items():
            inputs = slots[0].part_shape(model.dims, keras=False)[1]
            down, up = _matrices(a, b, inputs)
            slots.sort(key=lambda slot: _first(slot.rows, model))
            up = np.concatenate([up[_range(slot.columns, model)] for slot in slots])
            name = f"{component}.{module}"
            updates[component, module] = Update(
                component,
                module,
                in_memory(f"{name}.A", down, path),
                in_memory(f"{name}.B", up, path),
                len(down),
            )
    return updates


def _matrices(a: np.ndarray, b: np.ndarray, inputs: int) -> tuple[np.ndarray, np.ndarray]:
    """The factors (rank, inputs) and (outputs, rank) of the same product as Keras' a @ b."""
    heads, rank = math.prod(a.shape[:-1]) // inputs, a.shape[-1]
    down = a.reshape(inputs, heads, rank).transpose(1, 2, 0).reshape(heads * rank, inputs)
    return down, np.kron(np.eye(heads, dtype=b.dtype), b.T)


def _first(share: Share | None, model: _Model) -> int:
    return (share.first.value(model.dims) or 0) if share else 0


def _range(share: Share | None, model: _Model) -> slice:
    if share is None:
        return slice(None)
    first = _first(share, model)
    return slice(first, first + (share.count.value(model.dims) or 0))
