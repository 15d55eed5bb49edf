"""Read the tensors of an HDF5 file and the attributes that Keras writes, without access to other files.

Only hard links are followed. Soft and external links, external storage and virtual datasets may read other
files, and Keras never writes them, so they are refused. h5py parses the file in a child process. Values are
later read directly from the file at the offsets found here, except for chunked, compressed and big endian
datasets.
"""

from __future__ import annotations

import io
import json
import math
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager, suppress
from contextvars import ContextVar
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import h5py
import ml_dtypes
import numpy as np

from kcv2diffusers.errors import SourceError
from kcv2diffusers.sources.isolated import Child, Died, isolated, start
from kcv2diffusers.sources.tensor import Tensor

_AT_ONCE = 4  # files parsed in parallel: as many as a pipeline has parts
_MAX_DEPTH = 64
_MAX_OBJECTS = 50_000
_MAX_ATTRIBUTE = 4 << 20
# A dataset of more than _BOMB_SIZE bytes may be at most _BOMB_RATIO times its stored size.
_BOMB_SIZE, _BOMB_RATIO = 64 << 20, 200
_ATTRIBUTES = ("layer_names", "weight_names", "keras_version")
_BFLOAT16 = "bfloat16"
_SAVE_AGAIN = "Save the weights again with Keras itself."
_CUT_SHORT = re.compile(r"truncated file: eof = (\d+),.*stored_eof = (\d+)")


@dataclass
class Tree:
    """All tensors of a file by path, and Keras' attributes by group path ("" is the root)."""

    path: Path
    tensors: dict[str, Tensor] = field(default_factory=dict)
    attributes: dict[str, dict[str, list[str]]] = field(default_factory=dict)


class Slice(io.RawIOBase):
    """A file object for a byte range of a file, such as an HDF5 file stored in a zip archive."""

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


_AHEAD: ContextVar[dict[Path, Child]] = ContextVar("ahead", default={})  # noqa: B039 - it stays empty


@contextmanager
def ahead(paths: Iterable[Path]) -> Iterator[None]:
    """Start parsing the HDF5 files among `paths` in parallel; `read_tree` uses the results in the block."""
    children: dict[Path, Child] = {}
    token = _AHEAD.set(children)
    try:
        for path in [path for path in dict.fromkeys(paths) if path.suffix in (".h5", ".hdf5")][:_AT_ONCE]:
            with suppress(OSError):  # `read_tree` reports it for this path
                if path.is_file():
                    children[path] = start(_scan, str(path), None)
        yield
    finally:
        _AHEAD.reset(token)
        for child in children.values():
            child.stop()


def read_tree(path: Path, part: tuple[int, int] | None = None) -> Tree:
    """The tensors of the HDF5 file `path`, or of the HDF5 file in its byte range `part` = (start, size).

    Raises SourceError for anything but a valid, self-contained HDF5 file.
    """
    path.open("rb").close()  # so that a missing permission is reported as such
    try:
        child = (None if part else _AHEAD.get().pop(path, None)) or start(_scan, str(path), part)
        found = json.loads(child.result())
    except (Died, ValueError) as error:
        raise SourceError(path, "a damaged HDF5 file.") from error
    if "refused" in found:
        raise SourceError(path, *found["refused"])
    tree = Tree(path, attributes=found["attributes"])
    for name, shape, kind, offset in found["tensors"]:
        dtype = np.dtype(ml_dtypes.bfloat16) if kind == _BFLOAT16 else np.dtype(kind)
        load = _loader(path, part, name, tuple(shape), dtype) if offset is None else None
        tree.tensors[name] = Tensor(name, tuple(shape), dtype, path, offset, load)
    return tree


