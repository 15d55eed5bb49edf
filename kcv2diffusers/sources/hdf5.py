"""HDF5 read as a tree of tensors and the few attributes Keras keeps, without following anything out of it.

Only hard links are walked: soft and external links, external storage and virtual datasets read other
places or other files, and no Keras writes them, so they are refused. h5py parses; bytes are later read
straight from the file at the offsets found here, except for chunked and compressed datasets.
"""

from __future__ import annotations

import io
import math
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path

import h5py
import ml_dtypes
import numpy as np

from kcv2diffusers.errors import SourceError
from kcv2diffusers.sources.tensor import Tensor

SIGNATURE = b"\x89HDF\r\n\x1a\n"
_MAX_DEPTH = 64
_MAX_OBJECTS = 200_000
_MAX_ATTRIBUTE = 64 << 20
# A compressed dataset larger than this may not be this many times its stored size.
_BOMB_SIZE, _BOMB_RATIO = 64 << 20, 200
_ATTRIBUTES = ("layer_names", "weight_names", "keras_version", "name")
_DAMAGED = "the file is damaged or incomplete; copy or download it again."


@dataclass
class Tree:
    """All tensors of a file by path, and Keras' own attributes by group path ("" is the root)."""

    path: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    attributes: dict[str, dict[str, list[str]]] = field(default_factory=dict)


class Slice(io.RawIOBase):
    """A byte range of a file as a file of its own (an HDF5 file stored inside a zip archive)."""

    def __init__(self, path: Path, start: int, size: int) -> None:
        self._file = path.open("rb", buffering=0)
        self._start, self._size, self._at = start, size, 0

    def readable(self) -> bool:
        return True

    def seekable(self) -> bool:
        return True

    def seek(self, offset: int, whence: int = io.SEEK_SET) -> int:
        self._at = offset + {io.SEEK_SET: 0, io.SEEK_CUR: self._at, io.SEEK_END: self._size}[whence]
        return self._at

    def tell(self) -> int:
        return self._at

    def readinto(self, buffer: bytearray | memoryview) -> int:  # type: ignore[override]
        view = memoryview(buffer)[: max(0, self._size - self._at)]
        self._file.seek(self._start + self._at)
        count = self._file.readinto(view) or 0
        self._at += count
        return count

    def close(self) -> None:
        self._file.close()
        super().close()


@contextmanager
def _open(path: Path, part: tuple[int, int] | None) -> Iterator[h5py.File]:
    if part is None:
        with h5py.File(path, "r", locking=False) as file:
            yield file
    else:
        with Slice(path, *part) as window, h5py.File(window, "r") as file:
            yield file


def read_tree(path: Path, part: tuple[int, int] | None = None) -> Tree:
    """The tensors of the HDF5 file `path`, or of the one in bytes `part` = (start, size) of it.

    Raises SourceError for anything that is not a sound, self-contained HDF5 file.
    """
    tree = Tree(path)
    try:
        with _open(path, part) as file:
            _Walker(tree, part).group(file.id, "", ())
    except SourceError:
        raise
    except PermissionError:
        raise
    except RecursionError:
        raise SourceError(path, "its groups are nested without end.") from None
    except Exception as error:  # whatever libhdf5 says about a damaged file, in any of h5py's types
        detail = str(error).split("\n")[0]
        raise SourceError(path, f"not a readable HDF5 file ({detail}).", f"Perhaps {_DAMAGED}") from error
    return tree


