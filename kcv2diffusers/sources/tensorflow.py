"""Read SavedModel folders and TensorFlow checkpoints without TensorFlow.

Keras 2 saves an object graph. A model's children `layer_with_weights-<n>` are its layers in order; their
attributes lead to the variables, under whatever key a variable is stored. The model is the root or a node
below it: a member of a tf.train.Checkpoint, a trainer or another model. Keras 3's `export` stores only the
flat list `variables` of the model. A `tf.train.Checkpoint` of a Keras 3 model omits everything that a layer
holds in a Python list (half of a UNet): that data is not in the file.
"""

from __future__ import annotations

import re
from dataclasses import replace
from pathlib import Path

from kcv2diffusers.errors import SourceError
from kcv2diffusers.sources.source import Source, StoredLayer, Style
from kcv2diffusers.sources.tensor import Tensor
from kcv2diffusers.sources.tensor_bundle import Child, Node, read_bundle, read_object_graph

_LAYER = re.compile(r"^layer_with_weights-([0-9]{1,9})$")
_LISTED = re.compile(r"^_?(layer-|layer_with_weights-|layers|operations|keras_api)")
_INNER = "_functional"
_INDEX = re.compile(r"^([0-9]{1,9})$")
_MAX_DEPTH = 12
_MAX_NAME = 100
_MAX_VISITS = 2_000_000
# Children that Keras 2 adds to every layer besides the layer's own attributes.
_NOT_ATTRIBUTES = frozenset(
    [
        "variables",
        "trainable_variables",
        "non_trainable_variables",
        "regularization_losses",
        "layers",
        "metrics",
        "keras_api",
        "layer_regularization_losses",
        "layer_metrics",
        "activity_regularizer_fn",
        "signatures",
    ]
)


def read_saved_model(folder: Path) -> list[Source]:
    """The models of a SavedModel folder, from its `variables/variables.index`. Raises SourceError."""
    return _read(folder, folder / "variables" / "variables", "SavedModel")


def read_checkpoint(prefix: Path) -> list[Source]:
    """The models of a TensorFlow checkpoint; `prefix` is its path without `.index`. Raises SourceError."""
    return _read(prefix, prefix, "TensorFlow checkpoint")


def _read(path: Path, prefix: Path, container: str) -> list[Source]:
    nodes = read_object_graph(prefix)
    if not nodes:
        problem = "a checkpoint without an object graph (TensorFlow 1)."
        raise SourceError(path, problem, "Give one that KerasCV saved.")
    graph = _Graph(path, nodes, read_bundle(prefix))
    models = [
        Source(path, container, Style.ATTRIBUTE, layers, keras_version=_keras(layers), inside=inside)
        for inside, layers in graph.models().items()
    ]
    if not models and (flat := graph.variables()):
        models = [Source(path, container, Style.FLAT, flat=flat, keras_version="3")]
    if not models:
        raise SourceError(path, "holds no Keras model.", "Give the SavedModel or checkpoint of a model.")
    inside_models = {id(tensor) for model in models for tensor in model.tensors}
    others = [tensor for tensor in graph.tensors.values() if id(tensor) not in inside_models]
    return [replace(models[0], others=others), *models[1:]]


def _keras(layers: list[StoredLayer]) -> str:
    return "3" if layers[0].name.isdigit() else "2"


def _numbered(node: Node, pattern: re.Pattern[str]) -> list[Child]:
    """The children whose names match `pattern`, in the order of the numbers in their names."""
    found = {int(m[1]): child for child in node.children if (m := pattern.match(child.local_name))}
    return [child for _, child in sorted(found.items())]


def _way(at: int, above: dict[int, tuple[int, str]]) -> str:
    """The path of names from the root to a node, without the names that Keras' own wrapping adds."""
    names: list[str] = []
    while at and len(names) < _MAX_DEPTH:
        at, name = above[at]
        names[:0] = [name[:_MAX_NAME]] if name != _INNER else []
    return "/".join(names)


