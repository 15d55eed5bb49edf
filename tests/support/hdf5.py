"""HDF5 files: what they hold, and the same written another way."""

from __future__ import annotations

from pathlib import Path

import h5py
import numpy as np


def datasets(file: Path) -> dict[str, np.ndarray]:
    found: dict[str, np.ndarray] = {}
    with h5py.File(file) as opened:
        opened.visititems(
            lambda name, item: found.update({name: item[()]} if isinstance(item, h5py.Dataset) else {})
        )
    return found


def compress(source: Path, target: Path) -> None:
    """The same HDF5 file with its matrices in compressed, shuffled chunks."""
    with h5py.File(source) as old, h5py.File(target, "w") as new:
        for name, value in old.attrs.items():
            new.attrs[name] = value

        def copy(name: str, item: h5py.Group | h5py.Dataset) -> None:
            if isinstance(item, h5py.Dataset):
                packed = {"compression": "gzip", "shuffle": True} if item.ndim > 1 else {}
                made = new.create_dataset(name, data=item[()], **packed)
            else:
                made = new.create_group(name)
            for key, value in item.attrs.items():
                made.attrs[key] = value

        old.visititems(copy)
