"""A single `.safetensors` file in Stable Diffusion's original layout: its tensors, its metadata, its hash."""

from __future__ import annotations

import hashlib
from collections.abc import Mapping, Sequence
from pathlib import Path

import numpy as np

from kcv2diffusers.maps.original import Place, naming
from kcv2diffusers.progress import Progress
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.targets.safetensors import Entry, Stored, diffusers_entries, write_stored
from kcv2diffusers.targets.stream import run_finite
from kcv2diffusers.targets.transfer import Job

_HASH = "modelspec.hash_sha256"
_NO_HASH = f"0x{0:064x}"
_BLOCK = 1 << 20  # bytes hashed at a time


def to_original(match: Match, dtype: np.dtype) -> list[Stored]:
    """The tensors of a part as a single file has them, from any side."""
    named = naming(match.spec.table.name, match.version)
    pieces: dict[str, list[tuple[Place, Entry]]] = {}
    for entry in diffusers_entries(match):
        place = named.place(entry.name)
        assert place is not None, entry.name  # `maps check` proves it
        pieces.setdefault(named.prefix + place.name, []).append((place, entry))
    tensors = []
    for name, held in pieces.items():
        held.sort(key=lambda found: found[0].piece)
        place, first = held[0]
        tensors.append(Stored(name, place.shape(first.shape), dtype, tuple(entry for _, entry in held)))
    return tensors


def write_single_file(
    path: Path,
    tensors: Sequence[Stored],
    metadata: Mapping[str, str],
    progress: Progress,
    *,
    allow_nonfinite: bool,
) -> int:
    """Write the file, with the SHA-256 of its tensors in the metadata; returns the source bytes read.

    Raises Error if values are not finite and that is not allowed.
    """
    # Larger dtypes first, so that each tensor begins at a multiple of the size of its values.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    jobs = write_stored(path, ordered, {**metadata, _HASH: _NO_HASH})
    with Hashing(path, jobs) as hashing:
        total = run_finite(jobs, progress, allow_nonfinite=allow_nonfinite, after=hashing.after)
        found = hashing.digest()
    _put_hash(path, found)
    return total


def _put_hash(path: Path, digest: str) -> None:
    """Write the hash over the place that the header keeps for it. A quote in a text is escaped there, so no
    title can hold the same bytes.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        at = file.read(length).index(f'"{_HASH}":"{_NO_HASH}"'.encode())
        file.seek(8 + at)
        file.write(f'"{_HASH}":"0x{digest}"'.encode())


class Hashing:
    """The SHA-256 of all that the jobs write into a file, computed behind them while they go on.

    The jobs are given in the order of their offsets, without gaps. The parent process, which only waits for
    them otherwise, hashes what has been written from the start on.
    """

    def __init__(self, path: Path, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.done = bytearray(len(jobs))
        self.next = 0  # the first job whose bytes are not hashed
        self.hash = hashlib.sha256()
        self.file = path.open("rb", buffering=0)
        self.buffer = memoryview(bytearray(_BLOCK))
        self.file.seek(jobs[0].offset if jobs else 0)

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def after(self, number: int) -> None:
        """Called with the number of a job that is done."""
        self.done[number] = True
        while self.next < len(self.jobs) and self.done[self.next]:
            job = self.jobs[self.next]
            left = job.tensor.nbytes // job.tensor.dtype.itemsize * job.dtype.itemsize
            while left:
                count = self.file.readinto(self.buffer[: min(left, _BLOCK)])
                if not count:
                    raise OSError(f"{self.file.name}: was cut while it was written")
                self.hash.update(self.buffer[:count])
                left -= count
            self.next += 1

    def digest(self) -> str:
        """The hash in hexadecimal, when all jobs are done."""
        assert self.next == len(self.jobs)
        return self.hash.hexdigest()