def _scan(name: str, part: tuple[int, int] | None) -> bytes:
    """Parse the file and return the result for `read_tree` as JSON."""
    path = Path(name)
    walker = _Walker(path, part)
    try:
        with _open(path, part) as file:
            walker.group(file.id, "", (h5py.h5o.get_info(file.id).addr,))
        found: dict[str, Any] = {"tensors": walker.tensors, "attributes": walker.attributes}
    except SourceError as error:
        found = {"refused": [error.problem, error.remedy]}
    except Exception as error:  # h5py raises many exception types for damaged files
        cut = _CUT_SHORT.search(str(error))
        problem = f"cut short, {cut[1]} of {cut[2]} bytes are here." if cut else walker.damaged()
        found = {"refused": [problem]}
    return json.dumps(found).encode()


def _loader(
    path: Path, part: tuple[int, int] | None, name: str, shape: tuple[int, ...], dtype: np.dtype
) -> Callable[[], np.ndarray]:
    """A function that reads a dataset which is not stored as contiguous plain bytes."""

    def load() -> np.ndarray:
        try:
            size = math.prod(shape) * dtype.itemsize
            data = isolated(_unpack, str(path), part, name, dtype.name, extra=size)
            return np.frombuffer(data, dtype).reshape(shape)
        except (Died, ValueError) as error:
            raise SourceError(path, f"{name}: cannot be unpacked, the file is damaged.") from error

    return load


def _unpack(path: str, part: tuple[int, int] | None, name: str, dtype: str) -> memoryview:
    """The values of a dataset as bytes."""
    with _open(Path(path), part) as file:
        values = np.ascontiguousarray(file[name][()])
    if dtype != _BFLOAT16:
        values = values.astype(dtype, copy=False)
    return memoryview(values.reshape(-1).view(np.uint8).data)


