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
from kcv2diffusers.sources.tensor_bundle import Node, read_bundle, read_object_graph

_LAYER = re.compile(r"^layer_with_weights-(\d+)$")
_MAX_DEPTH = 12
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
    tensors = read_bundle(prefix)
    graph = read_object_graph(prefix)
    if not graph:
        raise SourceError(path, "a checkpoint without an object graph (TensorFlow 1); not of KerasCV.")
    root = graph[0]
    layers = _layers(graph, root, tensors)
    if not layers:  # tf.train.Checkpoint(model=...) puts the model one level down
        inner = [_layers(graph, graph[c.node_id], tensors) for c in root.children]
        layers = max(inner, key=len, default=[])
    if layers:
        version = "3" if layers[0].name.isdigit() else "2"
        return Source(path, container, Style.ATTRIBUTE, layers, keras_version=version)
    variables = next((graph[c.node_id] for c in root.children if c.local_name == "variables"), None)
    if variables is not None:
        order = sorted((int(c.local_name), c.node_id) for c in variables.children if c.local_name.isdigit())
        flat = [t for _, node in order if (t := _variable(graph[node], tensors)) is not None]
        return Source(path, container, Style.FLAT, flat=flat, keras_version="3")
    raise SourceError(path, "holds no Keras model.", "Give the SavedModel or checkpoint of one model.")


def _variable(node: Node, tensors: dict[str, Tensor]) -> Tensor | None:
    for attribute in node.attributes:
        if attribute.name == "VARIABLE_VALUE":
            return tensors.get(attribute.checkpoint_key)
    return None


def _layers(graph: list[Node], node: Node, tensors: dict[str, Tensor]) -> list[StoredLayer]:
    """The model's layers in order: Keras 2 numbers those with weights, Keras 3 all its operations."""
    numbered = {int(m[1]): c for c in node.children if (m := _LAYER.match(c.local_name))}
    if not numbered:
        operations = next((c for c in node.children if c.local_name == "_operations"), None)
        if operations is not None:
            children = graph[operations.node_id].children
            numbered = {int(c.local_name): c for c in children if c.local_name.isdigit()}
    layers = []
    for _, child in sorted(numbered.items()):
        inside: dict[str, Tensor] = {}
        _walk(graph, child.node_id, "", tensors, inside, {child.node_id})
        if inside:
            layers.append(StoredLayer(child.local_name, None, None, inside))
    return layers


def _walk(
    graph: list[Node],
    at: int,
    path: str,
    tensors: dict[str, Tensor],
    found: dict[str, Tensor],
    seen: set[int],
) -> None:
    """Every variable that the attributes of node `at` lead to, by attribute path, each once."""
    if path.count("/") > _MAX_DEPTH:
        return
    for child in graph[at].children:
        name = child.local_name
        if name in _NOT_ATTRIBUTES or child.node_id in seen:
            continue
        seen.add(child.node_id)
        tensor = _variable(graph[child.node_id], tensors)
        if tensor is not None:
            found[f"{path}{name.lstrip('_')}"] = tensor  # Keras 3 files kernels under _kernel
        else:
            _walk(graph, child.node_id, f"{path}{name}/", tensors, found, seen)
