"""A pipeline folder before it is published: whole, finite, loadable, and nothing foreign in it."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from fnmatch import fnmatch
from pathlib import Path
from typing import Any

import numpy as np

from kcv2diffusers.dreambooth.config import RUN_FILE
from kcv2diffusers.errors import Error, SourceError, plain
from kcv2diffusers.maps.tables import tables
from kcv2diffusers.pipeline.configs import check_sizes
from kcv2diffusers.pipeline.record import CONVERSION_FILE, VERIFICATION_FILE
from kcv2diffusers.pipeline.tokenizer_files import find_tokenizer
from kcv2diffusers.sources.diffusers_pipeline import read_json, read_pipeline, read_safetensors
from kcv2diffusers.sources.recognise import NAMES, Match
from kcv2diffusers.sources.tensor import Tensor

Progress = Callable[[int, int], None]

CARD = "README.md"
_AGAIN = "Convert or save the pipeline again."
_SLICE = 16 << 20  # bytes looked at at a time
# What is published: of the root, and of each component's folder. Anything else stays at home.
_ROOT = (
    "model_index.json",
    CARD,
    CONVERSION_FILE,
    "LICENSE*",
    "learned_embeds*.safetensors",
    "pytorch_lora_weights.safetensors",
    RUN_FILE,
    "*.png",
)
_COMPONENT = ("*.json", "*.txt", "*.safetensors")


@dataclass(frozen=True)
class Checked:
    """A pipeline that may be published: the files, relative to its folder, and what was left out; the part
    matches tell sizes and version.
    """

    folder: Path
    files: list[str]
    left_out: list[str]
    parts: dict[str, Match]

    @property
    def version(self) -> str:
        return self.parts["unet"].version


def check(folder: Path, progress: Progress = lambda done, total: None) -> Checked:
    """Check a pipeline folder; `progress` is told bytes of weights, done and in total.

    Raises Error for what may not be published: missing parts or configs, weights that do not fit their
    configs, values that are not finite, links out of the folder.
    """
    if not (folder / "model_index.json").is_file():
        raise SourceError(folder, "not a diffusers pipeline (no model_index.json).", "Check the path.")
    index = read_json(folder / "model_index.json", _AGAIN)
    components = [name for name, entry in index.items() if isinstance(entry, list) and any(entry)]
    files, left_out = _published(folder, components)
    if gone := [name for name in components if not any(f.startswith(f"{name}/") for f in files)]:
        raise Error(
            f"{folder}: model_index.json names {plain(', '.join(gone))}, not there.\n"
            "Convert or save it again."
        )
    for table in tables().values():
        if index.get(table.folder) != (expected := table.diffusers.split(".")):
            raise Error(
                f"{folder / 'model_index.json'}: {table.folder} is not {'.'.join(expected)}, as Stable "
                f"Diffusion's.\n{_AGAIN}"
            )
    parts: dict[str, Match] = {}
    for variant in sorted(
        {variant_of(name) for name in files if name.endswith(".safetensors")}, reverse=True
    ):
        for name, component in read_pipeline(folder, variant=variant or None).items():
            for match in component.parts.values():
                match.require_complete()
                check_sizes(folder / name / "config.json", match, component.config)
            parts |= component.parts
    if missing := [NAMES[part] for part in NAMES if part not in parts]:
        raise Error(f"{folder}: no {', '.join(missing)}; not a whole pipeline.\n{_AGAIN}")
    words = len((tokenizer := find_tokenizer(folder / "tokenizer")).vocab) + len(tokenizer.placeholder_tokens)
    if words > (rows := parts["text_encoder"].dims["vocabulary"]):
        raise Error(
            f"{folder}: the tokenizer has {words} tokens and the text encoder {rows}.\n"
            f"Put the text encoder's own into {folder / 'tokenizer'}, or convert again with --tokenizer."
        )
    read_json(folder / "scheduler" / "scheduler_config.json", _AGAIN)
    _finite([t for f in files if f.endswith(".safetensors") for t in read_safetensors(folder / f)], progress)
    return Checked(folder, files, left_out, parts)


def _published(folder: Path, components: Sequence[str]) -> tuple[list[str], list[str]]:
    """The files to publish, and those that stay. Raises Error for links that lead out of the folder."""
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


def variant_of(name: str) -> str:
    """What stands between the name of a weight file and .safetensors: "fp16", or nothing."""
    return name.rsplit("/")[-1].removesuffix(".safetensors").partition(".")[2]


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