class _Walker:
    def __init__(self, tree: Tree, part: tuple[int, int] | None) -> None:
        self.tree, self.part = tree, part
        self.base, size = part or (0, tree.path.stat().st_size)
        self.end = self.base + size
        self.objects = 0

    def refuse(self, name: str, problem: str, remedy: str = "") -> SourceError:
        return SourceError(self.tree.path, f"{name or '/'}: {problem}", remedy)

    def group(self, group: h5py.h5g.GroupID, path: str, above: tuple[int, ...]) -> None:
        address = h5py.h5o.get_info(group).addr
        if address in above:
            raise self.refuse(path, "a group that contains itself.")
        if len(above) > _MAX_DEPTH:
            raise self.refuse(path, "groups nested too deep.")
        self.attributes(group, path)
        for raw in group:
            name = f"{path}/{raw.decode('utf-8')}" if path else raw.decode("utf-8")
            self.objects += 1
            if self.objects > _MAX_OBJECTS:
                raise self.refuse(path, f"more than {_MAX_OBJECTS} objects.")
            if group.links.get_info(raw).type != h5py.h5l.TYPE_HARD:
                raise self.refuse(
                    name,
                    "a soft or external link, which may point to another file; it is not followed.",
                    "Keras never writes links. Only convert files that you trust, saved by Keras itself.",
                )
            child = h5py.h5o.open(group, raw)
            if isinstance(child, h5py.h5g.GroupID):
                self.group(child, name, (*above, address))
            elif isinstance(child, h5py.h5d.DatasetID):
                tensor = self.dataset(child, name)
                if tensor is not None:
                    self.tree.tensors[name] = tensor

    def attributes(self, group: h5py.h5g.GroupID, path: str) -> None:
        found: dict[str, list[str]] = {}
        for index in range(h5py.h5a.get_num_attrs(group)):
            attribute = h5py.h5a.open(group, index=index)
            name = attribute.name.decode("utf-8", "replace")
            if not name.startswith(_ATTRIBUTES):
                continue
            if math.prod(attribute.shape) * attribute.dtype.itemsize > _MAX_ATTRIBUTE:
                raise self.refuse(path, f"attribute {name} is larger than any Keras writes.")
            value = np.atleast_1d(h5py.AttributeManager(h5py.Group(group))[name])
            found[name] = [v.decode("utf-8") if isinstance(v, bytes) else str(v) for v in value.ravel()]
        if found:
            self.tree.attributes[path] = found

    def dataset(self, dataset: h5py.h5d.DatasetID, name: str) -> Tensor | None:
        """The tensor, or None for a dataset that holds no numbers."""
        stored = dataset.dtype
        if stored == np.dtype("V2") or (stored == np.uint16 and _is_bfloat16(dataset)):
            dtype = np.dtype(ml_dtypes.bfloat16)  # which HDF5 does not know: raw 16-bit words
        elif stored.kind in "fiu":
            dtype = stored.newbyteorder("<")
        else:
            return None
        shape = tuple(int(n) for n in dataset.shape)
        settings = dataset.get_create_plist()
        layout = settings.get_layout()
        if settings.get_external_count():
            raise self.refuse(
                name,
                "its data is in another file (HDF5 external storage); it is not read.",
                "Keras never writes that. Save the weights again with Keras itself.",
            )
        if layout not in (h5py.h5d.CONTIGUOUS, h5py.h5d.COMPACT, h5py.h5d.CHUNKED):
            raise self.refuse(name, "a virtual dataset, which reads other files; it is not followed.")
        nbytes, offset = math.prod(shape) * dtype.itemsize, dataset.get_offset()
        if layout == h5py.h5d.CONTIGUOUS and stored == stored.newbyteorder("<"):
            if nbytes and offset is None:
                raise self.refuse(name, f"declared but never written; {_DAMAGED}")
            start = self.base + (offset or 0)
            if start + nbytes > self.end:
                raise self.refuse(name, f"lies outside the file; {_DAMAGED}")
            return Tensor(name, shape, dtype, self.tree.path, start)
        if nbytes > _BOMB_SIZE and nbytes > _BOMB_RATIO * max(1, dataset.get_storage_size()):
            raise self.refuse(name, "unpacks to far more than it stores; not read.")
        return Tensor(name, shape, dtype, self.tree.path, None, self.loader(name, dtype))

    def loader(self, name: str, dtype: np.dtype) -> Callable[[], np.ndarray]:
        path, part = self.tree.path, self.part

        def load() -> np.ndarray:
            try:
                with _open(path, part) as file:
                    values = np.ascontiguousarray(file[name][()])
            except Exception as error:
                raise SourceError(path, f"{name}: cannot be unpacked; {_DAMAGED}") from error
            return values.view(dtype) if dtype == ml_dtypes.bfloat16 else values.astype(dtype, copy=False)

        return load


def _is_bfloat16(dataset: h5py.h5d.DatasetID) -> bool:
    if not h5py.h5a.exists(dataset, b"dtype"):
        return False
    value = h5py.AttributeManager(h5py.Dataset(dataset))["dtype"]
    return (value.decode() if isinstance(value, bytes) else str(value)) == "bfloat16"
