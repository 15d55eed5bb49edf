"""Read TensorFlow checkpoints: a `PREFIX.index` table and its `PREFIX.data-0000i-of-0000n` shards.

The format is described in tensorflow/core/util/tensor_bundle/tensor_bundle.h and
tensorflow/core/protobuf/tensor_bundle.proto. The index is a LevelDB table (LevelDB's doc/table_format.md,
tensorflow/core/lib/io/format.h). Only the index and the object graph are read here, never the values of a
tensor. All of the content is untrusted: a file is either read or raises `SourceError`.
"""

from __future__ import annotations

import math
import struct
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from stat import S_ISREG

import google_crc32c
import ml_dtypes
import numpy as np

from kcv2diffusers.errors import SourceError
from kcv2diffusers.sources.foreign import require_own
from kcv2diffusers.sources.tensor import Tensor

# These limits are far above any checkpoint of these models (about 3,000 entries and 1 MB with an optimizer).
# They are low enough that the largest accepted file takes a few hundred MB and a few seconds.
MAX_BYTES = 16 << 20
MAX_ENTRIES = 1 << 16
MAX_ITEMS = 1 << 20  # fields of a message; nodes, edges and attributes of the graph
MAX_KEY = 2048
MAX_RANK = 32  # the limit of NumPy 1

GRAPH_KEY = "_CHECKPOINTABLE_OBJECT_GRAPH"

_FOOTER_SIZE = 48
_MAGIC = struct.pack("<Q", 0xDB4775248B80FB57)
_TRAILER_SIZE = 5  # compression type, masked crc32c
_BUNDLE_VERSION = 1  # the only version since 2016

# tensorflow/core/framework/types.proto
_DTYPES = {
    1: np.dtype("<f4"),
    2: np.dtype("<f8"),
    3: np.dtype("<i4"),
    4: np.dtype("u1"),
    5: np.dtype("<i2"),
    6: np.dtype("i1"),
    9: np.dtype("<i8"),
    10: np.dtype("?"),
    14: np.dtype(ml_dtypes.bfloat16),
    17: np.dtype("<u2"),
    19: np.dtype("<f2"),
    22: np.dtype("<u4"),
    23: np.dtype("<u8"),
}
_STRING = 7
_NOT_NUMERIC = {_STRING, 20, 21}  # 20 is a resource, 21 a variant


@dataclass(frozen=True, slots=True)
class Child:
    """An edge of the object graph: the attribute `local_name` holds the node `node_id`."""

    node_id: int
    local_name: str


@dataclass(frozen=True, slots=True)
class Attribute:
    """A value saved for a node. A variable has one; `checkpoint_key` is the name of its tensor."""

    name: str
    full_name: str
    checkpoint_key: str


@dataclass(frozen=True, slots=True)
class SlotVariable:
    """A variable `slot_variable_node_id` that an optimizer keeps for another variable."""

    original_variable_node_id: int
    slot_name: str
    slot_variable_node_id: int


@dataclass(frozen=True, slots=True)
class Node:
    """One object of the saved program. Edges may form cycles."""

    children: tuple[Child, ...]
    attributes: tuple[Attribute, ...]
    slot_variables: tuple[SlotVariable, ...]


def read_bundle(prefix: Path) -> dict[str, Tensor]:
    """The numeric tensors of the checkpoint `prefix` (a path without `.index`), in the order of the index.

    Raises SourceError for a damaged or incomplete checkpoint.
    """
    bundle = _Bundle(prefix)
    return {
        name: Tensor(
            name=name,
            shape=entry.shape,
            dtype=_DTYPES[entry.dtype],
            path=bundle.shard(name, entry),
            offset=entry.offset,
            crc32c=_unmask(entry.crc32c),
        )
        for name, entry in bundle.entries.items()
        if entry.dtype in _DTYPES
    }


def read_object_graph(prefix: Path) -> list[Node]:
    """The object graph of the checkpoint `prefix`. Node 0 is the root; every node id is a valid index.

    Raises SourceError for a damaged or incomplete checkpoint, and for one without an object graph.
    """
    bundle = _Bundle(prefix)
    with _in_file(bundle.index):
        entry = bundle.entries.get(GRAPH_KEY)
        if entry is None:
            raise _Malformed("it has no object graph", "Use one written by tf.train.Checkpoint or Keras.")
        if entry.dtype != _STRING or entry.shape or entry.size > MAX_BYTES:
            raise _Malformed("the object graph is not one string of a usable size")
    shard = bundle.shard(GRAPH_KEY, entry)
    with _in_file(shard):
        with shard.open("rb") as file:
            file.seek(entry.offset)
            stored = file.read(entry.size)
        return _graph(_scalar_string(stored, _unmask(entry.crc32c)))


