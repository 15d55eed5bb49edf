"""Read `.weights.h5` files (Keras 3, Keras 2.12 and newer), sharded or not, also inside `.keras` archives.

A tensor's path is `layers/res_block_3/entry_flow/group_normalization/vars/0`: the class of the layer, its
number among the layers of that class in model order, the path inside it and the variable's index.
Keras 2 names the group of layers `_layer_checkpoint_dependencies` and counts every layer twice. A model that
is an attribute or a layer of another model has a group of its own: `diffusion_model/layers/dense/vars/0`.
"""

from __future__ import annotations

import re
import shutil
import tempfile
import zipfile
from dataclasses import replace
from functools import cache
from pathlib import Path

from kcv2diffusers.errors import SourceError
from kcv2diffusers.json_text import parse_object
from kcv2diffusers.maps.tables import open_places
from kcv2diffusers.sources.foreign import reason
from kcv2diffusers.sources.hdf5 import Tree, read_tree
from kcv2diffusers.sources.legacy_h5 import split_number
from kcv2diffusers.sources.source import Source, StoredLayer, Style
from kcv2diffusers.sources.tensor import Tensor

# Greedy: a variable belongs to the model of the innermost group of layers.
_PATH = re.compile(r"^(.+/|)(layers|_layer_checkpoint_dependencies)/([^/]+)/((?:.+/)?vars/\d+)$")
_WEIGHTS = "model.weights.h5"
_MAX_INFLATED = 16 << 30
_MAX_RATIO = 20
_MAX_JSON = 16 << 20
_SAVE_AGAIN = "Save the weights again with Keras itself."


def read(tree: Tree, container: str = ".weights.h5") -> list[Source]:
    """The models of a `.weights.h5` tree; an empty list if it has no such paths."""
    found: dict[tuple[str, str], dict[str, dict[str, Tensor]]] = {}
    others = []
    for path, tensor in tree.tensors.items():
        if match := _open_places().match(path):
            inside, kind = match[1], "layers"
            layer, variable = _in_list(match[1], match[2])
        elif match := _PATH.match(path):
            inside, kind, layer, variable = match.groups()
        else:
            others.append(tensor)
            continue
        found.setdefault((inside.rstrip("/"), kind), {}).setdefault(layer, {})[variable] = tensor
    # Keras 3 stores every layer's name beside its variables, tf-keras does not.
    named = any("name" in attributes for attributes in tree.attributes.values())
    models: list[Source] = []
    for (inside, kind), layers in found.items():
        keras2 = kind != "layers"
        models.append(
            Source(
                tree.path,
                container,
                Style.PATH,
                [_layer(name, tensors, keras2) for name, tensors in layers.items()],
                keras_version="2" if keras2 else "3" if named else None,
                inside=inside,
                others=[] if models else others,
            )
        )
    return models


@cache
def _open_places() -> re.Pattern[str]:
    """Matches the path of a variable in a part whose layers are in no group: the part's place, the rest."""
    places = "|".join(map(re.escape, open_places()))
    return re.compile(rf"^((?:.+/|)(?:{places}))/((?:.+/)?vars/\d+)$" if places else r"(?!)")


def _in_list(place: str, path: str) -> tuple[str, str]:
    """The outer layer in the path of a variable, with its list if it is in one, and the path inside it."""
    first, _, rest = path.partition("/")
    lists = next(names for name, names in open_places().items() if f"/{place}".endswith(f"/{name}"))
    if first in lists:
        layer, _, rest = rest.partition("/")
        return f"{first}/{layer}", rest
    return first, rest