class _Walker:
    """Collects tensors (name, shape, dtype, byte offset or None) and attributes."""

    def __init__(self, path: Path, part: tuple[int, int] | None) -> None:
        self.path = path
        self.base, size = part or (0, path.stat().st_size)
        self.end = self.base + size
        self.objects = 0
        self.at = ""
        self.tensors: list[tuple[str, tuple[int, ...], str, int | None]] = []
        self.attributes: dict[str, dict[str, list[str]]] = {}

    def refuse(self, name: str, problem: str, *remedy: str) -> SourceError:
        return SourceError(self.path, f"{name or '/'}: {problem}", *remedy)

    def damaged(self) -> str:
        return f"a damaged HDF5 file{f', near {self.at}' if self.at else ''}."

    def count(self, path: str, more: int) -> None:
        self.objects += more
        if self.objects > _MAX_OBJECTS:
            raise self.refuse(path, f"more than {_MAX_OBJECTS} objects and names.")

    def group(self, group: h5py.h5g.GroupID, path: str, above: tuple[int, ...]) -> None:
        if above[-1] in above[:-1]:
            raise self.refuse(path, "a group that contains itself.")
        if len(above) > _MAX_DEPTH:
            raise self.refuse(path, "groups nested too deep.")
        self.read_attributes(group, path)
        links: list[tuple[bytes, int, int]] = []  # name, type, address
        group.links.iterate(lambda raw, link: links.append((raw, link.type, link.u)), info=True)
        for raw, kind, address in links:
            name = f"{path}/{raw.decode('utf-8')}" if path else raw.decode("utf-8")
            self.at = name
            self.count(path, 1)
            if kind != h5py.h5l.TYPE_HARD:
                raise self.refuse(
                    name,
                    "a soft or external link, which is not followed: it may read another file.",
                    f"Keras never writes that. {_SAVE_AGAIN}",
                )
            child = h5py.h5o.open(group, raw)
            if isinstance(child, h5py.h5g.GroupID):
                self.group(child, name, (*above, address))
            elif isinstance(child, h5py.h5d.DatasetID):
                self.dataset(child, name)

    def read_attributes(self, group: h5py.h5g.GroupID, path: str) -> None:
        found: dict[str, list[str]] = {}
        for index in range(h5py.h5a.get_num_attrs(group)):
            attribute = h5py.h5a.open(group, index=index)
            name = attribute.name.decode("utf-8", "replace")
            if name == "name":
                found[name] = []  # hundreds of groups have it; only its presence is used
            if not name.startswith(_ATTRIBUTES):
                continue
            if math.prod(attribute.shape) * attribute.dtype.itemsize > _MAX_ATTRIBUTE:
                raise self.refuse(path, f"attribute {name} is larger than any Keras writes.")
            value = np.atleast_1d(h5py.AttributeManager(h5py.Group(group))[name])
            self.count(path, value.size)
            found[name] = [v.decode("utf-8") if isinstance(v, bytes) else str(v) for v in value.ravel()]
        if found:
            self.attributes[path] = found

    def dataset(self, dataset: h5py.h5d.DatasetID, name: str) -> None:
        settings = dataset.get_create_plist()
        layout = settings.get_layout()
        if settings.get_external_count() or layout == h5py.h5d.VIRTUAL:
            raise self.refuse(
                name,
                "its data is in another file (HDF5 external storage or virtual dataset).",
                f"Keras never writes that. {_SAVE_AGAIN}",
            )
        kind = dataset.get_type()
        if kind.equal(h5py.h5t.IEEE_F32LE):  # nearly all datasets; the checks below take ten times as long
            dtype, plain = "<f4", True
        elif (stored := dataset.dtype) == np.dtype("V2") or (stored == np.uint16 and _is_bfloat16(dataset)):
            dtype = _BFLOAT16  # HDF5 has no bfloat16: raw 16-bit words
            plain = kind.get_class() == h5py.h5t.OPAQUE or kind.equal(h5py.h5t.STD_U16LE)
        elif stored.kind in "fiu" and stored.itemsize <= 8:
            dtype = stored.newbyteorder("<").str
            # False for big endian numbers, and for odd types that libhdf5 converts to the next standard type.
            plain = kind.equal(h5py.h5t.py_create(np.dtype(dtype)))
        else:
            return  # not numeric, or of a type that no model has
        shape = tuple(int(n) for n in dataset.shape)
        nbytes, size = math.prod(shape) * kind.get_size(), dataset.get_storage_size()
        start = None
        if layout == h5py.h5d.CONTIGUOUS:
            offset = dataset.get_offset()
            if nbytes and offset is None:
                raise self.refuse(name, "declared but never written, the file is incomplete.")
            at = self.base + (offset or 0)
            if size < nbytes or at + nbytes > self.end:
                raise self.refuse(name, "lies outside the file, which is damaged.")
            start = at if plain else None
        elif layout == h5py.h5d.CHUNKED:
            self.chunks(dataset, settings, name, shape)
        if start is None and nbytes > _BOMB_SIZE and nbytes > _BOMB_RATIO * max(1, size):
            raise self.refuse(name, f"unpacks to {nbytes / 1e9:.2f} GB from {size} bytes; not read.")
        self.tensors.append((name, shape, dtype, start))

    def chunks(
        self, dataset: h5py.h5d.DatasetID, settings: h5py.h5p.PropDCID, name: str, shape: tuple[int, ...]
    ) -> None:
        for index in range(settings.get_nfilters()):
            code = settings.get_filter(index)[0]
            if not h5py.h5z.filter_avail(code):
                problem = f"compressed by HDF5 filter {code}, which is not built in."
                raise self.refuse(name, problem, "Unpack the file first: h5repack -f NONE OLD NEW.")
        wanted = math.prod(-(-n // c) for n, c in zip(shape, settings.get_chunk(), strict=True))
        if dataset.get_num_chunks() < wanted:  # libhdf5 reads missing chunks as zeros
            raise self.refuse(name, "declared but only partly written, the file is incomplete.")


def _is_bfloat16(dataset: h5py.h5d.DatasetID) -> bool:
    if not h5py.h5a.exists(dataset, b"dtype"):
        return False
    value = h5py.AttributeManager(h5py.Dataset(dataset))["dtype"]
    return (value.decode() if isinstance(value, bytes) else str(value)) == "bfloat16"