def is_table(path: Path) -> bool:
    """Whether a file ends with the magic number of a checkpoint index."""
    with path.open("rb") as file:
        file.seek(max(0, path.stat().st_size - len(_MAGIC)))
        return file.read() == _MAGIC


class _Malformed(Exception):
    """Raised by the decoders, which do not know the file; `_in_file` turns it into a `SourceError`."""

    def __init__(
        self, problem: str, remedy: str = "The file is damaged or incomplete: get it again."
    ) -> None:
        super().__init__(problem)
        self.problem, self.remedy = problem, remedy


@contextmanager
def _in_file(path: Path) -> Iterator[None]:
    try:
        yield
    except _Malformed as error:
        raise SourceError(path, error.problem, error.remedy) from None
    except FileNotFoundError:
        remedy = f"A checkpoint is {path.name} together with its other .index and .data files: put it there."
        raise SourceError(path, "the file is missing", remedy) from None
    except OSError as error:
        raise SourceError(path, f"cannot read it: {error.strerror}") from error


def _file_size(path: Path) -> int:
    status = path.stat()
    if not S_ISREG(status.st_mode):  # opening a named pipe would block forever
        raise _Malformed("it is not a file", "Name the checkpoint by its prefix, without .index or .data-*.")
    return status.st_size


# The bundle: the meaning of the table's keys and values.


@dataclass(frozen=True, slots=True)
class _Entry:
    """A BundleEntryProto, checked as far as the index alone allows; the crc32c is masked."""

    dtype: int
    shape: tuple[int, ...]
    shard: int
    offset: int
    size: int
    crc32c: int


class _Bundle:
    """The decoded index of a checkpoint; finds the shard of an entry."""

    def __init__(self, prefix: Path) -> None:
        self.prefix = prefix
        self.index = Path(f"{prefix}.index")
        self._shard_sizes: dict[int, int] = {}
        with _in_file(self.index):
            if _file_size(self.index) > MAX_BYTES:
                raise _Malformed(f"it is larger than {MAX_BYTES >> 20} MiB", "It is no checkpoint index.")
            rows = _table(self.index.read_bytes())
            self.shards = _shard_count(rows.pop(b"", None))
            self.entries = {
                (name := _name(key)): _entry(name, value, self.shards) for key, value in rows.items()
            }

    def shard(self, name: str, entry: _Entry) -> Path:
        """The data file of an entry, which is checked to contain all bytes of the entry."""
        path = Path(f"{self.prefix}.data-{entry.shard:05d}-of-{self.shards:05d}")
        with _in_file(path):
            if entry.shard not in self._shard_sizes:
                self._shard_sizes[entry.shard] = _file_size(path)
            if entry.offset + entry.size > self._shard_sizes[entry.shard]:
                require_own(path)
                raise _Malformed(f"it ends before the end of tensor {name!r}")
        return path


def _shard_count(value: bytes | None) -> int:
    if value is None:
        raise _Malformed("the index has no header entry")
    header = _Message(value)
    shards, big_endian, version = header.number(1), header.number(2), header.message(3)
    if big_endian:
        raise _Malformed("its tensors are big endian", "Save it again on a little endian machine.")
    if version.number(2) > _BUNDLE_VERSION:
        raise _Malformed("it needs a newer reader of tensor bundles", "Save it with an older TensorFlow.")
    if not 0 < shards < 1 << 31:
        raise _Malformed(f"it claims to have {shards} data files")
    return shards


def _name(key: bytes) -> str:
    # A slice of a partitioned variable has a binary key, which starts with the number 0 (length 0).
    if key.startswith(b"\0"):
        raise _Malformed("it holds partitioned variables", "Save it again without a partitioner.")
    try:
        return key.decode()
    except UnicodeDecodeError:
        raise _Malformed(f"the tensor name {key!r} is not UTF-8") from None


