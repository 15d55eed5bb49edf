"""The config.json of a KerasHub preset: a serialized Keras model, from the template of a family."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from kcv2diffusers.errors import Error
from kcv2diffusers.maps.sizes import Size

_DTYPE = {
    "module": "keras",
    "class_name": "DTypePolicy",
    "config": {"name": "float32"},
    "registered_name": None,
}


def preset_config(
    template: Mapping[str, Any],
    sizes: Mapping[str, Mapping[str, int]],
    configs: Mapping[str, Mapping[str, Any]],
    image_size: int,
) -> dict[str, Any]:
    """Return the config.json of a preset from `template`, a description of the model in a family.

    `sizes` are the sizes of each part, `configs` the config.json of each component and of the scheduler, and
    `image_size` is in pixels. Raises Error for an entry that no config states.
    """

    def value(entry: Any, name: str) -> Any:
        if isinstance(entry, Mapping):
            return keras_object(entry, name)
        if isinstance(entry, list):
            return [value(item, name) for item in entry]
        if not isinstance(entry, str) or not entry.startswith("$"):
            return entry
        if entry == "$image_size":
            return image_size
        owner, _, size = entry[1:].partition(".")
        found = Size.parse(size).value(sizes[owner]) if owner in sizes else configs[owner].get(size)
        if found is None and (owner in sizes or size not in configs[owner]):
            raise Error(f"{owner}: its config.json does not state {size}.\nAdd the entry {size} to it.")
        return found

    def keras_object(entry: Mapping[str, Any], name: str) -> dict[str, Any] | None:
        if entry.get("of", next(iter(sizes))) not in sizes:
            return None
        place, _, registered = entry["class"].partition(" ")
        module, _, cls = place.partition(":")
        arguments = {key: value(inner, key) for key, inner in entry.items() if key not in ("class", "of")}
        config = {"name": name, "trainable": True, "dtype": _DTYPE, **arguments}
        return {"module": module, "class_name": cls, "config": config, "registered_name": registered}

    model = keras_object(template, "backbone")
    assert model is not None  # it is not `of` a part
    return model
