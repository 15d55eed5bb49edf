"""KerasCV checkpoints -> a diffusers pipeline: gather the parts, check them against each other, write."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from os import PathLike
from pathlib import Path
from typing import Any, Literal

import numpy as np
from safetensors import safe_open

from kcv2diffusers import pipeline
from kcv2diffusers.dreambooth.config import RUN_FILE
from kcv2diffusers.dtypes import DTYPES
from kcv2diffusers.errors import Error
from kcv2diffusers.hub.address import SCHEME, shown, snapshots
from kcv2diffusers.leftovers import summary
from kcv2diffusers.output import check_free, new_folder
from kcv2diffusers.plan import Entry, common_dtype, to_diffusers, write_safetensors
from kcv2diffusers.provenance import CONVERSION_FILE, VERIFICATION_FILE, record
from kcv2diffusers.recognise import NAMES, Match, add_part, recognise_all
from kcv2diffusers.sources import open_all
from kcv2diffusers.sources.locate import locate, locate_all
from kcv2diffusers.sources.pipeline import (
    PREDICTION_TYPES,
    Component,
    is_pipeline,
    prediction_of,
    read_pipeline,
)
from kcv2diffusers.sources.tensor import Tensor
from kcv2diffusers.stream import Progress, run_finite
from kcv2diffusers.tables import Table, spec, table_of, tables
from kcv2diffusers.tokenizer import TokenizerFiles, find_tokenizer, write_tokenizer
from kcv2diffusers.transfer import Job

Source = str | PathLike[str]
PARTS = tuple(NAMES)
_SLACK = 32 << 20  # bytes for everything that is not weights
_CLIP_VOCABULARY = 49408
_OUTPUT = {"model_index.json", "unet", "text_encoder", "vae", "tokenizer", "scheduler"}
_OUTPUT_FILES = (
    CONVERSION_FILE,
    "learned_embeds*.safetensors",
    "pytorch_lora_weights.safetensors",
    RUN_FILE,
    VERIFICATION_FILE,
    "samples.png",
)
_NOT_KEPT = {"_name_or_path", "_diffusers_version", "dtype", "torch_dtype", "transformers_version"}
_GELU = {"exact": "gelu", "tanh": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class Converted:
    """What a conversion did. Sizes are in bytes; `parts` tells of each part where it came from, `sources` are
    the KerasCV checkpoints among these, `base` is the pipeline folder that the others are from.
    """

    out: Path
    version: str
    complete: bool
    parts: dict[str, str]
    sources: dict[str, Path]
    base: Path | None
    dtypes: dict[str, str]
    missing: list[str]
    bytes_read: int
    bytes_written: int
    seconds: float
    notes: list[str] = field(default_factory=list)

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `parts` says there what `sources` and `base` say to Python."""
        told = {name: value for name, value in asdict(self).items() if name not in ("sources", "base")}
        return told | {"out": str(self.out)}


@dataclass(frozen=True)
class Filler:
    """What fills the gaps: components of a diffusers pipeline, or more KerasCV parts; a tokenizer too."""

    paths: Sequence[Path] = ()
    components: Mapping[str, Component] = field(default_factory=dict)
    parts: Mapping[str, Match] = field(default_factory=dict)