def _entry(name: str, value: bytes, shards: int) -> _Entry:
    message = _Message(value)
    if message.blobs[7]:
        raise _Malformed(f"tensor {name!r} is stored in slices", "Save it again without a partitioner.")
    entry = _Entry(
        dtype=message.number(1),
        shape=_shape(name, message.message(2)),
        shard=message.number(3),
        offset=message.number(4),
        size=message.number(5),
        crc32c=message.number(6),
    )
    if entry.dtype not in _DTYPES and entry.dtype not in _NOT_NUMERIC:
        raise _Malformed(f"tensor {name!r} has the dtype number {entry.dtype}, which is not supported")
    if entry.shard >= shards:
        raise _Malformed(f"tensor {name!r} lies in data file {entry.shard} of {shards}")
    if entry.offset >= 1 << 63 or entry.size >= 1 << 63:
        raise _Malformed(f"tensor {name!r} has a negative offset or size")
    if entry.dtype in _DTYPES:
        itemsize = _DTYPES[entry.dtype].itemsize
        # NumPy refuses a shape whose nonzero dimensions overflow, even if another one is 0.
        if math.prod(dim or 1 for dim in entry.shape) * itemsize >= 1 << 63:
            raise _Malformed(f"tensor {name!r} has the impossible shape {entry.shape}")
        if math.prod(entry.shape) * itemsize != entry.size:
            raise _Malformed(f"tensor {name!r} of shape {entry.shape} has {entry.size} bytes")
    return entry


def _shape(name: str, message: _Message) -> tuple[int, ...]:
    dims = message.blobs[2]
    if message.number(3) or len(dims) > MAX_RANK:
        raise _Malformed(f"tensor {name!r} has an unknown rank, or one over {MAX_RANK}")
    shape = tuple(_Message(dim).number(1) for dim in dims)
    if any(dim >= 1 << 63 for dim in shape):
        raise _Malformed(f"tensor {name!r} has a negative dimension")
    return shape


def _scalar_string(stored: bytes, crc32c: int) -> bytes:
    """The value of a scalar DT_STRING: a varint length, the length's masked crc32c, then the bytes."""
    length, start = _varint(stored, 0)
    data = stored[start + 4 :]
    if length != len(data):
        raise _Malformed("the object graph's length does not fit its entry")
    # Both checksums cover the length as a fixed 32-bit number; the second one also covers the bytes after it.
    length_crc = google_crc32c.value(struct.pack("<I", length))
    masked = stored[start : start + 4]
    if _unmask(int.from_bytes(masked, "little")) != length_crc:
        raise _Malformed("the object graph's length has a wrong checksum")
    if google_crc32c.extend(length_crc, masked + data) != crc32c:
        raise _Malformed("the object graph has a wrong checksum")
    return data


def _graph(data: bytes) -> list[Node]:
    """Decode a TrackableObjectGraph (tensorflow/core/protobuf/trackable_object_graph.proto)."""
    nodes = _Message(data).blobs[1]
    if not nodes:
        raise _Malformed("the object graph has no nodes")

    def node_id(message: _Message, field: int) -> int:
        number = message.number(field)
        if number >= len(nodes):
            raise _Malformed(f"the object graph refers to node {number} of {len(nodes)}")
        return number

    def node(message: _Message) -> Node:
        return Node(
            children=tuple(Child(node_id(m, 1), m.text(2)) for m in message.messages(1)),
            attributes=tuple(Attribute(m.text(1), m.text(2), m.text(3)) for m in message.messages(2)),
            slot_variables=tuple(
                SlotVariable(node_id(m, 1), m.text(2), node_id(m, 3)) for m in message.messages(3)
            ),
        )

    graph, items = [], 0
    for data in nodes:
        graph.append(node(_Message(data)))
        items += 1 + len(graph[-1].children) + len(graph[-1].attributes) + len(graph[-1].slot_variables)
        if items > MAX_ITEMS:
            raise _Malformed(f"the object graph has more than {MAX_ITEMS} objects and attributes")
    return graph


# The LevelDB table.


def _table(data: bytes) -> dict[bytes, bytes]:
    """All entries of a table by key, in their order."""
    if len(data) < _FOOTER_SIZE or data[-8:] != _MAGIC:
        raise _Malformed("it is not a TensorFlow checkpoint index, or it is cut short")
    footer = data[-_FOOTER_SIZE:-8]
    data = data[:-_FOOTER_SIZE]
    _, pos = _handle(footer, 0)  # the metaindex block; TensorFlow leaves it empty
    index, _ = _handle(footer, pos)
    rows: dict[bytes, bytes] = {}
    last, end = None, 0
    for _, value in _pairs(_block(data, *index)):
        (offset, size), _ = _handle(value, 0)
        # Blocks are written in sequence. Without this check one large block could be read a million times.
        if offset < end:
            raise _Malformed("its data blocks overlap or are out of order")
        end = offset + size + _TRAILER_SIZE
        for key, row in _pairs(_block(data, offset, size)):
            if last is not None and key <= last:
                raise _Malformed("its keys are repeated or out of order")
            if len(rows) == MAX_ENTRIES:
                raise _Malformed(f"it has more than {MAX_ENTRIES} entries", "No known model has as many.")
            rows[key] = row
            last = key
    return rows