class _Graph:
    """The object graph and the tensors of its variables."""

    def __init__(self, path: Path, nodes: list[Node], tensors: dict[str, Tensor]) -> None:
        self.path, self.nodes, self.tensors = path, nodes, tensors
        self.visits = 0
        self.layers_of: dict[int, list[Child]] = {}
        self.met: set[int] = set()  # node ids of the layers already used

    def variable(self, at: int) -> Tensor | None:
        for attribute in self.nodes[at].attributes:
            if attribute.name == "VARIABLE_VALUE":
                return self.tensors.get(attribute.checkpoint_key)
        return None

    def variables(self) -> list[Tensor]:
        """The tensors in the root's list `variables`, in order."""
        found = self.child(0, "variables")
        children = [] if found is None else _numbered(self.nodes[found], _INDEX)
        return [tensor for c in children if (tensor := self.variable(c.node_id)) is not None]

    def child(self, at: int, name: str) -> int | None:
        return next((c.node_id for c in self.nodes[at].children if c.local_name == name), None)

    def models(self) -> dict[str, list[StoredLayer]]:
        """The layers of each model, by the path from the root to it; each layer belongs to one model."""
        found: dict[str, list[StoredLayer]] = {}
        above: dict[int, tuple[int, str]] = {0: (0, "")}
        reached = [0]
        for at in reached:  # grows while it is read: breadth-first search
            mine = [c for c in self.layers(at) if not self.is_model(c.node_id)]
            if mine and (layers := self.stored(mine)):
                found[_way(at, above)] = layers
            # A user's attribute name is more informative than Keras' lists of layers, so it is visited first.
            for child in sorted(self.nodes[at].children, key=lambda c: bool(_LISTED.match(c.local_name))):
                if child.node_id not in above:
                    above[child.node_id] = (at, child.local_name)
                    reached.append(child.node_id)
        return found

    def layers(self, at: int) -> list[Child]:
        """The model's layers in order: Keras 2 numbers the layers with weights, Keras 3 all operations."""
        if at not in self.layers_of:
            operations = self.child(at, "_operations")
            self.layers_of[at] = _numbered(self.nodes[at], _LAYER) or (
                [] if operations is None else _numbered(self.nodes[operations], _INDEX)
            )
        return self.layers_of[at]

    def is_model(self, at: int) -> bool:
        inner = self.child(at, _INNER)  # the functional model inside a Sequential of Keras 3
        return bool(self.layers(at)) or (inner is not None and bool(self.layers(inner)))

    def stored(self, layers: list[Child]) -> list[StoredLayer]:
        """The layers with their variables; a layer that was used before is left out."""
        found = []
        for child in layers:
            inside: dict[str, Tensor] = {}
            if child.node_id not in self.met:
                self.met.add(child.node_id)
                self.walk(child.node_id, "", inside, {child.node_id})
            if inside:
                found.append(StoredLayer(child.local_name, None, None, inside))
        return found

    def walk(self, at: int, path: str, found: dict[str, Tensor], seen: set[int]) -> None:
        """Collect into `found` every variable reachable from node `at`, once each, by attribute path."""
        if path.count("/") > _MAX_DEPTH:
            return
        self.visits += 1 + len(self.nodes[at].children)
        if self.visits > _MAX_VISITS:  # objects of a layer may lead to all other layers
            raise SourceError(self.path, "an object graph that never ends.")
        for child in self.nodes[at].children:
            name = child.local_name
            if name in _NOT_ATTRIBUTES or child.node_id in seen:
                continue
            seen.add(child.node_id)
            tensor = self.variable(child.node_id)
            if tensor is not None:
                found[f"{path}{name.lstrip('_')}"] = tensor  # Keras 3 stores kernels under _kernel
            else:
                self.walk(child.node_id, f"{path}{name}/", found, seen)
