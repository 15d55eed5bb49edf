"""A single `.safetensors` file in Stable Diffusion's original layout: tensors, metadata and hash."""

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
    """Return the tensors of a part, which may come from any layout, as they are stored in a single file."""
    named = naming(match.spec.table.name, match.version)
    pieces: dict[str, list[tuple[Place, Entry]]] = {}
    for entry in diffusers_entries(match):
        place = named.place(entry.name)
        assert place is not None, entry.name  # guaranteed by `maps check`
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
    hashed: bool = True,
) -> int:
    """Write the file and return the number of source bytes.

    If `hashed` is set, the metadata contain the SHA-256 of the tensors. `progress` is called with the bytes
    done and in total. Raises Error if values are not finite, unless `allow_nonfinite` is set.
    """
    # Larger dtypes come first, so that each tensor is aligned to its item size.
    ordered = sorted(tensors, key=lambda tensor: -tensor.dtype.itemsize)
    if not hashed:
        jobs = write_stored(path, ordered, metadata)
        return run_finite(jobs, progress, allow_nonfinite=allow_nonfinite)
    jobs = write_stored(path, ordered, {**metadata, _HASH: _NO_HASH})
    with Hashing(path, jobs) as hashing:
        total = run_finite(jobs, progress, allow_nonfinite=allow_nonfinite, after=hashing.after)
        found = hashing.digest()
    _put_hash(path, found)
    return total


def _put_hash(path: Path, digest: str) -> None:
    """Write the hash over its placeholder in the header.

    The search for the placeholder is safe: quotes in metadata are escaped, so no title can contain its bytes.
    """
    with path.open("r+b") as file:
        length = int.from_bytes(file.read(8), "little")
        at = file.read(length).index(f'"{_HASH}":"{_NO_HASH}"'.encode())
        file.seek(8 + at)
        file.write(f'"{_HASH}":"0x{digest}"'.encode())


class Hashing:
    """The SHA-256 of everything that the jobs write into a file, computed while the jobs run.

    The jobs are in the order of their offsets, without gaps. The parent process, which is otherwise idle,
    hashes the part at the start of the file that is completely written.
    """

    def __init__(self, path: Path, jobs: Sequence[Job]) -> None:
        self.jobs = jobs
        self.done = bytearray(len(jobs))
        self.next = 0  # the first job whose bytes are not hashed yet
        self.hash = hashlib.sha256()
        self.file = path.open("rb", buffering=0)
        self.buffer = memoryview(bytearray(_BLOCK))
        self.file.seek(jobs[0].offset if jobs else 0)

    def __enter__(self) -> Hashing:
        return self

    def __exit__(self, *_: object) -> None:
        self.file.close()

    def after(self, number: int) -> None:
        """Mark a job as done, and hash what can be hashed. Raises OSError if the file is truncated."""
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
        """Return the hash in hexadecimal. All jobs must be done."""
        assert self.next == len(self.jobs)
        return self.hash.hexdigest()