def _handle(data: bytes, pos: int) -> tuple[tuple[int, int], int]:
    offset, pos = _varint(data, pos)
    size, pos = _varint(data, pos)
    return (offset, size), pos


def _block(data: bytes, offset: int, size: int) -> bytes:
    """The entries of a block as bytes, after a checksum test and without restart points (for searching)."""
    if size < 4 or offset + size + _TRAILER_SIZE > len(data):
        raise _Malformed("a block lies outside the file")
    end = offset + size
    crc32c = int.from_bytes(data[end + 1 : end + _TRAILER_SIZE], "little")
    if google_crc32c.value(data[offset : end + 1]) != _unmask(crc32c):
        raise _Malformed("a block has a wrong checksum")
    if data[end] != 0:
        raise _Malformed(f"a block is compressed (type {data[end]})", "Save it again with TensorFlow.")
    entries_end = end - 4 - 4 * int.from_bytes(data[end - 4 : end], "little")
    if entries_end < offset:
        raise _Malformed("a block has more restart points than bytes")
    return data[offset:entries_end]


def _pairs(block: bytes) -> Iterator[tuple[bytes, bytes]]:
    """The keys and values of a block; each key shares its first `shared` bytes with the previous key."""
    key, pos = b"", 0
    while pos < len(block):
        shared, pos = _varint(block, pos)
        added, pos = _varint(block, pos)
        length, pos = _varint(block, pos)
        if shared > len(key) or shared + added > MAX_KEY or pos + added + length > len(block):
            raise _Malformed("a block has an entry with a wrong length")
        key = key[:shared] + block[pos : pos + added]
        pos += added + length
        yield key, block[pos - length : pos]


# Protocol buffers (protobuf.dev/programming-guides/encoding) and checksums.


class _Message:
    """The fields of one message by number. An embedded message is decoded when it is accessed."""

    def __init__(self, data: bytes) -> None:
        self.numbers: dict[int, int] = {}
        self.blobs: defaultdict[int, list[bytes]] = defaultdict(list)
        pos = count = 0
        while pos < len(data):
            count += 1
            if count > MAX_ITEMS:
                raise _Malformed(f"a message has more than {MAX_ITEMS} fields")
            tag, pos = _varint(data, pos)
            field, wire_type = tag >> 3, tag & 7
            if wire_type == 0:
                self.numbers[field], pos = _varint(data, pos)
                continue
            if wire_type == 2:
                size, pos = _varint(data, pos)
            else:
                size = {1: 8, 5: 4}.get(wire_type, len(data))  # groups (3, 4) are obsolete: fails below
            value = data[pos : pos + size]
            pos += size
            if pos > len(data):
                raise _Malformed("a message is cut short or has a field of an unknown kind")
            if wire_type == 2:
                self.blobs[field].append(value)
            else:
                self.numbers[field] = int.from_bytes(value, "little")

    def number(self, field: int) -> int:
        """A number, unsigned: a negative one is read as 2**63 or more. 0 if the field is absent."""
        return self.numbers.get(field, 0)

    def text(self, field: int) -> str:
        try:
            return self.blobs[field][-1].decode() if self.blobs[field] else ""
        except UnicodeDecodeError:
            raise _Malformed("the object graph has a name that is not UTF-8") from None

    def message(self, field: int) -> _Message:
        return _Message(b"".join(self.blobs[field]))  # protobuf merges repeated occurrences this way

    def messages(self, field: int) -> Iterator[_Message]:
        return map(_Message, self.blobs[field])


def _varint(data: bytes, pos: int) -> tuple[int, int]:
    """Decode a varint of at most 64 bits (7 bits a byte); returns it and the position after it."""
    value = 0
    for i, byte in enumerate(data[pos : pos + 10]):
        value |= (byte & 127) << (7 * i)
        if byte < 128 and value < 1 << 64:
            return value, pos + i + 1
    raise _Malformed("a number is cut short or has more than 64 bits")


def _unmask(masked: int) -> int:
    """Recover a crc32c, which LevelDB stores rotated by 15 bits and with a constant added."""
    rotated = (masked - 0xA282EAD8) & 0xFFFFFFFF
    return (rotated >> 17 | rotated << 15) & 0xFFFFFFFF
