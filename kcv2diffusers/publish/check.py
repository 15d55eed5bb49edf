"""Checks before a pipeline folder is published: complete, finite, loadable, and without other files."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from kcv2diffusers.errors import Error, SourceError, plain
from kcv2diffusers.maps.parts import Family, TokenizerFolder, families, family_named, label
from kcv2diffusers.maps.tables import table_of, tables_of
from kcv2diffusers.pipeline.configs import check_sizes
from kcv2diffusers.pipeline.tokenizer_files import find_tokenizer
from kcv2diffusers.pipeline_files import (
    CARD,
    COMPONENT_CONFIG,
    CONVERSION_FILE,
    EMBEDDINGS_PATTERN,
    KOHYA_LORA_FILE,
    LORA_FILE,
    MODEL_INDEX,
    RUN_FILE,
    SCHEDULER_FILE,
    VERIFICATION_FILE,
    variant_of,
)
from kcv2diffusers.progress import Progress, silent
from kcv2diffusers.sources.diffusers_pipeline import read_json, read_pipeline, read_safetensors
from kcv2diffusers.sources.gather import version_of
from kcv2diffusers.sources.recognise import Match
from kcv2diffusers.sources.tensor import Tensor

_AGAIN = "Convert or save the pipeline again."
_SLICE = 16 << 20  # bytes checked at a time
# Patterns of the files to publish, in the root and in each component's folder. Others are not published.
_ROOT = (
    MODEL_INDEX,
    CARD,
    CONVERSION_FILE,
    "LICENSE*",
    EMBEDDINGS_PATTERN,
    KOHYA_LORA_FILE,
    LORA_FILE,
    RUN_FILE,
    "*.png",
)
_COMPONENT = ("*.json", "*.txt", "*.safetensors")


@dataclass(frozen=True)
class Checked:
    """A pipeline that may be published.

    `files` are relative to its folder, `left_out` are the files that are not published. `parts`, which are of
    the `family`, determine sizes and version.
    """

    folder: Path
    files: list[str]
    left_out: list[str]
    parts: dict[str, Match]
    family: Family

    @property
    def version(self) -> str:
        """The version of the model, such as "sd1"."""
        return version_of(self.parts)

    @property
    def variant(self) -> str | None:
        """The `variant` that `from_pretrained` needs if there are no weights without one, else None."""
        main = table_of(self.family.scheduler_part or self.family.parts[0]).folder
        files = [n for n in self.files if n.startswith(f"{main}/") and n.endswith(".safetensors")]
        variants = {variant_of(name) for name in files}
        return None if "" in variants else min(variants)


def check(folder: Path, progress: Progress = silent) -> Checked:
    """Check a pipeline folder. `progress` is called with the bytes of weights done and in total.

    Raises Error if the folder may not be published: for missing parts or configs, weights that do not match
    their configs, values that are not finite, or links out of the folder.
    """
    if not (folder / MODEL_INDEX).is_file():
        raise SourceError(folder, "not a diffusers pipeline (no model_index.json).", "Check the path.")
    index = read_json(folder / MODEL_INDEX, _AGAIN)
    components = [name for name, entry in index.items() if isinstance(entry, list) and any(entry)]
    files, left_out = _published(folder, components)
    if gone := [name for name in components if not any(f.startswith(f"{name}/") for f in files)]:
        raise Error(
            f"{folder}: model_index.json names {plain(', '.join(gone))}, not there.\n"
            "Convert or save it again."
        )
    family = family_named(str(index.get("_class_name"))) or families()[0]
    optional = {table_of(part).folder for part in family.optional}
    for table in tables_of(family):
        if table.folder in optional and index.get(table.folder) == [None, None]:
            continue
        if index.get(table.folder) != (expected := table.diffusers.split(".")):
            raise Error(
                f"{folder / MODEL_INDEX}: {table.folder} is not {'.'.join(expected)}, as in {family.label}.\n"
                f"{_AGAIN}"
            )
    parts: dict[str, Match] = {}
    for variant in sorted(
        {variant_of(name) for name in files if name.endswith(".safetensors")}, reverse=True
    ):
        for name, component in read_pipeline(folder, variant=variant or None).items():
            for match in component.parts.values():
                match.require_complete()
                check_sizes(folder / name / COMPONENT_CONFIG, match, component.config)
            parts |= component.parts
    required = [part for part in family.parts if part not in family.optional]
    if missing := [label(part) for part in required if part not in parts]:
        raise Error(f"{folder}: no {', '.join(missing)}; not a whole pipeline.\n{_AGAIN}")
    for tokenizer in family.tokenizers:
        if not tokenizer.copied:
            _check_tokenizer(folder, tokenizer, parts[tokenizer.part])
    if family.scheduler_part:
        read_json(folder / SCHEDULER_FILE, _AGAIN)
    _finite([t for f in files if f.endswith(".safetensors") for t in read_safetensors(folder / f)], progress)
    return Checked(folder, files, left_out, parts, family)


def _check_tokenizer(folder: Path, tokenizer: TokenizerFolder, text: Match) -> None:
    files = find_tokenizer(folder / tokenizer.name)
    words, rows = len(files.vocab) + len(files.placeholder_tokens), text.dims["vocabulary"]
    if words > rows:
        raise Error(
            f"{folder}: the tokenizer has {words} tokens and the {text.label} {rows}.\n"
            f"Put the {text.label}'s own into {folder / tokenizer.name}, or convert again with --tokenizer."
        )


def _published(folder: Path, components: Sequence[str]) -> tuple[list[str], list[str]]:
    """Return the files to publish and those left out. Raises Error for links that lead out of the folder."""
    files, left_out = [], []
    root = folder.resolve()
    for path in sorted(folder.rglob("*")):
        name = path.relative_to(folder).as_posix()
        if path.is_dir() and not path.is_symlink():
            continue
        inside, file = ("", name) if "/" not in name else name.rsplit("/", 1)
        patterns = _ROOT if not inside else _COMPONENT if inside in components else ()
        if not any(fnmatch(file, pattern) for pattern in patterns) or file.startswith("."):
            left_out += [name] if name != VERIFICATION_FILE else []
        elif not path.resolve().is_relative_to(root):
            raise Error(
                f"{plain(path)}: a link out of the folder.\nCopy the folder with its contents: cp -rL."
            )
        else:
            files.append(name)
    return files, left_out


def _finite(tensors: Sequence[Tensor], progress: Progress) -> None:
    total, done = sum(tensor.nbytes for tensor in tensors), 0
    for tensor in tensors:
        for values in _slices(tensor):
            if not np.isfinite(values).all():
                raise Error(
                    f"{plain(tensor.path)}: {plain(tensor.name)} holds values that are NaN or infinite.\n"
                    "Such a pipeline draws black pictures; convert an earlier checkpoint, or as float32."
                )
            done += values.nbytes
            progress(done, total)


def _slices(tensor: Tensor) -> Iterator[np.ndarray[Any, Any]]:
    with tensor.path.open("rb") as file:
        file.seek(tensor.offset or 0)
        left = tensor.nbytes
        while left:
            data = file.read(min(left, _SLICE))
            if not data:
                raise SourceError(tensor.path, f"{tensor.name}: the file ends within it.")
            left -= len(data)
            yield np.frombuffer(data, tensor.dtype)
