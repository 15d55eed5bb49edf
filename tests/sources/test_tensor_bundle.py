"""The tensor bundle reader against TensorFlow's own, and against files nobody honest would write."""

from __future__ import annotations

import os
import random
import struct
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import google_crc32c
import ml_dtypes
import numpy as np
import pytest

from kcv2diffusers.errors import SourceError
from kcv2diffusers.sources import tensor_bundle
from kcv2diffusers.sources.tensor import Tensor
from kcv2diffusers.sources.tensor_bundle import read_bundle, read_object_graph

DTYPES = {
    *("float16", "bfloat16", "float32", "float64", "bool"),
    *("int8", "int16", "int32", "int64", "uint8", "uint16", "uint32", "uint64"),
}


@pytest.fixture(scope="module")
def tf() -> Any:
    import tensorflow as tf

    return tf


@pytest.fixture(scope="module")
def protos(tf: Any) -> Any:
    from tensorflow.core.protobuf import tensor_bundle_pb2, trackable_object_graph_pb2

    return SimpleNamespace(
        Header=tensor_bundle_pb2.BundleHeaderProto,
        Entry=tensor_bundle_pb2.BundleEntryProto,
        Graph=trackable_object_graph_pb2.TrackableObjectGraph,
    )


@pytest.fixture(scope="module")
def checkpoint(tf: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Every dtype and some odd shapes in nested objects, with an optimizer's slots."""
    rng = np.random.default_rng(7)
    root = tf.train.Checkpoint(step=tf.Variable(2**40 + 1, dtype=tf.int64), note=tf.Variable(["a", "", "ü"]))
    for dtype in sorted(DTYPES):
        layer = tf.Module()
        layer.kernel = tf.Variable(tf.cast(rng.integers(0, 100, (3, 5)), dtype))
        layer.scalar = tf.Variable(tf.cast(rng.integers(0, 100), dtype))
        layer.empty = tf.Variable(tf.zeros((0, 7), dtype))
        setattr(root, dtype, layer)
    root.list = [tf.Variable(rng.normal(size=(1, 2, 3, 4)).astype("f4")), root.float32]
    optimizer = root.optimizer = tf.compat.v1.train.MomentumOptimizer(0.1, 0.9)
    optimizer.apply_gradients([(tf.ones((3, 5)), root.float32.kernel)])
    return Path(root.write(str(tmp_path_factory.mktemp("checkpoint") / "model")))


@pytest.fixture(scope="module")
def large(tf: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """So many names that the index has several blocks."""
    rng = random.Random(1)
    names = [f"{rng.randbytes(150).hex()}/naïve/{i}" for i in range(2500)]
    return save(tf, tmp_path_factory.mktemp("large") / "model", {name: [i] for i, name in enumerate(names)})


@pytest.fixture(scope="module")
def sharded(tf: Any, tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("sharded")
    parts = [
        save(tf, folder / f"part{i}", {f"{name}{i}": np.arange(i + 2, dtype="f4") for name in "abc"})
        for i in range(3)
    ]
    tf.raw_ops.MergeV2Checkpoints(
        checkpoint_prefixes=[str(part) for part in parts], destination_prefix=str(folder / "model")
    )
    return folder / "model"


def save(tf: Any, prefix: Path, tensors: dict[str, Any], slices: str = "") -> Path:
    tf.raw_ops.SaveV2(
        prefix=str(prefix),
        tensor_names=list(tensors),
        shape_and_slices=[slices] * len(tensors),
        tensors=[tf.constant(value) for value in tensors.values()],
    )
    return prefix


def stored_bytes(tensor: Tensor) -> bytes:
    assert tensor.offset is not None
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset)
        data = file.read(tensor.nbytes)
    assert len(data) == tensor.nbytes
    return data


def assert_same_as_tensorflow(tf: Any, prefix: Path) -> dict[str, Tensor]:
    tensors = read_bundle(prefix)
    reader = tf.train.load_checkpoint(str(prefix))
    dtypes = reader.get_variable_to_dtype_map()
    assert set(tensors) == {name for name, dtype in dtypes.items() if dtype != tf.string}
    assert list(tensors) == sorted(tensors, key=str.encode)
    for name, tensor in tensors.items():
        array = reader.get_tensor(name)
        assert tensor.name == name
        assert tensor.dtype == dtypes[name].as_numpy_dtype
        assert tensor.dtype.byteorder in "<|="
        assert list(tensor.shape) == reader.get_variable_to_shape_map()[name]
        data = stored_bytes(tensor)
        assert data == np.asarray(array).tobytes()
        assert tensor.crc32c == google_crc32c.value(data)
    return tensors


@pytest.mark.slow
def test_every_dtype_and_shape(tf: Any, checkpoint: Path) -> None:
    tensors = assert_same_as_tensorflow(tf, checkpoint)
    assert {str(tensor.dtype) for tensor in tensors.values()} == DTYPES
    assert {(), (3, 5), (0, 7), (1, 2, 3, 4)} <= {tensor.shape for tensor in tensors.values()}
    assert tensors["bfloat16/kernel/.ATTRIBUTES/VARIABLE_VALUE"].dtype == ml_dtypes.bfloat16
    step = tensors["step/.ATTRIBUTES/VARIABLE_VALUE"]
    assert np.frombuffer(stored_bytes(step), step.dtype) == [2**40 + 1]
    assert "note/.ATTRIBUTES/VARIABLE_VALUE" not in tensors


def test_several_index_blocks(tf: Any, large: Path) -> None:
    index = large.with_name("model.index").read_bytes()
    footer, at, (start, size) = index[-48:], 0, (0, 0)
    for _ in range(2):
        (start, size), at = tensor_bundle._handle(footer, at)
    assert len(list(tensor_bundle._pairs(tensor_bundle._block(index, start, size)))) >= 3
    tensors = read_bundle(large)
    assert len(tensors) == 2500
    reader = tf.train.load_checkpoint(str(large))
    for name, tensor in list(tensors.items())[::10]:
        assert stored_bytes(tensor) == reader.get_tensor(name).tobytes()
    assert sorted(np.frombuffer(stored_bytes(t), t.dtype)[0] for t in tensors.values()) == list(range(2500))


def test_several_shards(tf: Any, sharded: Path) -> None:
    tensors = assert_same_as_tensorflow(tf, sharded)
    assert len(tensors) == 9
    assert {t.path.name for t in tensors.values()} == {f"model.data-0000{i}-of-00003" for i in range(3)}


def test_symlinked_files_are_read(tmp_path: Path, sharded: Path) -> None:
    for file in sharded.parent.iterdir():
        (tmp_path / file.name).symlink_to(file)
    linked = read_bundle(tmp_path / "model")
    assert [stored_bytes(t) for t in linked.values()] == [
        stored_bytes(t) for t in read_bundle(sharded).values()
    ]


def test_object_graph(tf: Any, protos: Any, checkpoint: Path) -> None:
    stored = tf.train.load_checkpoint(str(checkpoint)).get_tensor(tensor_bundle.GRAPH_KEY)
    expected = protos.Graph.FromString(stored).nodes
    nodes = read_object_graph(checkpoint)
    assert len(nodes) == len(expected) > 40
    for ours, theirs in zip(nodes, expected, strict=True):
        assert [(c.node_id, c.local_name) for c in ours.children] == [
            (c.node_id, c.local_name) for c in theirs.children
        ]
        assert [(a.name, a.full_name, a.checkpoint_key) for a in ours.attributes] == [
            (a.name, a.full_name, a.checkpoint_key) for a in theirs.attributes
        ]
        assert [
            (s.original_variable_node_id, s.slot_name, s.slot_variable_node_id) for s in ours.slot_variables
        ] == [
            (s.original_variable_node_id, s.slot_name, s.slot_variable_node_id) for s in theirs.slot_variables
        ]
    assert [slot.slot_name for node in nodes for slot in node.slot_variables] == ["momentum"]

    def walk(*names: str) -> int:
        node_id = 0
        for name in names:
            node_id = {c.local_name: c.node_id for c in nodes[node_id].children}[name]
        return node_id

    assert walk("list", "1", "kernel") == walk("float32", "kernel")
    (kernel,) = nodes[walk("float32", "kernel")].attributes
    assert read_bundle(checkpoint)[kernel.checkpoint_key].shape == (3, 5)


def test_no_object_graph(sharded: Path) -> None:
    with pytest.raises(SourceError, match="no object graph"):
        read_object_graph(sharded)


def test_partitioned_variable_is_refused(tf: Any, tmp_path: Path) -> None:
    save(tf, tmp_path / "model", {"x": np.ones((2, 3), "f4")}, slices="4 3 0,2:-")
    with pytest.raises(SourceError, match="partitioned"):
        read_bundle(tmp_path / "model")


# Files of our own making. `write_bundle` must be right, or every refusal below is for a wrong reason:
# `test_our_bundles_are_good` has TensorFlow read one.


def varint(value: int) -> bytes:
    data = bytearray()
    while value > 127:
        data.append(value & 127 | 128)
        value >>= 7
    return bytes([*data, value])


def mask(crc32c: int) -> int:
    return ((crc32c >> 15 | crc32c << 17) + 0xA282EAD8) & 0xFFFFFFFF


def masked_crc(data: bytes) -> int:
    return mask(google_crc32c.value(data))


def entries(rows: list[tuple[bytes, bytes]]) -> bytes:
    """The rows of a block, sharing prefixes as a real one would."""
    data, last = b"", b""
    for key, value in rows:
        shared = max(n for n in range(len(key) + 1) if key[:n] == last[:n] and n <= len(last))
        data += varint(shared) + varint(len(key) - shared) + varint(len(value)) + key[shared:] + value
        last = key
    return data


def block(body: bytes, kind: int = 0) -> bytes:
    data = body + struct.pack("<II", 0, 1)
    return data + bytes([kind]) + struct.pack("<I", masked_crc(data + bytes([kind])))


def table(*blocks: bytes, handles: list[tuple[int, int]] | None = None) -> bytes:
    """A table of blocks; TensorFlow wants index keys no smaller than the keys of their blocks."""
    data, found = b"", []
    for part in blocks:
        found.append((len(data), len(part) - 5))
        data += part
    keys = [f"x{i:05d}".encode() for i in range(len(handles or found))]
    index = block(
        entries([(key, varint(a) + varint(b)) for key, (a, b) in zip(keys, handles or found, strict=True)])
    )
    meta = block(b"")
    footer = varint(len(data)) + varint(len(meta) - 5)
    footer += varint(len(data + meta)) + varint(len(index) - 5)
    return data + meta + index + footer.ljust(40, b"\0") + struct.pack("<Q", 0xDB4775248B80FB57)


def write_bundle(prefix: Path, index: bytes, data: bytes) -> Path:
    Path(f"{prefix}.index").write_bytes(index)
    Path(f"{prefix}.data-00000-of-00001").write_bytes(data)
    return prefix


class Made:
    """A small good bundle as protos, to be spoilt: a float32 `w` of shape (2, 3) and an object graph."""

    def __init__(self, protos: Any) -> None:
        self.graph = protos.Graph()
        for children in ([(1, "w"), (0, "self")], []):
            node = self.graph.nodes.add()
            for node_id, name in children:
                node.children.add(node_id=node_id, local_name=name)
        self.graph.nodes[1].attributes.add(name="VARIABLE_VALUE", full_name="w", checkpoint_key="w")
        self.graph.nodes[0].slot_variables.add(slot_name="m")
        self.header = protos.Header(num_shards=1)
        self.header.version.producer = 1
        weights = np.arange(6, dtype="<f4").tobytes()
        self.w = protos.Entry(dtype=1, size=24, crc32c=masked_crc(weights))
        self.w.shape.dim.add(size=2)
        self.w.shape.dim.add(size=3)
        self.data = weights
        self.entry = protos.Entry(dtype=7, offset=24)

    def store_graph(self, graph: bytes) -> None:
        crc = google_crc32c.value(struct.pack("<I", len(graph)))
        tail = struct.pack("<I", mask(crc)) + graph
        self.data = self.data[:24] + varint(len(graph)) + tail
        self.entry.size = len(self.data) - 24
        self.entry.crc32c = mask(google_crc32c.extend(crc, tail))

    def rows(self) -> list[tuple[bytes, bytes]]:
        return [
            (b"", self.header.SerializeToString()),
            (tensor_bundle.GRAPH_KEY.encode(), self.entry.SerializeToString()),
            (b"w", self.w.SerializeToString()),
        ]

    def index(self) -> bytes:
        return table(block(entries(self.rows())))


@pytest.fixture
def made(protos: Any) -> Made:
    made = Made(protos)
    made.store_graph(made.graph.SerializeToString())
    return made


def test_our_bundles_are_good(tf: Any, tmp_path: Path, made: Made) -> None:
    prefix = write_bundle(tmp_path / "model", made.index(), made.data)
    assert list(assert_same_as_tensorflow(tf, prefix)) == ["w"]
    stored = tf.train.load_checkpoint(str(prefix)).get_tensor(tensor_bundle.GRAPH_KEY)
    assert stored == made.graph.SerializeToString()
    assert [c.local_name for c in read_object_graph(prefix)[0].children] == ["w", "self"]


BAD_ENTRIES: list[tuple[str, Callable[[Made], Any]]] = [
    ("big endian", lambda m: setattr(m.header, "endianness", 1)),
    ("newer reader", lambda m: setattr(m.header.version, "min_consumer", 2)),
    ("0 data files", lambda m: setattr(m.header, "num_shards", 0)),
    ("data files", lambda m: setattr(m.header, "num_shards", -1)),
    ("model.data-00000-of-00002: the file is missing", lambda m: setattr(m.header, "num_shards", 2)),
    ("data file 1 of 1", lambda m: setattr(m.w, "shard_id", 1)),
    ("data file", lambda m: setattr(m.w, "shard_id", -1)),
    ("ends before", lambda m: setattr(m.w, "offset", len(m.data) - 23)),
    ("ends before", lambda m: setattr(m.w, "offset", 2**63 - 1)),
    ("negative offset", lambda m: setattr(m.w, "offset", -1)),
    ("negative offset or size", lambda m: setattr(m.w, "size", -24)),
    ("has 23 bytes", lambda m: setattr(m.w, "size", 23)),
    ("has 24 bytes", lambda m: setattr(m.w, "dtype", 2)),
    ("dtype number 0", lambda m: setattr(m.w, "dtype", 0)),
    ("dtype number 11,", lambda m: setattr(m.w, "dtype", 11)),
    ("negative dimension", lambda m: setattr(m.w.shape.dim[0], "size", -2)),
    ("impossible shape", lambda m: setattr(m.w.shape.dim[0], "size", 2**62)),
    ("impossible shape", lambda m: (m.w.shape.dim.add(size=2**61), m.w.shape.dim.add(size=0))),
    ("unknown rank", lambda m: setattr(m.w.shape, "unknown_rank", True)),
    ("unknown rank", lambda m: [m.w.shape.dim.add(size=1) for _ in range(31)]),
    ("stored in slices", lambda m: m.w.slices.add()),
]


@pytest.mark.parametrize(("problem", "spoil"), BAD_ENTRIES)
def test_bad_entries_are_refused(
    tmp_path: Path, made: Made, problem: str, spoil: Callable[[Made], Any]
) -> None:
    spoil(made)
    prefix = write_bundle(tmp_path / "model", made.index(), made.data)
    with pytest.raises(SourceError, match=problem):
        read_bundle(prefix)


def bad_tables(made: Made) -> list[tuple[str, bytes]]:
    rows, good = made.rows(), made.index()
    body = entries(rows)
    one = block(body)
    restarts = body + struct.pack("<I", len(body))
    restarts += b"\0" + struct.pack("<I", masked_crc(restarts + b"\0"))
    wrong_crc = bytearray(good)
    wrong_crc[len(one) - 1] ^= 1
    return [
        ("not a TensorFlow checkpoint index", b""),
        ("not a TensorFlow checkpoint index", good[:-1]),
        ("outside the file", good[-48:]),
        ("wrong checksum", bytes(wrong_crc)),
        ("compressed", table(block(body, kind=1))),
        ("restart points", table(restarts)),
        ("no header", table(block(b""))),
        ("no header", table(block(entries(rows[1:])))),
        ("repeated or out of order", table(block(entries([*rows, rows[-1]])))),
        ("repeated or out of order", table(block(entries(rows[::-1])))),
        ("repeated or out of order", table(one, one)),
        ("overlap", table(one, handles=[(0, len(one) - 5)] * 2)),
        ("outside the file", table(one, handles=[(0, 2**40)])),
        ("outside the file", table(one, handles=[(2**63, 2**63)])),
        ("64 bits", table(one, handles=[(2**64, 10)])),
        ("64 bits", table(block(b"\x80" * 20))),
        ("wrong length", table(block(b"\0\x7f\0"))),
        ("wrong length", table(block(b"\1\1\0a"))),
        ("wrong length", table(block(entries([*rows, (b"x" * 2049, b"")])))),
        ("not UTF-8", table(block(entries([*rows, (b"\xff", rows[-1][1])])))),
        ("partitioned", table(block(entries([rows[0], (b"\0x", b""), *rows[1:]])))),
        ("more than", table(block(b"".join(b"\0\4\0" + struct.pack(">I", i) for i in range(1 << 17))))),
        ("cut short", table(block(entries([*rows, (b"x", b"\x0a\x05")])))),
        ("unknown kind", table(block(entries([*rows, (b"x", b"\x0b")])))),
    ]


def test_bad_tables_are_refused(tmp_path: Path, made: Made) -> None:
    for problem, index in bad_tables(made):
        prefix = write_bundle(tmp_path / "model", index, made.data)
        for read in (read_bundle, read_object_graph):
            with pytest.raises(SourceError, match=problem):
                read(prefix)


def test_bad_files_are_refused(tmp_path: Path, made: Made) -> None:
    prefix = tmp_path / "model"
    with pytest.raises(SourceError, match=r"model\.index: the file is missing"):
        read_bundle(prefix)
    write_bundle(prefix, made.index(), made.data)
    assert list(read_bundle(prefix)) == ["w"]

    shard = tmp_path / "model.data-00000-of-00001"
    shard.unlink()
    for read in (read_bundle, read_object_graph):
        with pytest.raises(SourceError, match=r"model\.data-00000-of-00001: the file is missing"):
            read(prefix)
    os.mkfifo(shard)
    with pytest.raises(SourceError, match="not a file"):
        read_object_graph(prefix)

    index = tmp_path / "model.index"
    with index.open("r+b") as file:
        file.truncate(tensor_bundle.MAX_BYTES + 1)
    with pytest.raises(SourceError, match="larger than"):
        read_bundle(prefix)
    index.unlink()
    index.mkdir()
    with pytest.raises(SourceError, match="not a file"):
        read_bundle(prefix)
    with pytest.raises(SourceError, match="cannot read it: File name too long"):
        read_bundle(tmp_path / ("x" * 300))


BAD_GRAPHS: list[tuple[str, Callable[[Made], Any]]] = [
    ("node 2 of 2", lambda m: setattr(m.graph.nodes[0].children[0], "node_id", 2)),
    ("refers to node", lambda m: setattr(m.graph.nodes[0].children[0], "node_id", -1)),
    ("node 9 of 2", lambda m: setattr(m.graph.nodes[0].slot_variables[0], "slot_variable_node_id", 9)),
    ("node 9 of 2", lambda m: setattr(m.graph.nodes[0].slot_variables[0], "original_variable_node_id", 9)),
    ("no nodes", lambda m: m.graph.Clear()),
    ("more than 1000 objects", lambda m: [m.graph.nodes.add() for _ in range(997)]),
    ("more than 1000 objects", lambda m: [m.graph.nodes[1].children.add() for _ in range(997)]),
    ("more than 1000 fields", lambda m: [m.graph.nodes[1].children.add() for _ in range(1001)]),
]


@pytest.mark.parametrize(("problem", "spoil"), BAD_GRAPHS)
def test_bad_graphs_are_refused(
    tmp_path: Path,
    made: Made,
    monkeypatch: pytest.MonkeyPatch,
    problem: str,
    spoil: Callable[[Made], Any],
) -> None:
    monkeypatch.setattr(tensor_bundle, "MAX_ITEMS", 1000)
    spoil(made)
    made.store_graph(made.graph.SerializeToString())
    prefix = write_bundle(tmp_path / "model", made.index(), made.data)
    assert list(read_bundle(prefix)) == ["w"]
    with pytest.raises(SourceError, match=problem):
        read_object_graph(prefix)


@pytest.mark.parametrize(
    ("problem", "spoil"),
    [
        ("usable size", lambda m: m.entry.shape.dim.add(size=1)),
        ("usable size", lambda m: setattr(m.entry, "size", tensor_bundle.MAX_BYTES + 1)),
        ("usable size", lambda m: m.entry.CopyFrom(m.w)),
        ("ends before", lambda m: setattr(m.entry, "size", m.entry.size + 1)),
        ("length does not fit", lambda m: setattr(m.entry, "size", m.entry.size - 1)),
        ("64 bits", lambda m: setattr(m.entry, "size", 0)),
        ("wrong checksum", lambda m: setattr(m.entry, "crc32c", m.entry.crc32c ^ 1)),
    ],
)
def test_a_badly_stored_graph_is_refused(
    tmp_path: Path, made: Made, problem: str, spoil: Callable[[Made], Any]
) -> None:
    spoil(made)
    prefix = write_bundle(tmp_path / "model", made.index(), made.data)
    with pytest.raises(SourceError, match=problem):
        read_object_graph(prefix)


# Damage by the thousand.


def copy_of(checkpoint: Path, folder: Path) -> Path:
    """The checkpoint with an index of its own and links to its shards."""
    for file in checkpoint.parent.iterdir():
        (folder / file.name).symlink_to(file)
    (folder / "model.index").unlink()
    return folder / "model"


def layout(prefix: Path) -> list[tuple[Any, ...]]:
    return [(t.name, t.shape, t.dtype, t.offset, t.crc32c, t.path) for t in read_bundle(prefix).values()]


def test_truncated_index_is_refused(tmp_path: Path, checkpoint: Path, large: Path) -> None:
    for number, source in enumerate((checkpoint, large)):
        folder = tmp_path / str(number)
        folder.mkdir()
        prefix = copy_of(source, folder)
        good = source.with_name("model.index").read_bytes()
        (folder / "model.index").write_bytes(good)
        assert layout(prefix)
        every = range(len(good)) if len(good) < 10_000 else random.Random(2).sample(range(len(good)), 200)
        for length in sorted(every, reverse=True):
            os.truncate(folder / "model.index", length)
            with pytest.raises(SourceError):
                read_bundle(prefix)
        for length in random.Random(3).sample(range(len(good) - 48), 40):
            (folder / "model.index").write_bytes(good[:length] + good[-48:])
            with pytest.raises(SourceError):
                read_bundle(prefix)


def test_flipped_bits_in_the_index_never_change_the_result(tmp_path: Path, checkpoint: Path) -> None:
    prefix = copy_of(checkpoint, tmp_path)
    index = tmp_path / "model.index"
    good = checkpoint.with_name("model.index").read_bytes()
    index.write_bytes(good)
    expected, graph = layout(prefix), read_object_graph(prefix)
    rng, refused = random.Random(3), 0
    for i in range(1500):
        bad = bytearray(good)
        # Half of them in the footer and the index block, where they do the most harm.
        bad[rng.randrange(len(bad)) if i % 2 else -rng.randrange(1, 120)] ^= 1 << rng.randrange(8)
        index.write_bytes(bad)
        try:
            assert layout(prefix) == expected
            assert read_object_graph(prefix) == graph
        except SourceError:
            refused += 1
    assert 1000 < refused < 1500  # some bytes of the footer are padding


def test_flipped_bits_in_the_object_graph_are_refused(tmp_path: Path, made: Made) -> None:
    prefix = write_bundle(tmp_path / "model", made.index(), made.data)
    assert len(read_object_graph(prefix)) == 2
    for at in range(24, len(made.data)):
        bad = bytearray(made.data)
        bad[at] ^= 1 << at % 8
        (tmp_path / "model.data-00000-of-00001").write_bytes(bad)
        with pytest.raises(SourceError):
            read_object_graph(prefix)


def spoilt(rng: random.Random, data: bytes) -> bytes:
    bad = bytearray(data)
    for _ in range(rng.randint(1, 3)):
        at = rng.randrange(len(bad))
        match rng.randrange(4):
            case 0:
                bad[at] ^= 1 << rng.randrange(8)
            case 1:
                bad[at] = rng.choice([0, 1, 0x7F, 0x80, 0xFF])
            case 2:
                bad[at:at] = rng.choice([b"\xff" * 9, b"\xff" * 9 + b"\x01", rng.randbytes(3)])
            case _:
                del bad[at : at + rng.randint(1, 3)]
                bad = bad or bytearray(1)
    return bytes(bad)


def assert_well_formed(prefix: Path, size: int) -> None:
    for name, tensor in read_bundle(prefix).items():
        assert tensor.name == name
        assert tensor.offset is not None and tensor.crc32c is not None
        assert 0 <= tensor.offset <= tensor.offset + tensor.nbytes <= size
        assert 0 <= tensor.crc32c < 1 << 32
        assert tensor.path == Path(f"{prefix}.data-00000-of-00001")
        # numpy accepts every shape we do
        np.frombuffer(stored_bytes(tensor), np.uint8).view(tensor.dtype).reshape(tensor.shape)


def test_spoilt_entries_under_good_checksums(tmp_path: Path, made: Made) -> None:
    """What a checksum cannot catch: the one who made the file made the checksums too."""
    rng, outcomes = random.Random(4), {"read": 0, "refused": 0}
    prefix = write_bundle(tmp_path / "model", made.index(), made.data)
    rows = made.rows()
    for i in range(2000):
        if i % 2:
            index = table(block(spoilt(rng, entries(rows))))
        else:
            row = rng.randrange(len(rows))
            key, value = rows[row]
            index = table(block(entries([*rows[:row], (key, spoilt(rng, value)), *rows[row + 1 :]])))
        (tmp_path / "model.index").write_bytes(index)
        try:
            assert_well_formed(prefix, len(made.data))
            outcomes["read"] += 1
        except SourceError:
            outcomes["refused"] += 1
    assert min(outcomes.values()) > 200, outcomes


def test_spoilt_graphs_under_good_checksums(tmp_path: Path, made: Made) -> None:
    rng, outcomes = random.Random(5), {"read": 0, "refused": 0}
    prefix = tmp_path / "model"
    good = made.graph.SerializeToString()
    for _ in range(1200):
        made.store_graph(spoilt(rng, good))
        write_bundle(prefix, made.index(), made.data)
        try:
            nodes = read_object_graph(prefix)
        except SourceError:
            outcomes["refused"] += 1
            continue
        outcomes["read"] += 1
        assert nodes
        for node in nodes:
            assert all(child.node_id < len(nodes) for child in node.children)
            assert all(slot.slot_variable_node_id < len(nodes) for slot in node.slot_variables)
    assert min(outcomes.values()) > 50, outcomes
