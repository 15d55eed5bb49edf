"""Open the models at a path.

`READERS` has one entry for each container, in the order in which they are tried. A new container needs one
more entry.
"""

from __future__ import annotations

import glob
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import NamedTuple

from kcv2diffusers.errors import SourceError, pipeline_given, reading
from kcv2diffusers.maps.tables import specs
from kcv2diffusers.pipeline_files import MODEL_INDEX
from kcv2diffusers.sources import single_file
from kcv2diffusers.sources.foreign import reason, require_own
from kcv2diffusers.sources.pickled import ENDINGS as PICKLED
from kcv2diffusers.sources.source import Source
from kcv2diffusers.sources.tensor_bundle import is_table

SINGLE_FILE = ".safetensors"
_ENDINGS = (".h5", ".hdf5", ".keras", ".weights.json")  # of checkpoint files in a folder
_HDF5 = b"\x89HDF\r\n\x1a\n"
_HDF5_OFFSETS = (0, 512, 1024, 2048)  # possible offsets of that signature, in bytes
_HEAD = _HDF5_OFFSETS[-1] + len(_HDF5)  # bytes that are read to detect the container
_KINDS = (
    "Legacy .h5, whole-model .h5, .weights.h5 (or the .weights.json of its shards), .keras, "
    "SavedModel folders, TensorFlow checkpoints and single .safetensors files are read."
)


@dataclass(frozen=True)
class Found:
    """What is at a path.

    `head` has the first bytes of a file and is empty for anything else. `allow_pickle` and `ema` are as in
    `open_sources`.
    """

    path: Path
    head: bytes = b""
    allow_pickle: bool = False
    ema: bool = False


class Reader(NamedTuple):
    """A container: `matches` detects it, `read` returns one `Source` for each model in it."""

    matches: Callable[[Found], bool]
    read: Callable[[Found], list[Source]]


def open_sources(path: Path, *, allow_pickle: bool = False, ema: bool = False) -> list[Source]:
    """The models at `path`: a file, a SavedModel, a checkpoint prefix, or a folder of these.

    With `allow_pickle`, PyTorch's restricted unpickler opens a `.ckpt` file if `path` is that file. With
    `ema`, the moving average of the UNet is read from a single file. Raises SourceError if there is no model
    or if one cannot be read.
    """
    with reading(path):
        models = _open(path, allow_pickle, ema)
    if not models:
        raise SourceError(path, "an HDF5 file, but not one that Keras saved layers in.", _KINDS)
    return models


def open_all(paths: Sequence[Path], *, allow_pickle: bool = False, ema: bool = False) -> list[Source]:
    """The models at all `paths`; HDF5 files, which take most of the time, are parsed in parallel.

    `allow_pickle` and `ema` are as in `open_sources`, and so are the errors.
    """
    from kcv2diffusers.sources import hdf5

    with hdf5.ahead(paths):
        for spec in specs():
            spec.slots(0)  # fills the cache for `recognise` while the child processes read the files
        return [source for path in paths for source in open_sources(path, allow_pickle=allow_pickle, ema=ema)]


def _open(path: Path, allow_pickle: bool = False, ema: bool = False) -> list[Source]:
    """The models at a path; an empty list for an HDF5 file that Keras did not write."""
    found = Found(path, _head(path), allow_pickle, ema)
    if path.is_file() and not _is_allowed_pickle(found):
        require_own(path)
        if not found.head:
            raise SourceError(path, "the file is empty.")
    for reader in READERS:
        if reader.matches(found):
            return reader.read(found)
    if not path.exists():
        raise SourceError(path, "no such file or folder.", "Check the path.")
    if not path.is_file():
        raise SourceError(path, "neither a file nor a folder.", "Check the path.")
    unknown = "not a Keras checkpoint (unknown kind of file).", _KINDS
    raise SourceError(path, *(reason(path) or unknown))


def _head(path: Path) -> bytes:
    if not path.is_file():
        return b""
    with path.open("rb") as file:
        return file.read(_HEAD)


def _is_prefix(found: Found) -> bool:
    return not found.path.exists() and Path(f"{found.path}.index").is_file()


def _is_saved_model(found: Found) -> bool:
    return (found.path / "variables" / "variables.index").is_file()