def convert(
    *sources: Source,
    out: Source,
    unet: Source | None = None,
    text_encoder: Source | None = None,
    vae_decoder: Source | None = None,
    vae_encoder: Source | None = None,
    base: Source | Sequence[Source] | Literal["none"] | None = None,
    tokenizer: Source | None = None,
    dtype: str | None = None,
    variant: str | None = None,
    with_sibling: bool = False,
    placeholder_tokens: Sequence[str] = (),
    image_size: int | None = None,
    gelu: Literal["exact", "tanh"] = "exact",
    prediction_type: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    progress: Progress = lambda done, total: None,
) -> Converted:
    """Write the diffusers pipeline of KerasCV checkpoints into folder `out`.

    `sources` are files or folders whose parts are recognised by content, or hf:// addresses; the named
    arguments say which part a source is for. `base` fills in what is not given: a diffusers pipeline folder,
    KerasCV parts, or "none" to write only the given parts, or "tiny" (default: for SD1 the parts that are
    missing, from the Hub). `with_sibling` adds the text encoder from the repository beside one that has none.
    `dtype` is float32, float16 or bfloat16 (default: as
    stored). `image_size` is the pipeline's default (512, unless a checkpoint's config states another).
    `gelu` is the text encoder's activation for SD2 (see the README). `prediction_type` is the scheduler's,
    "epsilon" or "v_prediction" (default: the pipeline's that the UNet is from, epsilon for KerasCV's).
    `progress` is told bytes done and
    in total. Raises Error with a message for the user; `out` is then as it was.
    """
    started = time.monotonic()
    target = Path(out)
    if dtype is not None and dtype not in DTYPES:
        raise Error(f"--dtype {dtype}: choose one of {', '.join(DTYPES)}.")
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise Error(f"--prediction-type {prediction_type}: choose one of {', '.join(PREDICTION_TYPES)}.")
    if image_size is not None and (image_size < 64 or image_size % 64):
        raise Error(f"--image-size {image_size}: give a multiple of 64.")
    check_free(target, overwrite=overwrite, replaceable=_is_output)
    named = {
        "unet": unet, "text_encoder": text_encoder, "vae_decoder": vae_decoder, "vae_encoder": vae_encoder
    }  # fmt: skip
    notes: list[str] = []
    paths = [path for source in sources for path in locate_all(source)]
    parts = gather(paths, named)
    notes += left_out(parts)
    if beside := _sibling([*sources, *named.values()], parts, with_sibling, notes):
        paths += beside
        parts |= gather(beside, {})
    filler, only_given = find_base(base, parts, variant, notes)
    used = [path for path in filler.paths if filler.parts.keys() - parts.keys()]
    parts |= {part: match for part, match in filler.parts.items() if part not in parts}
    missing = [part for part in PARTS if part not in parts]
    _check_missing(parts, missing, only_given, notes)
    complete = not missing and not only_given
    parts = check_together({part: parts[part].require_complete() for part in PARTS if part in parts})
    given = [*paths, *filler.paths, *snapshots(paths)]
    files = _tokenizer(parts.get("text_encoder"), tokenizer, given, placeholder_tokens, only_given)

    unet_of = parts.get("unet")
    if prediction_type is None and unet_of is not None and not unet_of.keras:
        prediction_type = prediction_of(filler.paths[0])
    scheduler = pipeline.SCHEDULER | {"prediction_type": prediction_type or PREDICTION_TYPES[0]}

    plans: list[tuple[Table, list[Entry], np.dtype]] = []
    configs, dtypes = {}, {}
    for table in tables().values():
        mine = [parts[part] for part in table.parts if part in parts]
        if not mine:
            continue
        entries = [entry for match in mine for entry in to_diffusers(match)]
        kind = DTYPES[dtype] if dtype else common_dtype(entry.tensor for entry in entries)
        plans.append((table, entries, kind))
        dtypes[table.folder] = kind.name
        configs[table.folder] = config_for(mine[0], filler, image_size, gelu, files)
    embeddings = _embeddings(parts.get("text_encoder"), placeholder_tokens, dtypes.get("text_encoder"))

    for match in parts.values():
        if match.source.path.resolve().is_relative_to(target.resolve()):
            raise Error(
                f"{match.source.path}: lies inside {target}, which would be replaced.\nChoose another --out."
            )
    needed = sum(math.prod(e.shape) * kind.itemsize for _, entries, kind in plans for e in entries)
    with new_folder(target, overwrite=overwrite, replaceable=_is_output, needed=needed + _SLACK) as folder:
        jobs: list[Job] = []
        for table, entries, kind in plans:
            pipeline.write_json(folder / table.folder / "config.json", configs[table.folder])
            path = folder / table.folder / _with_variant(table.weights, variant)
            jobs += write_safetensors(path, entries, kind)
        for name, entry, kind in embeddings:
            jobs += write_safetensors(folder / name, [entry], kind)
        total = run_finite(jobs, progress, allow_nonfinite=allow_nonfinite)
        for path in {job.target for job in jobs}:
            with safe_open(path, framework="numpy"):  # the library's own check of the header
                pass
        if files is not None:
            length = parts["text_encoder"].dims["length"] if "text_encoder" in parts else 77
            write_tokenizer(files, folder / "tokenizer", placeholder_tokens, length)
        if complete:
            pipeline.write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
            pipeline.write_json(
                folder / "model_index.json", pipeline.model_index({t.folder: t for t, _, _ in plans})
            )
            pipeline.write_json(
                folder / CONVERSION_FILE,
                record(parts, used, dtypes, Path(os.path.abspath(target))),  # noqa: PTH100
            )
            notes.append("The safety checker is off: KerasCV has none.")
    return Converted(
        out=target,
        version=_version(parts),
        complete=complete,
        parts={part: f"{m.place} ({m.source.container})" for part, m in parts.items()},
        sources={part: match.source.path for part, match in parts.items() if match.keras},
        base=filler.paths[0] if filler.components else None,
        dtypes=dtypes,
        missing=missing,
        bytes_read=total,
        bytes_written=needed,
        seconds=time.monotonic() - started,
        notes=notes,
    )


