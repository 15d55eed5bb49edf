"""Find the checkpoints in a repository from its listing: the files and the probable part of each.

Names and sizes only limit what is downloaded. The part is determined later, from the tensors.
"""

from __future__ import annotations

import re
from collections import defaultdict
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from math import prod
from pathlib import PurePosixPath

from kcv2diffusers.errors import Error, plain
from kcv2diffusers.hub.address import Address
from kcv2diffusers.maps.parts import families, label, parts
from kcv2diffusers.maps.tables import specs, table_of, tables
from kcv2diffusers.pipeline_files import (
    CARD,
    COMPONENT_CONFIG,
    CONFIG_FILE,
    KERAS_VOCABULARY,
    LORA_FILE,
    MODEL_INDEX,
    SCHEDULER_FILE,
    TOKENIZER_FILES,
    index_name,
    shard_names,
    weight_names,
)

Listing = Mapping[str, int]
"""Maps each path in the repository to the size in bytes."""

# Bytes per parameter: float32, float16, float32 twice (Keras 3's export), float32 with two optimizer moments.
_BYTES = (4, 2, 8, 12)
_TOLERANCE = 0.02
# A KerasHub preset has a config.json beside its weights.
_SMALL = (MODEL_INDEX, CONFIG_FILE, COMPONENT_CONFIG, CARD, SCHEDULER_FILE.as_posix())
_CHECKPOINT = re.compile(r"\.(h5|hdf5|keras)$")
_SHARD = re.compile(r"_\d{5}\.weights\.h5$")


@dataclass(frozen=True)
class Candidate:
    """A checkpoint in a repository.

    `path` is the one that its reader is called with ("" is the root), `files` its files, `size` their size in
    bytes, and `part` the part that it probably is (None: unknown).
    """

    path: str
    files: tuple[str, ...]
    size: int
    part: str | None

    @property
    def name(self) -> str:
        """A path that identifies only this checkpoint: a SavedModel's root may contain others."""
        root = self.path and f"{self.path}/"
        inner = (f"{root}saved_model.pb", f"{root}variables/variables.index")
        return next((name for name in inner if name in self.files), self.path)


def candidates(listing: Listing, repository: str, below: str = "") -> list[Candidate]:
    """The Keras checkpoints at or below the path `below` of a repository.

    The path of any file of a checkpoint selects that checkpoint. A `.safetensors` file counts as a checkpoint
    only if `below` is its path.
    """
    if below.endswith(".safetensors") and below in listing:
        return [Candidate(below, (below,), listing[below], None)]
    found = []
    for path, files in sorted(_checkpoints(listing).items()):
        size = sum(listing[name] for name in files)
        saved_model = _join(path, "variables/variables.index") in files
        part = _part(path, repository, max(listing[name] for name in files), saved_model)
        found.append(Candidate(path, tuple(files), size, part))
    named = [c for c in found if below in c.files or (below and below == c.path)]
    return named or [c for c in found if not below or c.path.startswith(f"{below}/")]


def is_pipeline(listing: Listing, below: str = "") -> bool:
    """Whether a diffusers pipeline, or a component of one, is at the path `below` of a repository."""
    names = [MODEL_INDEX, *(f"{table.folder}/{COMPONENT_CONFIG}" for table in tables().values())]
    return any(_join(below, name) in listing for name in names)


def chosen(found: Sequence[Candidate], wanted: Collection[str] | None, source: Address) -> list[Candidate]:
    """One candidate for each part `wanted` (None: all).

    Raises Error if a part has several candidates, or if none fits.
    """
    by_part: dict[str | None, list[Candidate]] = defaultdict(list)
    for candidate in found:
        if wanted is None or candidate.part is None or candidate.part in wanted:
            by_part[candidate.part].append(candidate)
    for part, several in by_part.items():
        if len(several) > 1:
            what = f"{len(several)} checkpoints for the {label(part)}" if part else "several checkpoints"
            raise Error(f"{source}: {what}; give one by name:\n{_listed(several, source)}")
    if not by_part and found and wanted:
        named = " or ".join(label(part) for part in wanted)
        raise Error(f"{source}: none seems to be a {named}; give one by name:\n{_listed(found, source)}")
    return [candidate for several in by_part.values() for candidate in several]


def pipeline_files(
    listing: Listing, below: str, wanted: Collection[str] | None, variant: str | None, source: Address
) -> list[str]:
    """The files of a diffusers pipeline with the parts `wanted` (None: all) and its small files.

    Raises Error if a component has no `.safetensors` file.
    """
    folders = {table_of(part).folder for part in (parts() if wanted is None else wanted)}
    files = small_files(listing, below)
    for folder, name in {table.folder: table.weights for table in tables().values()}.items():
        config = _join(below, f"{folder}/{COMPONENT_CONFIG}")
        if folder not in folders or config not in listing:
            continue
        weights = _weights(listing, _join(below, folder), name, variant)
        if not weights:
            raise Error(
                f"{source}: no {folder}/{name}; pickled weights are not read.\n"
                "Look for a revision with it, or save it again with diffusers' save_pretrained."
            )
        files += [config, *weights]
    return files


