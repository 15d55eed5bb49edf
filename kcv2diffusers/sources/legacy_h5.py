"""Read legacy Keras `.h5` files: weights, or `model_weights/` in a whole-model file (Keras 2 and Keras 3).

The attribute `layer_names` lists the layers in model order, `weight_names` the weights of each layer. The
session that saved the file numbered the names (`padded_conv2d_83/conv2d_86/kernel:0`): the stems and their
order are significant, but only the order of the numbers is. A model that is a layer of another model or an
attribute of a trainer is one entry of `layer_names`; the names of its weights include those of its layers.
The UNet and the text encoder of stable-diffusion-tensorflow, KerasCV's ancestor, are such entries. Some of
their layers are not KerasCV's, so that only the order of their weights is used.
"""

from __future__ import annotations

import math
import re
from dataclasses import replace

from kcv2diffusers.errors import SourceError
from kcv2diffusers.maps.tables import ancestors, layer_classes
from kcv2diffusers.sources.hdf5 import Tree
from kcv2diffusers.sources.source import Source, StoredLayer, Style, counted
from kcv2diffusers.sources.tensor import Tensor

_NUMBER = re.compile(r"^(.+?)(?:_([0-9]{1,9}))?$", re.DOTALL)


def split_number(name: str) -> tuple[str, int | None]:
    """Stem and number of a name: `res_block_3` -> (`res_block`, 3), `res_block` -> (`res_block`, None)."""
    match = _NUMBER.match(name)
    stem, number = match.groups() if match else (name, None)
    return stem, None if number is None else int(number)


def read(tree: Tree) -> list[Source]:
    """The models of a legacy file; an empty list if it has no `layer_names`.

    Raises SourceError for a layer that is listed twice and for a listed weight that is missing.
    """
    root = "model_weights" if "model_weights" in tree.attributes else ""
    container = "whole-model .h5" if root else "legacy .h5 weights"
    attributes = tree.attributes.get(root, {})
    names = _strings(attributes, "layer_names")
    if names is None:
        return []
    if len(set(names)) < len(names):
        raise SourceError(tree.path, "lists a layer twice.")
    weights = {name: _strings(tree.attributes.get(_join(root, name), {}), "weight_names") for name in names}
    layers: dict[str, list[StoredLayer]] = {"": []}  # by model; "" is the root of the file
    ancestral = {}
    for name, listed in weights.items():
        path = _join(root, name)
        if part := ancestors().get(split_number(name)[0]):
            ancestral[part] = [_stored(tree, path, weight) for weight in listed or ()]
            continue
        for (inside, layer), inner in _by_layer(name, listed or []).items():
            mine = layers.setdefault(inside, [])
            stem, number = split_number(layer)
            mine.append(StoredLayer(layer, stem, number, _tensors(tree, path, layer, inner)))
    version = attributes.get("keras_version") or tree.attributes.get("", {}).get("keras_version")
    model = Source(tree.path, container, Style.ORDER, keras_version=version[0] if version else None)
    models = [
        replace(model, layers=counted(mine) if inside else _in_order(mine), inside=inside)
        for inside, mine in layers.items()
        if mine
    ]
    models += [
        replace(model, style=Style.ANCESTRAL, flat=flat, part=part)
        for part, flat in ancestral.items()
        if flat
    ]
    used = {id(tensor) for each in models for tensor in each.tensors}
    others = [tensor for tensor in tree.tensors.values() if id(tensor) not in used]
    return [replace(each, others=[] if index else others) for index, each in enumerate(models)]


def _join(group: str, name: str) -> str:
    return f"{group}/{name}".lstrip("/")


def _stored(tree: Tree, path: str, weight: str) -> Tensor:
    tensor = tree.tensors.get(f"{path}/{weight}")
    if tensor is None:
        raise SourceError(
            tree.path, f"{path}/{weight} is listed but not in the file.", "Copy or save it again."
        )
    return tensor


def _in_order(layers: list[StoredLayer]) -> list[StoredLayer]:
    """Number the layers in list order, which is model order, and ignore the numbers in their names."""
    return counted([replace(layer, ordinal=index) for index, layer in enumerate(layers)])


def _by_layer(name: str, weights: list[str]) -> dict[tuple[str, str], list[str]]:
    """The weights of the entry `name` by (model, layer); the entry is a layer, or a model with layers."""
    if split_number(name)[0] in layer_classes():
        return {("", name): weights} if weights else {}
    found: dict[tuple[str, str], list[str]] = {}
    for weight in weights:
        *where, _ = weight.split("/")
        at = next((i for i, word in enumerate(where) if split_number(word)[0] in layer_classes()), None)
        if at is None:
            found.setdefault(("", name), []).append(weight)
        else:
            above = where[:at] if where[:1] == [name] else [name, *where[:at]]
            found.setdefault(("/".join(above), where[at]), []).append(weight)
    return found


def _strings(attributes: dict[str, list[str]], name: str) -> list[str] | None:
    """The attribute `name`, which Keras splits into name0, name1, ... if it is larger than 64 KB."""
    if name in attributes:
        return attributes[name]
    chunks = [f"{name}{i}" for i in range(len(attributes)) if f"{name}{i}" in attributes]
    return [value for chunk in chunks for value in attributes[chunk]] if chunks else None


def _tensors(tree: Tree, path: str, layer: str, weights: list[str]) -> dict[str, Tensor]:
    """The layer's tensors, keyed by inner layer class, rank within that class and variable name.

    Keras writes trainable weights first, so the weights of a partly frozen layer are out of order. The
    numbers of the inner layers give the order of their creation.
    """
    inner: dict[str, dict[str, Tensor]] = {}
    for weight in weights:
        where, _, variable = weight.rpartition("/")
        inner.setdefault(where or layer, {})[variable.split(":")[0]] = _stored(tree, path, weight)
    stems: dict[str, list[tuple[int | None, str]]] = {}
    for where in inner:
        stem, number = split_number(where.rpartition("/")[2])
        stems.setdefault(stem, []).append((number, where))
    tensors = {}
    for stem, members in stems.items():
        # The first layer of a class in a session has no number; the next one has the number 1. A layer that
        # Keras 2 creates in the first call of its parent has no number either and comes last (the projection
        # of a ResBlock).
        unnumbered = 0 if any(number == 1 for number, _ in members) else math.inf
        members.sort(key=lambda member: unnumbered if member[0] is None else member[0])
        for rank, (_, where) in enumerate(members):
            for variable, tensor in inner[where].items():
                tensors[f"{stem}.{rank}/{variable}"] = tensor
    return tensors