def gather(paths: Sequence[Path], named: Mapping[str, Source | None]) -> dict[str, Match]:
    """One match a part, from positional sources and from those given for a part."""
    parts: dict[str, Match] = {}
    for match in recognise_all(open_all(paths)):
        add_part(parts, match)
    for part, given in named.items():
        if given is None:
            continue
        located = locate_all(given, parts={part})
        matches = recognise_all(open_all(located))
        fitting = [match for match in matches if match.part == part]
        if not fitting:
            held = " and a ".join(NAMES[match.part] for match in matches)
            raise Error(
                f"{given}: holds a {held}, not a {NAMES[part]}.\n"
                "Leave the option away: parts are recognised by their contents."
            )
        for match in fitting:
            add_part(parts, match)
    return parts


def left_out(parts: Mapping[str, Match]) -> list[str]:
    """A line for each checkpoint with tensors that are of no part."""
    found = {m.source.path: m.leftovers for m in parts.values() if m.leftovers}
    return [f"Left out of {shown(path)}: {summary(leftovers)}." for path, leftovers in found.items()]


def _sibling(
    sources: Sequence[Source | None], parts: Mapping[str, Match], wanted: bool, notes: list[str]
) -> list[Path]:
    """The checkpoint of the text encoder in a repository beside a source without one; only proposed, in
    `notes`, where it is not wanted.
    """
    if "text_encoder" in parts:
        return []
    for source in sources:
        if isinstance(source, str) and source.startswith(SCHEME):
            from kcv2diffusers.hub.download import sibling

            if (found := sibling(source)) and wanted:
                return locate_all(found, parts={"text_encoder"})
            if found:
                notes.append(f"{found} exists: --with-sibling takes the text encoder from there.")
    if wanted:
        raise Error("--with-sibling: no hf:// source has a text encoder in a repository beside it.")
    return []


def find_base(
    base: Source | Sequence[Source] | None,
    parts: Mapping[str, Match],
    variant: str | None,
    notes: list[str],
) -> tuple[Filler, bool]:
    """The filler, and whether only the given parts are to be written."""
    bases = [] if base is None else [base] if isinstance(base, (str, PathLike)) else list(base)
    if "none" in map(str, bases):
        if len(bases) > 1:
            raise Error("--base none cannot be combined with another --base.")
        return Filler(), True
    missing = [part for part in PARTS if part not in parts]
    unusual = [match.part for match in parts.values() if not match.known]
    if bases:
        needed = [*missing, *unusual]
        paths = [path for b in bases for path in locate_all(b, base=True, parts=needed, variant=variant)]
    elif missing and not unusual and _version(parts) == "sd1":
        from kcv2diffusers.hub.download import SD1_BASE, sd1_base

        for match in parts.values():
            match.require_complete()
        paths = [sd1_base(missing, variant)]
        notes.append(f"{', '.join(NAMES[part] for part in missing)}: from the default --base, {SD1_BASE}.")
    else:
        paths = []
    folders = [path for path in paths if is_pipeline(path)]
    if not folders:
        return Filler(paths, parts=gather(paths, {})), False
    if len(paths) > 1:
        raise Error("Give one pipeline folder as --base, or KerasCV files, not both.")
    wanted = {table_of(part).folder for part in (*missing, *unusual)}
    components = read_pipeline(folders[0], wanted, variant)
    found = {part: match for component in components.values() for part, match in component.parts.items()}
    return Filler(paths, components, found), False


