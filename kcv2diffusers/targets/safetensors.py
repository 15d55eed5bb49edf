"""Layout of a `.safetensors` file: name, shape, dtype and offset of every tensor, known before writing.

The header (8 bytes of length, then JSON padded to a multiple of 8 bytes) follows from this plan. The file is
therefore allocated and its header written first; the tensors follow in any order.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path

import numpy as np

from kcv2diffusers.dtypes import DTYPES, SAFETENSORS
from kcv2diffusers.json_text import write_json
from kcv2diffusers.maps.layouts import core
from kcv2diffusers.pipeline_files import index_name
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.sources.tensor import Tensor
from kcv2diffusers.system.positioned import allocate
from kcv2diffusers.targets.transfer import Job

SHARD = 10_000_000_000
"""Largest size of a weight file in bytes, as in diffusers."""


@dataclass(frozen=True, slots=True)
class Entry:
    """One tensor of a target file, or a piece of one: its name and shape there, and its source.

    `core` are the three axes of the source to reverse, None if the values keep their order. A piece begins at
    row `first` of the tensor.
    """

    name: str
    shape: tuple[int, ...]
    tensor: Tensor
    core: tuple[int, int, int] | None
    first: int = 0


def diffusers_entries(match: Match) -> list[Entry]:
    """Return the diffusers tensors of a part, or their pieces; it may come from Keras or from diffusers."""
    entries = []
    for slot, tensor in match.slots():
        turned = match.keras and slot.variable.reverses
        shape = slot.part_shape(match.dims, keras=False)
        first = slot.rows.first.value(match.dims) or 0 if slot.rows else 0
        entries.append(Entry(slot.target, shape, tensor, core(shape) if turned else None, first))
    return entries


def together(entries: Iterable[Entry], dtype: np.dtype) -> list[Stored]:
    """Return the tensors that entries are, or that their pieces make up, in the order of first occurrence."""
    pieces: dict[str, list[Entry]] = {}
    for entry in entries:
        pieces.setdefault(entry.name, []).append(entry)
    tensors = []
    for name, held in pieces.items():
        held.sort(key=lambda entry: entry.first)
        shape = (sum(entry.shape[0] for entry in held), *held[0].shape[1:]) if held[1:] else held[0].shape
        tensors.append(Stored(name, shape, dtype, tuple(held)))
    return tensors


def common_dtype(tensors: Iterable[Tensor]) -> np.dtype:
    """Return the dtype that all tensors share; float32 if they differ or have another dtype than `DTYPES`."""
    dtypes = {tensor.dtype for tensor in tensors}
    found = dtypes.pop() if len(dtypes) == 1 else DTYPES["float32"]
    return found if found in DTYPES.values() else DTYPES["float32"]


@dataclass(frozen=True, slots=True)
class Stored:
    """One tensor of a target file and its dtype. `entries` are concatenated along the first axis."""

    name: str
    shape: tuple[int, ...]
    dtype: np.dtype
    entries: tuple[Entry, ...]

    @property
    def nbytes(self) -> int:
        """Size in the file in bytes."""
        return math.prod(self.shape) * self.dtype.itemsize


def write_safetensors(path: Path, entries: Sequence[Entry], dtype: np.dtype) -> list[Job]:
    """Allocate the file, write its header, and return the jobs that fill it."""
    return write_stored(path, together(entries, dtype))


def write_shards(path: Path, entries: Sequence[Entry], dtype: np.dtype) -> list[Job]:
    """Write as `write_safetensors` does; more than `SHARD` bytes become several files and their index.

    The names are those of diffusers and transformers: NAME-00001-of-00002.safetensors for the files, and
    NAME.safetensors.index.json for the index. Tensors keep their order; a file is filled as long as the next
    one fits.
    """
    shards: list[list[Stored]] = [[]]
    size = total = 0
    for tensor in together(entries, dtype):
        if shards[-1] and size + tensor.nbytes > SHARD:
            shards.append([])
            size = 0
        shards[-1].append(tensor)
        size, total = size + tensor.nbytes, total + tensor.nbytes
    if len(shards) == 1:
        return write_stored(path, shards[0])
    jobs: list[Job] = []
    places: dict[str, str] = {}
    for number, tensors in enumerate(shards, 1):
        file = path.with_stem(f"{path.stem}-{number:05}-of-{len(shards):05}")
        jobs += write_stored(file, tensors)
        places |= {tensor.name: file.name for tensor in tensors}
    write_json(
        path.with_name(index_name(path.name)), {"metadata": {"total_size": total}, "weight_map": places}
    )
    return jobs


def write_stored(
    path: Path, tensors: Sequence[Stored], metadata: Mapping[str, str] | None = None
) -> list[Job]:
    """Allocate the file, write its header, and return the jobs that fill it, in the order of their offsets.

    The jobs leave no gaps. `metadata` is added to the header's metadata, beside "format".
    """
    header: dict[str, object] = {"__metadata__": {"format": "pt", **(metadata or {})}}
    codes = {dtype: code for code, dtype in SAFETENSORS.items()}
    jobs, offset = [], 0
    for tensor in tensors:
        header[tensor.name] = {
            "dtype": codes[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, offset + tensor.nbytes],
        }
        at = offset
        for entry in tensor.entries:
            jobs.append(Job(entry.name, entry.tensor, entry.core, tensor.dtype, path, at))
            at += math.prod(entry.shape) * tensor.dtype.itemsize
        offset += tensor.nbytes
    text = json.dumps(header, separators=(",", ":")).encode()
    text += b" " * (-len(text) % 8)
    start = 8 + len(text)
    with path.open("wb") as file:
        file.write(len(text).to_bytes(8, "little") + text)
        allocate(file.fileno(), start + offset)
    return [replace(job, offset=start + job.offset) for job in jobs]
