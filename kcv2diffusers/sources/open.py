"""Checkpoint readers, one a container. `open_sources` finds the right one from the contents."""

from __future__ import annotations

import glob
from collections.abc import Sequence
from pathlib import Path
from typing import BinaryIO

from kcv2diffusers.errors import SourceError, pipeline_given, reading
from kcv2diffusers.maps.tables import specs
from kcv2diffusers.pipeline_files import MODEL_INDEX
from kcv2diffusers.sources import single_file
from kcv2diffusers.sources.foreign import reason, require_own
from kcv2diffusers.sources.pickled import ENDINGS as PICKLED
from kcv2diffusers.sources.source import Source
from kcv2diffusers.sources.tensor_bundle import is_table

_ENDINGS = (".h5", ".hdf5", ".keras", ".weights.json")
SINGLE_FILE = ".safetensors"
_KINDS = (
    "Legacy .h5, whole-model .h5, .weights.h5 (or the .weights.json of its shards), .keras, "
    "SavedModel folders and TensorFlow checkpoints are read."
)


def open_sources(path: Path, *, allow_pickle: bool = False, ema: bool = False) -> list[Source]:
    """The models at `path`: those of a file, a SavedModel or a checkpoint prefix, of all in a folder.

    `allow_pickle` lets PyTorch's restricted unpickler open a `.ckpt` file that is given itself. `ema` takes
    the moving average of the UNet in single files. Raises SourceError if there is none or one cannot be read.
    """
    with reading(path):
        if path.is_file() and allow_pickle and path.suffix in PICKLED:
            return single_file.read_pickled_file(path, ema=ema)
        if path.is_file() and path.suffix == SINGLE_FILE:
            require_own(path)
            return single_file.read_single_file(path, ema=ema)
        return _open(path)


def open_all(paths: Sequence[Path], *, allow_pickle: bool = False, ema: bool = False) -> list[Source]:
    """The models at all `paths`; what takes most of the time is done for several at once.

    `allow_pickle` and `ema` are as in `open_sources`.
    """
    from kcv2diffusers.sources import hdf5

    with hdf5.ahead(paths):
        for spec in specs():
            spec.slots(0)  # which whoever recognises the sources asks for; meanwhile they are read
        return [source for path in paths for source in open_sources(path, allow_pickle=allow_pickle, ema=ema)]


def _open(path: Path) -> list[Source]:
    if not path.exists():
        index = path.with_name(path.name + ".index")
        if index.is_file():
            return _checkpoint(path)
        raise SourceError(path, "no such file or folder.", "Check the path.")
    if path.is_file():
        return _file(path)
    if not path.is_dir():
        raise SourceError(path, "neither a file nor a folder.", "Check the path.")
    if (path / "variables" / "variables.index").is_file():
        require_own(path / "variables" / "variables.index")
        from kcv2diffusers.sources.tensorflow import read_saved_model

        return read_saved_model(path)
    return _folder(path)


def _checkpoint(prefix: Path) -> list[Source]:
    from kcv2diffusers.sources.tensorflow import read_checkpoint

    require_own(Path(f"{prefix}.index"))
    return read_checkpoint(prefix)


def _folder(path: Path) -> list[Source]:
    from kcv2diffusers.sources import hdf5

    if (path / MODEL_INDEX).is_file():
        raise pipeline_given(path)
    if (path / "saved_model.pb").is_file():
        raise SourceError(
            path, "a SavedModel without its variables/ folder.", "Download that folder as well."
        )
    entries = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
    shards = {name for e in entries if e.name.endswith(".weights.json") for name in _shards(e)}
    found: list[Source] = []
    with hdf5.ahead(entries):
        for entry in entries:
            if entry.is_dir():
                if (entry / "saved_model.pb").is_file() or (entry / "variables").is_dir():
                    found += _open(entry)
            elif entry.suffix == ".index" and _is_checkpoint(entry):
                found += _checkpoint(entry.with_suffix(""))
            elif entry.name.endswith(_ENDINGS) and entry.name not in shards:
                found += _file(entry, others=True)
    if not found:
        for entry in filter(Path.is_file, entries):
            if known := reason(entry):
                raise SourceError(entry, *known)
            if entry.name.endswith(_ENDINGS):
                _file(entry)  # which says what it is
        raise SourceError(path, "no checkpoint in this folder.", _KINDS)
    return found


def _is_checkpoint(index: Path) -> bool:
    """Whether an `.index` file in a folder is TensorFlow's, be it damaged: others use that name as well."""
    return any(index.parent.glob(f"{glob.escape(index.stem)}.data-*")) or is_table(index)


def _shards(index: Path) -> list[str]:
    stem = index.name.removesuffix(".weights.json")
    return [p.name for p in index.parent.glob("*.weights.h5") if p.name.startswith(f"{stem}_")]


def _file(path: Path, *, others: bool = False) -> list[Source]:
    """The models in a file; with `others`, none in an HDF5 file that is not Keras'."""
    require_own(path)
    from kcv2diffusers.sources import hdf5, keras3_h5, legacy_h5

    with path.open("rb") as file:
        head = file.read(8)
        if not head:
            raise SourceError(path, "the file is empty.")
        start = next((s for s in (0, 512, 1024, 2048) if _at(file, s) == hdf5.SIGNATURE), None)
    if path.name.endswith(".weights.json"):
        return keras3_h5.read_sharded(path)
    if path.suffix == ".index":
        return _checkpoint(path.with_suffix(""))
    if head[:4] == b"PK\x03\x04":
        return keras3_h5.read_archive(path)
    if start is None:
        unknown = "not a Keras checkpoint (unknown kind of file).", _KINDS
        raise SourceError(path, *(reason(path) or unknown))
    tree = hdf5.read_tree(path)
    models = legacy_h5.read(tree) or keras3_h5.read(tree)
    if not models and not others:
        raise SourceError(path, "an HDF5 file, but not one that Keras saved layers in.", _KINDS)
    return models


def _at(file: BinaryIO, offset: int) -> bytes:
    file.seek(offset)
    return file.read(8)