def _check_missing(
    parts: Mapping[str, Match], missing: Sequence[str], only_given: bool, notes: Sequence[str]
) -> None:
    if not parts:
        raise Error("Nothing to convert: give checkpoint files or folders.")
    if missing and not only_given:
        options = " ".join("--" + part.replace("_", "-") + " SRC" for part in missing)
        proposals = "".join(f"{note}\n" for note in notes)
        gone = " (the original repositories of SD2 are gone)" if _version(parts) == "sd2" else ""
        raise Error(
            f"A pipeline still needs: {', '.join(NAMES[part] for part in missing)}.\n"
            f"{proposals}Give {options}, or --base PIPELINE{gone} to take them from there; "
            "--base none writes only the rest."
        )
    halves = [part for part in ("vae_decoder", "vae_encoder") if part in missing]
    if len(halves) == 1:
        option = "--" + halves[0].replace("_", "-")
        raise Error(f"A VAE needs both halves and the {NAMES[halves[0]]} is missing.\nGive {option} SRC.")


def check_together(parts: dict[str, Match]) -> dict[str, Match]:
    """The parts, if they belong to one model; the version of an unusual text encoder is its UNet's."""
    unet, text = parts.get("unet"), parts.get("text_encoder")
    if unet and text:
        if unet.dims["context"] != text.dims["width"]:
            sides = [
                f"{m.source.path} ({m.version.upper()}, text embeddings {m.dims[size]} wide)"
                for m, size in ((unet, "context"), (text, "width"))
            ]
            raise Error(
                f"{sides[0]} and {sides[1]} do not belong together.\n"
                "Give a UNet and a text encoder of the same model."
            )
        if not text.known:
            parts["text_encoder"] = text = replace(text, spec=spec("text_encoder", unet.version))
    encoder, decoder = parts.get("vae_encoder"), parts.get("vae_decoder")
    for one, other, names in (
        (encoder, decoder, ("c0", "c1", "c2", "c3", "latent")),
        (unet, decoder, ("latent",)),
    ):
        if one and other and any(one.dims[name] != other.dims[name] for name in names):
            raise Error(f"{one.source.path} and {other.source.path} are of different sizes.")
    return parts


def _tokenizer(
    text: Match | None,
    tokenizer: Source | None,
    given: Sequence[Path],
    placeholder_tokens: Sequence[str],
    only_given: bool,
) -> TokenizerFiles | None:
    """The tokenizer to write, checked against the rows of the token embedding."""
    if text is None or (only_given and tokenizer is None and not placeholder_tokens):
        _check_rows(text, _CLIP_VOCABULARY, placeholder_tokens)
        return None
    named = None if tokenizer is None else locate(tokenizer, base=True, parts=())
    files = find_tokenizer(named, given)
    _check_rows(text, len(files.vocab) + len(files.placeholder_tokens), placeholder_tokens)
    return files


