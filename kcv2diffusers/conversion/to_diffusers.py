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

from kcv2diffusers.conversion.outline import PLAN, Moved, moved, plan_text
from kcv2diffusers.dreambooth.config import RUN_FILE
from kcv2diffusers.dtypes import ALIASES, DTYPES, full_name
from kcv2diffusers.errors import Error, no_choice
from kcv2diffusers.hub.address import SCHEME, shown, snapshots
from kcv2diffusers.maps.tables import Table, spec, table_of, tables
from kcv2diffusers.pipeline.configs import (
    IMAGE_SIZE,
    LOADED,
    NOT_KEPT,
    check_sizes,
    config_of,
    model_index,
    require_heads,
    scheduler_with,
    untold,
    user_dtype,
    write_json,
)
from kcv2diffusers.pipeline.record import CONVERSION_FILE, VERIFICATION_FILE, record
from kcv2diffusers.pipeline.scheduler import SCHEDULER
from kcv2diffusers.pipeline.shapes import same_shape, stated_beside
from kcv2diffusers.pipeline.tokenizer_files import BOS, EOS, TokenizerFiles, find_tokenizer, write_tokenizer
from kcv2diffusers.pipeline.vocabulary import CLIP_VOCABULARY, check_ids, check_rows, check_tokenizer, homes
from kcv2diffusers.sources.diffusers_pipeline import PREDICTION_TYPES, Component, is_pipeline, read_pipeline
from kcv2diffusers.sources.leftovers import summary
from kcv2diffusers.sources.locate import locate, locate_all
from kcv2diffusers.sources.open import open_all
from kcv2diffusers.sources.recognise import NAMES, Match, add_part, recognise_all
from kcv2diffusers.sources.tensor import Tensor
from kcv2diffusers.system.output import check_free, check_target, new_folder
from kcv2diffusers.targets.safetensors import Entry, common_dtype, to_diffusers, write_safetensors
from kcv2diffusers.targets.stream import Progress, run_finite
from kcv2diffusers.targets.transfer import Job

Source = str | PathLike[str]
PARTS = tuple(NAMES)
_SLACK = 32 << 20  # bytes for everything that is not weights
_OUTPUT = {"model_index.json", "unet", "text_encoder", "vae", "tokenizer", "scheduler"}
_OUTPUT_FILES = (
    CONVERSION_FILE,
    "learned_embeds*.safetensors",
    "pytorch_lora_weights.safetensors",
    RUN_FILE,
    VERIFICATION_FILE,
    "samples.png",
)
_GELU = {"exact": "gelu", "tanh": "gelu_pytorch_tanh"}


