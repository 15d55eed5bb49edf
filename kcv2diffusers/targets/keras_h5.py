"""Weight files for Keras, laid out in advance: HDF5 datasets are allocated empty and filled by `stream`.

Keras loads a Keras 3 `.weights.h5` by path, and a legacy `.h5` by the order of layers and weights. Both are
defined by the slots of a weight map. h5py writes the structure and returns the file offset of each dataset.
"""

from __future__ import annotations

import os
import re
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from dataclasses import replace
from functools import partial
from pathlib import Path

import h5py
import numpy as np

from kcv2diffusers.dtypes import DTYPES
from kcv2diffusers.maps.layouts import core
from kcv2diffusers.maps.tables import Slot
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.targets.transfer import Job

# Keras treats a file without a version as one of Keras 1, and transposes its kernels.
_LEGACY_VERSION = "2.12.0"
_DTYPE = DTYPES["float32"]


def write_weights_h5(path: Path, *matches: Match, whole: bool = False) -> list[Job]:
    """Lay out a `.weights.h5` (float32) with these parts and return the jobs that fill it.

    If `whole`, the parts are at their places in a whole model; else the layers of a model are at the root.
    """
    with _new_file(path) as file:
        return [
            job
            for match in matches
            for job in _lay_out(file, path, match, partial(_path, _place(match, whole)))
        ]


def _place(match: Match, whole: bool) -> str:
    """Return the group of a file that holds a part; one without a group of layers is always at its place."""
    own_group = match.spec.table.groups[match.part]
    return match.spec.place if whole or not own_group else ""


def _path(place: str, slot: Slot) -> str:
    return f"{place}/{slot.keras_name}".lstrip("/")


def write_legacy_h5(path: Path, *matches: Match) -> list[Job]:
    """Lay out a legacy `.h5` (float32) of one part and return the jobs that fill it.

    Layers and weights have the names that Keras gives them in a new session.
    """
    (match,) = matches
    layers: dict[str, list[str]] = {}

    def name(slot: Slot) -> str:
        layer = f"{slot.layer}_{slot.ordinal}" if slot.ordinal else slot.layer
        inner = f"{slot.stem}_{slot.rank}" if slot.rank else slot.stem
        weight = "/".join([layer, *([inner] if slot.path else []), f"{slot.variable.name}:0"])
        layers.setdefault(layer, []).append(weight)
        return f"{layer}/{weight}"

    with _new_file(path) as file:
        jobs = list(_lay_out(file, path, match, name))
        file.attrs["layer_names"] = [layer.encode() for layer in layers]
        file.attrs["backend"] = b"tensorflow"
        file.attrs["keras_version"] = _LEGACY_VERSION.encode()
        for layer, weights in layers.items():
            file[layer].attrs["weight_names"] = [weight.encode() for weight in weights]
    return jobs


@contextmanager
def _new_file(path: Path) -> Iterator[h5py.File]:
    try:
        with h5py.File(path, "w") as file:
            yield file
    except (RuntimeError, OSError) as error:  # h5py gives the system's errno only in the message
        found = re.search(r"errno = (\d+)", str(error))
        if found is None:
            raise
        raise OSError(int(found[1]), os.strerror(int(found[1])), str(path)) from error


def lay_out(path: Path, arrays: Iterable[tuple[str, tuple[int, ...], np.dtype]]) -> list[int]:
    """Create an HDF5 file of empty datasets (name, shape, dtype) and return their offsets in bytes.

    A dtype that HDF5 does not have, such as bfloat16, is stored as an opaque type of the same size.
    """
    with _new_file(path) as file:
        create = _creator(file)
        return [
            create(name, shape, dtype if dtype.isbuiltin == 1 else np.dtype(f"V{dtype.itemsize}"))
            for name, shape, dtype in arrays
        ]


def _lay_out(file: h5py.File, path: Path, match: Match, name: Callable[[Slot], str]) -> Iterator[Job]:
    create = _creator(file)
    offsets: dict[str, int] = {}
    for slot, tensor in match.slots():
        place, shape = name(slot), slot.whole_shape(match.dims)
        if place not in offsets:
            offsets[place] = create(place, shape, np.dtype(_DTYPE))
        turned = slot.variable.reverses and not match.keras
        axes = core(slot.part_shape(match.dims, keras=False))[::-1] if turned else None
        job = Job(slot.target, tensor, axes, np.dtype(_DTYPE), path, offsets[place])
        if slot.columns is not None:
            first = slot.columns.first.value(match.dims) or 0
            pitch = shape[-1] if len(shape) > 1 else None
            job = replace(job, offset=job.offset + first * _DTYPE.itemsize, pitch=pitch)
        yield job


def _creator(file: h5py.File) -> Callable[[str, tuple[int, ...], np.dtype], int]:
    """Return a function that adds an empty dataset to `file` and returns its offset in bytes."""
    settings = h5py.h5p.create(h5py.h5p.DATASET_CREATE)
    settings.set_alloc_time(h5py.h5d.ALLOC_TIME_EARLY)
    settings.set_fill_time(h5py.h5d.FILL_TIME_NEVER)
    settings.set_obj_track_times(False)  # reproducible: the same pipeline gives the same bytes
    links = h5py.h5p.create(h5py.h5p.LINK_CREATE)
    links.set_create_intermediate_group(True)

    def create(name: str, shape: tuple[int, ...], dtype: np.dtype) -> int:
        space, kind = h5py.h5s.create_simple(shape), h5py.h5t.py_create(dtype)
        return int(h5py.h5d.create(file.id, name.encode(), kind, space, settings, links).get_offset())

    return create


WRITERS = {"weights.h5": write_weights_h5, "h5": write_legacy_h5}