def _check_rows(text: Match | None, vocabulary: int, placeholder_tokens: Sequence[str]) -> None:
    if text is None:
        if placeholder_tokens:
            raise Error("--placeholder-token names rows of a text encoder, and none is given.")
        return
    rows = text.dims["vocabulary"]
    extra = rows - vocabulary
    if extra < 0 and text.known:
        raise Error(f"{text.source.path}: {rows} token embeddings, fewer than the tokenizer's {vocabulary}.")
    if extra < 0 and placeholder_tokens:
        raise Error("--placeholder-token for a text encoder of unusual vocabulary needs its --tokenizer.")
    if extra > 0 and not placeholder_tokens and (text.known or vocabulary != _CLIP_VOCABULARY):
        raise Error(
            f"{text.source.path}: {extra} token embedding{'s' if extra > 1 else ''} beyond the vocabulary's "
            f"{vocabulary} (textual inversion).\nName {'them' if extra > 1 else 'it'} with "
            f"{extra} time{'s' if extra > 1 else ''} --placeholder-token TOKEN, in order."
        )
    if placeholder_tokens and len(placeholder_tokens) != extra:
        raise Error(
            f"{text.source.path}: {max(extra, 0)} extra token embeddings and {len(placeholder_tokens)} "
            f"--placeholder-token.\nGive {max(extra, 0)} of them."
        )


def config_for(
    match: Match, filler: Filler, image_size: int | None, gelu: str, files: TokenizerFiles | None
) -> dict[str, Any]:
    """The config.json of a part's component: from the table, and from `filler` what weights do not tell."""
    table = match.spec.table
    component = filler.components.get(table.folder)
    if not match.keras:  # the base's own component, with the base's own config
        assert component is not None
        kept = {k: v for k, v in component.config.items() if k not in _NOT_KEPT}
        return kept if "_class_name" in kept else kept | pipeline.LOADED
    overrides: dict[str, Any] = {}
    if match.version == "sd2" and "hidden_act" in table.versions["sd2"].config:
        overrides["hidden_act"] = _GELU[gelu]
    if component is not None and not match.known:
        base = next(iter(component.parts.values()))
        if all(base.dims.get(k) == v for k, v in match.dims.items() if k != "vocabulary"):
            overrides |= pipeline.untold(table, component.config)
    overrides |= pipeline.user_config(match.source.path, table)
    if image_size is not None:
        overrides.pop("sample_size", None)
    pipeline.require_heads(match, overrides)
    words = len(files.vocab) if files else min(_CLIP_VOCABULARY, match.dims.get("vocabulary", 0))
    return pipeline.config_of(
        table,
        match.version,
        match.dims | {"words": words},
        image_size=image_size or pipeline.IMAGE_SIZE,
        overrides=overrides,
    )


def _embeddings(
    text: Match | None, placeholder_tokens: Sequence[str], dtype: str | None
) -> list[tuple[str, Entry, np.dtype]]:
    """A file for each placeholder token, as `load_textual_inversion` takes it: {token: [1, width]}."""
    if text is None or not placeholder_tokens or dtype is None:
        return []
    table = next(tensor for slot, tensor in text.slots() if slot.target.endswith("token_embedding.weight"))
    rows, width = table.shape
    found = []
    for index, token in enumerate(placeholder_tokens):
        row = rows - len(placeholder_tokens) + index
        name = (
            "learned_embeds.safetensors"
            if len(placeholder_tokens) == 1
            else f"learned_embeds-{index}.safetensors"
        )
        found.append((name, Entry(token, (1, width), _row(table, row), None), DTYPES[dtype]))
    return found


def _row(tensor: Tensor, row: int) -> Tensor:
    width = tensor.shape[1]
    if tensor.load is not None:
        load = tensor.load
        return replace(tensor, shape=(1, width), load=lambda: load()[row : row + 1], crc32c=None)
    offset = (tensor.offset or 0) + row * width * tensor.dtype.itemsize
    return replace(tensor, shape=(1, width), offset=offset, crc32c=None)


def _is_output(path: Path) -> bool:
    return all(
        entry.name in _OUTPUT or any(entry.match(pattern) for pattern in _OUTPUT_FILES)
        for entry in path.iterdir()
    )


def _version(parts: Mapping[str, Match]) -> str:
    return next((m.version for m in parts.values() if m.version != "any"), "any")


def _with_variant(name: str, variant: str | None) -> str:
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}.{variant}.{suffix}" if variant else name