def _layer(name: str, tensors: dict[str, Tensor], keras2: bool) -> StoredLayer:
    stem, number = split_number(name)
    return StoredLayer(name, stem, (number or 0) // 2 if keras2 else number or 0, tensors)


def _json(path: Path, text: bytes) -> dict[str, object]:
    data = parse_object(text)
    if data is None:
        raise SourceError(path, "not a JSON object, the file is damaged.")
    return data


def read_sharded(path: Path) -> list[Source]:
    """The models of `NAME.weights.json` and its `.weights.h5` shards (Keras 3 with max_shard_size).

    Raises SourceError for an invalid index, a missing shard, or shards without Keras layers.
    """
    if path.stat().st_size > _MAX_JSON:
        raise SourceError(path, "too large for the index of a sharded checkpoint.")
    weight_map = _json(path, path.read_bytes()).get("weight_map")
    if not isinstance(weight_map, dict):
        raise SourceError(path, "not the index of a sharded Keras checkpoint (no weight_map).", _SAVE_AGAIN)
    wanted: dict[str, set[str]] = {}  # the groups of each shard
    for variables, files in weight_map.items():
        for name in [files] if isinstance(files, str) else files if isinstance(files, list) else [None]:
            if not isinstance(name, str) or Path(name).name != name or name in ("", ".", ".."):
                raise SourceError(path, f"names a shard that is not a file beside it: {name!r}.", _SAVE_AGAIN)
            wanted.setdefault(name, set()).add(variables.strip("/"))
    merged = Tree(path)
    for name, groups in wanted.items():
        shard = path.with_name(name)
        if not shard.is_file():
            raise SourceError(path, f"its shard {name} is missing.", "Put all shards beside it.")
        tree = read_tree(shard)
        merged.attributes |= tree.attributes
        merged.tensors |= {k: t for k, t in tree.tensors.items() if k.rpartition("/")[0] in groups}
    models = read(merged, "sharded .weights.h5")
    if not models:
        raise SourceError(path, "its shards hold no Keras layers.", _SAVE_AGAIN)
    return models


def read_archive(path: Path) -> list[Source]:
    """Models of a `.keras` archive; a stored `model.weights.h5` is read in place, a deflated one unpacked.

    Raises SourceError for anything but a valid archive with Keras layers.
    """
    try:
        with zipfile.ZipFile(path) as archive:
            for name in archive.namelist():
                if name.startswith(("/", "\\")) or ".." in Path(name.replace("\\", "/")).parts:
                    raise SourceError(path, f"has a member outside the archive: {name!r}; not read.")
            if _WEIGHTS not in archive.namelist():
                if known := reason(path):
                    raise SourceError(path, *known)
                raise SourceError(path, f"no {_WEIGHTS} in the archive; not a .keras file.", _SAVE_AGAIN)
            member = archive.getinfo(_WEIGHTS)
            version = None
            if "metadata.json" in archive.namelist() and archive.getinfo("metadata.json").file_size < 1 << 16:
                version = _json(path, archive.read("metadata.json")).get("keras_version")
            if member.compress_type == zipfile.ZIP_STORED:
                tree, spool = read_tree(path, _extent(path, archive, member)), None
            else:
                tree, spool = _inflate(path, archive, member)
    except (SourceError, OSError):
        raise
    except Exception as error:  # zipfile and zlib raise many exception types for damaged archives
        raise SourceError(path, f"damaged .keras archive ({error}).") from error
    models = read(tree, ".keras archive")
    if not models:
        raise SourceError(path, f"its {_WEIGHTS} holds no Keras layers.", _SAVE_AGAIN)
    return [
        replace(model, path=path, keras_version=str(version) if version else model.keras_version, spool=spool)
        for model in models
    ]


def _extent(path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo) -> tuple[int, int]:
    """Start and size in bytes of a stored member; zipfile checks its local header while opening it."""
    if member.compress_size != member.file_size:
        raise SourceError(path, "damaged .keras archive: sizes of the weights disagree.")
    with archive.open(member), path.open("rb") as file:
        file.seek(member.header_offset + 26)
        lengths = file.read(4)
    start = member.header_offset + 30
    start += int.from_bytes(lengths[:2], "little") + int.from_bytes(lengths[2:], "little")
    if start + member.file_size > path.stat().st_size:
        raise SourceError(path, "damaged .keras archive: the weights lie outside the file.")
    return start, member.file_size


def _inflate(
    path: Path, archive: zipfile.ZipFile, member: zipfile.ZipInfo
) -> tuple[Tree, tempfile.TemporaryDirectory[str]]:
    size = member.file_size
    if size > _MAX_INFLATED or size > _MAX_RATIO * member.compress_size + (64 << 20):
        raise SourceError(path, f"its weights unpack to {size / 2**30:.1f} GiB; refused as a zip bomb.")
    spool = tempfile.TemporaryDirectory(prefix="kcv2diffusers-")
    target = Path(spool.name) / _WEIGHTS
    try:
        with archive.open(member) as packed, target.open("wb") as unpacked:
            shutil.copyfileobj(packed, unpacked, 8 << 20)  # zipfile stops at the declared size
        return read_tree(target), spool
    except BaseException as error:
        spool.cleanup()
        if isinstance(error, SourceError):
            raise SourceError(path, f"{_WEIGHTS}: {error.problem}", error.remedy) from error
        if isinstance(error, OSError):
            raise SourceError(
                path,
                f"cannot be unpacked in {tempfile.gettempdir()}: {error.strerror or error}.",
                f"It needs {size / 1e9:.2f} GB there; free some space or set TMPDIR to another folder.",
            ) from error
        raise
