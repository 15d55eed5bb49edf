"""SavedModel folders and TensorFlow checkpoints, read without TensorFlow.

Keras 2 saves an object graph: the root's children `layer_with_weights-<n>` are the layers in model order
and their attributes lead to the variables, wherever their bytes were filed. Keras 3's `export` keeps only
the flat list `variables` of the model. A `tf.train.Checkpoint` of a Keras 3 model leaves out whatever a
layer holds in a Python list (half of a UNet): that data is not in the file.
"""

from __future__ import annotations

import re
from pathlib import Path

from kcv2diffusers.errors import SourceError
from kcv2diffusers.sources.source import Source, StoredLayer, Style
from kcv2diffusers.sources.tensor import Tensor
from kcv2diffusers.sources.tensor_bundle import Child, Node, read_bundle, read_object_graph

_LAYER = re.compile(r"^layer_with_weights-([0-9]{1,9})$")
_INDEX = re.compile(r"^([0-9]{1,9})$")
_MAX_DEPTH = 12
_MAX_VISITS = 2_000_000
# What Keras 2 hangs on every layer beside its own attributes.
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


def read_saved_model(folder: Path) -> Source:
    """A SavedModel folder, by its `variables/variables.index`."""
    return _read(folder, folder / "variables" / "variables", "SavedModel")


def read_checkpoint(prefix: Path) -> Source:
    """A TensorFlow checkpoint, by its path without `.index`."""
    return _read(prefix, prefix, "TensorFlow checkpoint")


def _read(path: Path, prefix: Path, container: str) -> Source:
    nodes = read_object_graph(prefix)
    if not nodes:
        problem = "a checkpoint without an object graph (TensorFlow 1)."
        raise SourceError(path, problem, "Give one that KerasCV saved.")
    graph = _Graph(path, nodes, read_bundle(prefix))
    root = nodes[0]
    layers = graph.layers(root)
    if not layers:  # tf.train.Checkpoint(model=...) puts the model one level down
        inner = [graph.layers(nodes[c.node_id]) for c in root.children]
        layers = max(inner, key=len, default=[])
    if layers:
        version = "3" if layers[0].name.isdigit() else "2"
        return Source(path, container, Style.ATTRIBUTE, layers, keras_version=version)
    variables = next((nodes[c.node_id] for c in root.children if c.local_name == "variables"), None)
    if variables is not None:
        flat = [t for c in _numbered(variables, _INDEX) if (t := graph.variable(c.node_id)) is not None]
        return Source(path, container, Style.FLAT, flat=flat, keras_version="3")
    raise SourceError(path, "holds no Keras model.", "Give the SavedModel or checkpoint of one model.")


def _numbered(node: Node, pattern: re.Pattern[str]) -> list[Child]:
    """The children with a number in their names, in its order."""
    found = {int(m[1]): child for child in node.children if (m := pattern.match(child.local_name))}
    return [child for _, child in sorted(found.items())]


class _Graph:
    """The object graph with the tensors its variables name."""

    def __init__(self, path: Path, nodes: list[Node], tensors: dict[str, Tensor]) -> None:
        self.path, self.nodes, self.tensors = path, nodes, tensors
        self.visits = 0

    def variable(self, at: int) -> Tensor | None:
        for attribute in self.nodes[at].attributes:
            if attribute.name == "VARIABLE_VALUE":
                return self.tensors.get(attribute.checkpoint_key)
        return None

    def layers(self, node: Node) -> list[StoredLayer]:
        """The model's layers in order: Keras 2 numbers those with weights, Keras 3 all its operations."""
        numbered = _numbered(node, _LAYER)
        if not numbered:
            operations = next((c for c in node.children if c.local_name == "_operations"), None)
            if operations is not None:
                numbered = _numbered(self.nodes[operations.node_id], _INDEX)
        layers = []
        for child in numbered:
            inside: dict[str, Tensor] = {}
            self.walk(child.node_id, "", inside, {child.node_id})
            if inside:
                layers.append(StoredLayer(child.local_name, None, None, inside))
        return layers

    def walk(self, at: int, path: str, found: dict[str, Tensor], seen: set[int]) -> None:
        """Every variable that the attributes of node `at` lead to, by attribute path, each once."""
        if path.count("/") > _MAX_DEPTH:
            return
        self.visits += 1 + len(self.nodes[at].children)
        if self.visits > _MAX_VISITS:  # objects of one layer may lead to every other layer's
            raise SourceError(self.path, "an object graph that never ends.")
        for child in self.nodes[at].children:
            name = child.local_name
            if name in _NOT_ATTRIBUTES or child.node_id in seen:
                continue
            seen.add(child.node_id)
            tensor = self.variable(child.node_id)
            if tensor is not None:
                found[f"{path}{name.lstrip('_')}"] = tensor  # Keras 3 files kernels under _kernel
            else:
                self.walk(child.node_id, f"{path}{name}/", found, seen)