def _weights(listing: Listing, folder: str, name: str, variant: str | None) -> list[str]:
    """The weight file of a component: `variant`, else the file without a variant, else any variant.

    Of a sharded file the index and the shards. Empty if there is none.
    """
    there = [path.removeprefix(f"{folder}/") for path in listing if path.startswith(f"{folder}/")]
    for file in weight_names(name, variant, there):
        for found in ([file], [index_name(file), *shard_names(file, there)]):
            if found[0] in there:
                return [f"{folder}/{each}" for each in found]
    return []


def lora_file(listing: Listing, source: Address) -> str:
    """The LoRA file at an address: that file, else the one with diffusers' name, else the only .safetensors.

    Raises Error if there is none or if there are several.
    """
    if source.path in listing:
        return source.path
    if (usual := _join(source.path, LORA_FILE)) in listing:
        return usual
    inside = f"{source.path}/" if source.path else ""
    found = [name for name in sorted(listing) if name.startswith(inside) and name.endswith(".safetensors")]
    if len(found) == 1:
        return found[0]
    if not found:
        raise Error(f"{source}: no .safetensors file there.\nGive the address of a LoRA file.")
    several = "\n".join(f"  {plain(source.at(name))}  {listing[name] / 1e6:.1f} MB" for name in found[:20])
    raise Error(f"{source}: {len(found)} .safetensors files; give one by name:\n{several}")


def small_files(listing: Listing, below: str) -> list[str]:
    """The small files that describe a model: configs, model card, tokenizers."""
    known = (folder for family in families() for folder in family.tokenizers)
    folders = dict.fromkeys(name for folder in known for name in (folder.name, *folder.also))
    names = [_join(below, name) for name in _SMALL]
    tokenizers = [file for name in folders for file in tokenizer_files(listing, _join(below, name))]
    return [name for name in names if name in listing] + tokenizers


def tokenizer_files(listing: Listing, folder: str) -> list[str]:
    """The files of a tokenizer in a folder of the repository."""
    names = (*TOKENIZER_FILES, KERAS_VOCABULARY)
    return [name for file in names if (name := _join(folder, file)) in listing]


def unsafe(path: str) -> bool:
    """Whether a path of a listing could lead outside the download folder."""
    parts = PurePosixPath(path).parts
    return not parts or path.startswith("/") or ".." in parts or "\\" in path or "\0" in path


def _checkpoints(listing: Listing) -> dict[str, list[str]]:
    """Map the path of each checkpoint, as its reader is called with it, to its files."""
    found: dict[str, list[str]] = {}
    inside = set()
    listing = {name: size for name, size in listing.items() if not _foreign(name)}
    for name in listing:
        if PurePosixPath(name).parts[-2:] == ("variables", "variables.index"):
            root = name.removesuffix("variables/variables.index").rstrip("/")
            files = [n for n in listing if n.startswith(_join(root, "variables/variables."))]
            found[root] = [*files, *(n for n in [_join(root, "saved_model.pb")] if n in listing)]
            inside.update(files)
    for name in listing.keys() - inside:
        if name.endswith(".weights.json"):
            stem = name.removesuffix(".weights.json")
            found[name] = [name, *(n for n in listing if n.startswith(f"{stem}_") and _SHARD.search(n))]
        elif name.endswith(".index"):
            prefix = name.removesuffix(".index")
            if data := [n for n in listing if n.startswith(f"{prefix}.data-")]:
                found[prefix] = [name, *data]
        elif _CHECKPOINT.search(name):
            found[name] = [name]
    shards = {n for name, files in found.items() if name.endswith(".weights.json") for n in files[1:]}
    return {path: sorted(files) for path, files in found.items() if path not in shards}


def _foreign(name: str) -> bool:
    """Whether a file is hidden or is macOS metadata (in __MACOSX), which users do not add on purpose."""
    return any(part.startswith(".") or part == "__MACOSX" for part in PurePosixPath(name).parts)


def _part(path: str, repository: str, size: int, saved_model: bool) -> str | None:
    """The probable part: from the path, else from the size of the weights, else from the repository's name.

    The repository's name counts only for a SavedModel. A SavedModel that none of these identifies is taken as
    a UNet, which is what the repositories of 2023 contain.
    """
    guess = _hinted(path) or _by_size(size) or (_hinted(repository) if saved_model else None)
    return guess or (families()[0].scheduler_part if saved_model else None)


def _hinted(text: str) -> str | None:
    """The part whose hint matches a path or the name of a repository."""
    by_rank = sorted(parts().values(), key=lambda part: part.rank)
    return next((part.name for part in by_rank if part.hint and part.hint.search(text)), None)


def _by_size(size: int) -> str | None:
    for part, parameters in _parameters():
        if any(abs(size - each * parameters) <= _TOLERANCE * each * parameters for each in _BYTES):
            return part
    return None


@cache
def _parameters() -> tuple[tuple[str, int], ...]:
    """The number of parameters of each part in each version, of the parts that have files of their own."""
    counts = []
    for spec in specs():
        if not parts()[spec.part].hint:
            continue
        slots = spec.existing(dims := spec.nominal)
        counts.append((spec.part, sum(prod(slot.part_shape(dims, keras=True)) for slot in slots)))
    return tuple(counts)


def _join(folder: str, name: str) -> str:
    return f"{folder}/{name}" if folder else name


def _listed(found: Sequence[Candidate], source: Address) -> str:
    return "\n".join(f"  {plain(source.at(c.name))}  {c.size / 1e6:.1f} MB" for c in found)