def _is_allowed_pickle(found: Found) -> bool:
    return found.allow_pickle and found.path.suffix in PICKLED and found.path.is_file()


def _is_hdf5(found: Found) -> bool:
    return any(found.head[start:].startswith(_HDF5) for start in _HDF5_OFFSETS)


def _read_checkpoint(found: Found) -> list[Source]:
    """The models of a TensorFlow checkpoint, given its prefix or its `.index` file."""
    from kcv2diffusers.sources.tensorflow import read_checkpoint

    path = found.path
    prefix = path.with_suffix("") if path.suffix == ".index" and path.is_file() else path
    require_own(Path(f"{prefix}.index"))
    return read_checkpoint(prefix)


def _read_saved_model(found: Found) -> list[Source]:
    from kcv2diffusers.sources.tensorflow import read_saved_model

    require_own(found.path / "variables" / "variables.index")
    return read_saved_model(found.path)


def _read_folder(found: Found) -> list[Source]:
    """The models of every checkpoint in a folder; of its subfolders only SavedModels are read."""
    from kcv2diffusers.sources import hdf5

    path = found.path
    if (path / MODEL_INDEX).is_file():
        raise pipeline_given(path)
    if (path / "saved_model.pb").is_file():
        raise SourceError(
            path, "a SavedModel without its variables/ folder.", "Download that folder as well."
        )
    entries = [entry for entry in sorted(path.iterdir()) if not entry.name.startswith(".")]
    shards = {name for e in entries if e.name.endswith(".weights.json") for name in _shards(e)}
    models: list[Source] = []
    with hdf5.ahead(entries):
        for entry in entries:
            if entry.is_dir():
                wanted = (entry / "saved_model.pb").is_file() or (entry / "variables").is_dir()
            elif entry.suffix == ".index":
                wanted = _is_checkpoint(entry)
            else:
                wanted = entry.name.endswith(_ENDINGS) and entry.name not in shards
            if wanted:
                models += _open(entry)
    if not models:
        for entry in filter(Path.is_file, entries):
            if known := reason(entry):
                raise SourceError(entry, *known)
            if entry.name.endswith(_ENDINGS):
                open_sources(entry)  # raises the error that says what it is
        raise SourceError(path, "no checkpoint in this folder.", _KINDS)
    return models


def _read_sharded(found: Found) -> list[Source]:
    from kcv2diffusers.sources.keras3_h5 import read_sharded

    return read_sharded(found.path)


def _read_archive(found: Found) -> list[Source]:
    from kcv2diffusers.sources.keras3_h5 import read_archive

    return read_archive(found.path)


def _read_hdf5(found: Found) -> list[Source]:
    """The models of an HDF5 file of Keras 2 or Keras 3; an empty list if Keras did not write it."""
    from kcv2diffusers.sources import hdf5, keras3_h5, legacy_h5

    tree = hdf5.read_tree(found.path)
    return legacy_h5.read(tree) or keras3_h5.read(tree)


READERS: tuple[Reader, ...] = (
    Reader(_is_prefix, _read_checkpoint),
    Reader(_is_saved_model, _read_saved_model),
    Reader(lambda found: found.path.is_dir(), _read_folder),
    Reader(_is_allowed_pickle, lambda found: single_file.read_pickled_file(found.path, ema=found.ema)),
    Reader(
        lambda found: found.path.suffix == SINGLE_FILE and bool(found.head),
        lambda found: single_file.read_single_file(found.path, ema=found.ema),
    ),
    Reader(lambda found: found.path.name.endswith(".weights.json") and bool(found.head), _read_sharded),
    Reader(lambda found: found.path.suffix == ".index" and bool(found.head), _read_checkpoint),
    Reader(lambda found: found.head.startswith(b"PK\x03\x04"), _read_archive),
    Reader(_is_hdf5, _read_hdf5),
)
"""All containers; the first one that matches is used."""


def _is_checkpoint(index: Path) -> bool:
    """Whether an `.index` file is TensorFlow's, even if damaged: other programs use that ending too."""
    return any(index.parent.glob(f"{glob.escape(index.stem)}.data-*")) or is_table(index)


def _shards(index: Path) -> list[str]:
    stem = index.name.removesuffix(".weights.json")
    return [p.name for p in index.parent.glob("*.weights.h5") if p.name.startswith(f"{stem}_")]
