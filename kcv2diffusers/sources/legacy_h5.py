"""Legacy Keras `.h5`: weights, or `model_weights/` inside a whole-model file (Keras 2 and Keras 3).

Attribute `layer_names` lists the layers in model order, `weight_names` the weights of each. The names
are auto-numbered by the session that saved them (`padded_conv2d_83/conv2d_86/kernel:0`): stems and order
carry meaning, the numbers only their order.
"""

from __future__ import annotations

import math
import re

from kcv2diffusers.errors import SourceError
from kcv2diffusers.sources.hdf5 import Tree
from kcv2diffusers.sources.source import Source, StoredLayer, Style
from kcv2diffusers.sources.tensor import Tensor

_NUMBER = re.compile(r"^(.+?)(?:_([0-9]{1,9}))?$", re.DOTALL)


def split_number(name: str) -> tuple[str, int | None]:
    """`res_block_3` -> (`res_block`, 3), `res_block` -> (`res_block`, None)."""
    match = _NUMBER.match(name)
    stem, number = match.groups() if match else (name, None)
    return stem, None if number is None else int(number)


def read(tree: Tree) -> Source | None:
    """The layers of a legacy file, or None if the file has no `layer_names`."""
    root = "model_weights" if "model_weights" in tree.attributes else ""
    container = "whole-model .h5" if root else "legacy .h5 weights"
    attributes = tree.attributes.get(root, {})
    names = _strings(attributes, "layer_names")
    if names is None:
        return None
    if len(set(names)) < len(names):
        raise SourceError(tree.path, "lists a layer twice.")
    counts: dict[str, int] = {}
    layers = []
    for name in names:
        path = f"{root}/{name}".lstrip("/")
        weights = _strings(tree.attributes.get(path, {}), "weight_names") or []
        if not weights:
            continue
        stem, _ = split_number(name)
        ordinal = counts.get(stem, 0)
        counts[stem] = ordinal + 1
        layers.append(StoredLayer(name, stem, ordinal, _tensors(tree, path, name, weights)))
    version = attributes.get("keras_version") or tree.attributes.get("", {}).get("keras_version")
    return Source(tree.path, container, Style.ORDER, layers, keras_version=version[0] if version else None)


def _strings(attributes: dict[str, list[str]], name: str) -> list[str] | None:
    """An attribute that Keras splits into name0, name1, ... when it is larger than 64 KB."""
    if name in attributes:
        return attributes[name]
    chunks = [f"{name}{i}" for i in range(len(attributes)) if f"{name}{i}" in attributes]
    return [value for chunk in chunks for value in attributes[chunk]] if chunks else None


def _tensors(tree: Tree, path: str, layer: str, weights: list[str]) -> dict[str, Tensor]:
    """The layer's tensors, keyed by inner layer class, rank within that class and variable name.

    Keras writes trainable weights first, so those of a partly frozen layer are out of order; the numbers
    of the inner layers tell the order they were created in.
    """
    inner: dict[str, dict[str, Tensor]] = {}
    for weight in weights:
        tensor = tree.tensors.get(f"{path}/{weight}")
        if tensor is None:
            raise SourceError(
                tree.path, f"{path}/{weight} is listed but not in the file.", "Copy or save it again."
            )
        where, _, variable = weight.rpartition("/")
        inner.setdefault(where or layer, {})[variable.split(":")[0]] = tensor
    stems: dict[str, list[tuple[int | None, str]]] = {}
    for where in inner:
        stem, number = split_number(where.rpartition("/")[2])
        stems.setdefault(stem, []).append((number, where))
    tensors = {}
    for stem, members in stems.items():
        # The first of its class in a session has no number, and is followed by 1; neither has what Keras 2
        # makes on a layer's first call, which comes last (the projection of a ResBlock).
        unnumbered = 0 if any(number == 1 for number, _ in members) else math.inf
        members.sort(key=lambda member: unnumbered if member[0] is None else member[0])
        for rank, (_, where) in enumerate(members):
            for variable, tensor in inner[where].items():
                tensors[f"{stem}.{rank}/{variable}"] = tensor
    return tensors