@dataclass(frozen=True)
class Converted:
    """What a conversion did. Sizes are in bytes; `parts` tells of each part where it came from, `sources` are
    the KerasCV checkpoints among these, `base` is the pipeline folder that the others are from. `moved` says
    of each part what goes into which file, `scheduler` and `tokenizer` where those come from (None: they are
    not written). After a dry run it is what a conversion would do.
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
    moved: list[Moved] = field(default_factory=list)
    scheduler: str | None = None
    tokenizer: str | None = None
    dry_run: bool = False

    def plan(self) -> str:
        """What a dry run found, for a person."""
        what = "a pipeline" if self.complete else "the given parts"
        origins = {"scheduler": self.scheduler, "tokenizer": self.tokenizer}
        notes = [*self.notes, *([] if self.complete else [self.needs()])]
        return plan_text(f"To write: {what}, {self.out}", self.moved, origins, notes)

    def needs(self) -> str:
        """What parts without a pipeline lack."""
        needs = ", ".join(NAMES[part] for part in self.missing)
        return f"A full pipeline still needs: {needs or 'nothing; leave away --base none to write one'}."

    def to_dict(self) -> dict[str, Any]:
        """As JSON has it; `parts` says there what `sources` and `base` say to Python."""
        left_out = ("sources", "base", *(() if self.dry_run else PLAN))
        told = {name: value for name, value in asdict(self).items() if name not in left_out}
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
    gelu: Literal["exact", "tanh"] | None = None,
    prediction_type: str | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
    progress: Progress = lambda done, total: None,
) -> Converted:
    """Write the diffusers pipeline of KerasCV checkpoints into folder `out`.

    `sources` are files or folders whose parts are recognised by content, or hf:// addresses; the named
    arguments say which part a source is for. `base` fills in what is not given: a diffusers pipeline folder,
    KerasCV parts, or "none" to write only the given parts, or "tiny" (default: for SD1 the parts that are
    missing, from the Hub). `with_sibling` adds the text encoder from the repository beside one that has none.
    `dtype` is float32, float16 or bfloat16, or fp32, fp16 or bf16 (default: that of a `variant` fp16, bf16 or
    fp32, else as stored).
    `image_size` is the pipeline's default (default: 512), `gelu` the text encoder's activation for SD2
    (default: exact), `prediction_type` the scheduler's, "epsilon" or "v_prediction" (default: the
    pipeline's that the UNet is from, epsilon for KerasCV's). Where they are not given, the kcv2diffusers.json
    beside a checkpoint counts before these defaults. The noise schedule comes with the UNet.
    A `dry_run` makes all checks but those of the values, writes nothing, and returns what would be done.
    `progress` is told bytes done and in total. Raises Error with a message for the user; `out` is then as it
    was.
    """
    started = time.monotonic()
    target = Path(out)
    if dtype is not None and (dtype := full_name(dtype)) not in DTYPES:
        raise no_choice("--dtype", dtype, [*DTYPES, *ALIASES])
    dtype = _dtype(dtype, variant)
    if prediction_type not in (None, *PREDICTION_TYPES):
        raise no_choice("--prediction-type", prediction_type, PREDICTION_TYPES)
    if image_size is not None and (image_size < 64 or image_size % 64):
        raise Error(f"--image-size {image_size}: give a multiple of 64.")
    check_free(target, overwrite=overwrite, replaceable=is_output)
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
    text = parts.get("text_encoder")
    files = _tokenizer(text, tokenizer, given, placeholder_tokens, only_given)
    scheduler, scheduler_origin = _scheduler(parts.get("unet"), prediction_type)

    plans: list[tuple[Table, list[Entry], np.dtype]] = []
    configs, dtypes, halved = {}, {}, dict[str, str]()
    outline: list[Moved] = []
    for table in tables().values():
        mine = [parts[part] for part in table.parts if part in parts]
        if not mine:
            continue
        entries = [entry for match in mine for entry in to_diffusers(match)]
        stated = _stated_dtype(mine)
        kept = dtype or stated
        kind = DTYPES[kept] if kept else common_dtype(entry.tensor for entry in entries)
        plans.append((table, entries, kind))
        target_name = f"{table.folder}/{_with_variant(table.weights, variant)}"
        outline += [moved(match, target_name, kind) for match in mine]
        dtypes[table.folder] = kind.name
        if stated and not dtype:
            halved[table.folder] = stated
        configs[table.folder] = config_for(mine[0], filler, image_size, gelu, files)
    earlier = files.placeholder_tokens if files and text and text.keras else ()
    if halved:
        notes.append(
            f"As in the pipeline before to-keras: {', '.join(f'{f} {n}' for f, n in halved.items())}; "
            "--dtype float32 keeps every bit."
        )
    embeddings = _embeddings(text, [*earlier, *placeholder_tokens], dtypes.get("text_encoder"))

    for match in parts.values():
        if match.source.path.resolve().is_relative_to(target.resolve()):
            raise Error(
                f"{match.source.path}: lies inside {target}, which would be replaced.\nChoose another --out."
            )
    needed = sum(math.prod(e.shape) * kind.itemsize for _, entries, kind in plans for e in entries)
    if complete:
        notes.append("The safety checker is off: KerasCV has none.")
    planned = Converted(
        out=target,
        version=_version(parts),
        complete=complete,
        parts={part: f"{m.place} ({m.source.container})" for part, m in parts.items()},
        sources={part: match.source.path for part, match in parts.items() if match.keras},
        base=filler.paths[0] if filler.components else None,
        dtypes=dtypes,
        missing=missing,
        bytes_read=sum(part.from_bytes for part in outline),
        bytes_written=needed,
        seconds=time.monotonic() - started,
        notes=notes,
        moved=outline,
        scheduler=f"{scheduler['_class_name']}, {scheduler_origin}" if complete else None,
        tokenizer=shown(files.origin) if files else None,
        dry_run=dry_run,
    )
    if dry_run:
        check_target(target, overwrite=overwrite, replaceable=is_output, needed=needed + _SLACK)
        return planned
    with new_folder(target, overwrite=overwrite, replaceable=is_output, needed=needed + _SLACK) as folder:
        jobs: list[Job] = []
        for table, entries, kind in plans:
            write_json(folder / table.folder / "config.json", configs[table.folder])
            path = folder / table.folder / _with_variant(table.weights, variant)
            jobs += write_safetensors(path, entries, kind)
        for name, entry, kind in embeddings:
            jobs += write_safetensors(folder / name, [entry], kind)
        total = run_finite(jobs, progress, allow_nonfinite=allow_nonfinite)
        for path in {job.target for job in jobs}:
            with safe_open(path, framework="numpy"):  # the library's own check of the header
                pass
        if files is not None:
            length = text.dims["length"] if text else 77
            write_tokenizer(files, folder / "tokenizer", placeholder_tokens, length)
        if complete:
            write_json(folder / "scheduler" / "scheduler_config.json", scheduler)
            index = model_index({t.folder: t for t, _, _ in plans}, scheduler["_class_name"])
            write_json(folder / "model_index.json", index)
            write_json(
                folder / CONVERSION_FILE,
                record(parts, used, dtypes, Path(os.path.abspath(target))),  # noqa: PTH100
            )
    return replace(planned, bytes_read=total, seconds=time.monotonic() - started)


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
        paths = [path for b in bases for path in locate_all(b, pipelines=True, parts=needed, variant=variant)]
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
    if text is None:
        if placeholder_tokens:
            raise Error("--placeholder-token names rows of a text encoder, and none is given.")
        return None
    if only_given and tokenizer is None and not placeholder_tokens:
        if text.known:
            check_rows(text, CLIP_VOCABULARY, ())
        return None
    named = None if tokenizer is None else locate(tokenizer, parts=())
    files = find_tokenizer(named, [*homes(text), *given])
    check_tokenizer(text, files, placeholder_tokens)
    return files


def _scheduler(unet: Match | None, prediction_type: str | None) -> tuple[dict[str, Any], str]:
    """The scheduler's config, which is what the UNet was trained with, and what it predicts if that is given;
    and whence it comes.
    """
    config, file = scheduler_with(unet) if unet else (SCHEDULER, None)
    stated = file is not None and file.is_file() and config != SCHEDULER
    origin = f"as {shown(file)} states" if file and stated else "as Stable Diffusion has it"
    return config | ({"prediction_type": prediction_type} if prediction_type else {}), origin


def _dtype(dtype: str | None, variant: str | None) -> str | None:
    """The dtype asked for, by its own name or by that of a variant."""
    implied = ALIASES.get(variant or "")
    if dtype and implied and dtype != implied:
        raise Error(
            f"--variant {variant} names files of {implied}, and --dtype is {dtype}.\n"
            "Leave one of the two away, or name the variant otherwise."
        )
    return dtype or implied


def _stated_dtype(matches: Sequence[Match]) -> str | None:
    """The dtype of the pipeline that `to_keras` made these checkpoints of, if it made them."""
    table = matches[0].spec.table
    stated = {user_dtype(match.source.path, table) if match.keras else None for match in matches}
    return stated.pop() if len(stated) == 1 else None


def config_for(
    match: Match, filler: Filler, image_size: int | None, gelu: str | None, files: TokenizerFiles | None
) -> dict[str, Any]:
    """The config.json of a part's component: from the table, and from `filler` what weights do not tell."""
    table = match.spec.table
    if not match.keras:  # the base's own component, with the base's own config
        kept = _base_config(match, filler.components[table.folder])
        return kept if "_class_name" in kept else kept | LOADED
    overrides = stated_beside(match, _of_base(match, filler))
    if gelu and match.version == "sd2" and "hidden_act" in table.versions["sd2"].config:
        overrides["hidden_act"] = _GELU[gelu]
    if image_size is not None:
        overrides.pop("sample_size", None)
    require_heads(match, overrides)
    sizes = {"words": min(CLIP_VOCABULARY, match.dims.get("vocabulary", 0))}
    if files:
        sizes = {"words": len(files.vocab), "bos": files.vocab[BOS], "eos": files.vocab[EOS]}
    config = config_of(
        table,
        match.version,
        match.dims | sizes,
        image_size=image_size or IMAGE_SIZE,
        overrides=overrides,
    )
    check_ids(match.source.path, config, match.dims.get("vocabulary", 0))
    return config


def _base_config(match: Match, component: Component) -> dict[str, Any]:
    path = component.path / "config.json"
    check_sizes(path, match, component.config)
    check_ids(path, component.config, match.dims.get("vocabulary", 0))
    return {k: v for k, v in component.config.items() if k not in NOT_KEPT}


def _of_base(match: Match, filler: Filler) -> dict[str, Any]:
    """What a base of the same shape says of a model of unusual widths."""
    table = match.spec.table
    component = filler.components.get(table.folder)
    base = next(iter(component.parts.values())) if component else filler.parts.get(match.part)
    if match.known or base is None or not same_shape(match, base):
        return {}
    return untold(table, component.config) if component else stated_beside(base)


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


def is_output(path: Path) -> bool:
    """Whether a folder has nothing but what `convert` writes, so that it may be replaced."""
    return all(
        entry.name in _OUTPUT or any(entry.match(pattern) for pattern in _OUTPUT_FILES)
        for entry in path.iterdir()
    )


def _version(parts: Mapping[str, Match]) -> str:
    return next((m.version for m in parts.values() if m.version != "any"), "any")


def _with_variant(name: str, variant: str | None) -> str:
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}.{variant}.{suffix}" if variant else name
