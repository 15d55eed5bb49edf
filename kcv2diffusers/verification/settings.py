"""Check what accompanies the weights: config entries that the tables determine, scheduler, tokenizer."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from kcv2diffusers.errors import Error, SourceError
from kcv2diffusers.maps.parts import TokenizerFolder, family_of
from kcv2diffusers.pipeline.configs import model_index
from kcv2diffusers.pipeline.tokenizer_files import EOS, TokenizerFiles, find_tokenizer
from kcv2diffusers.pipeline_files import MODEL_INDEX, SCHEDULER_FILE
from kcv2diffusers.sources.diffusers_pipeline import read_json
from kcv2diffusers.verification.sides import Side

# Entries that do not change a model's inputs or its computation: free choices, and entries used in training
# only.
_FREE = {
    "architectures",
    "attention_dropout",
    "bos_token_id",
    "dropout",
    "eos_token_id",
    "initializer_factor",
    "initializer_range",
    "pad_token_id",
    "projection_dim",
    "sample_size",
    "torch_dtype",
}
_TOKENIZER_FILES = ("tokenizer_config.json", "special_tokens_map.json")
# steps_offset has an effect only if no timesteps are passed. The others have one only in other scheduler
# classes that are created from this config.
_FREE_SCHEDULER = {"clip_sample", "set_alpha_to_one", "skip_prk_steps", "steps_offset"}
# diffusers' defaults for missing entries, as far as they equal what a conversion writes.
_SCHEDULER_DEFAULTS = {
    "num_train_timesteps": 1000,
    "prediction_type": "epsilon",
    "rescale_betas_zero_snr": False,
    "trained_betas": None,
    "use_karras_sigmas": False,
}


def check_settings(
    pipeline: Path, sides: Mapping[str, Side], sources: Sequence[Path], scheduler: Mapping[str, Any]
) -> list[str]:
    """Everything that differs from what the conversion writes, one line each.

    `sources` are checkpoints, which may have a tokenizer beside them. `scheduler` is the config that a
    conversion writes; empty for none.
    """
    problems = []
    for side in sides.values():
        if side.given:
            problems += _config(side)
    problems = list(dict.fromkeys(problems))  # the two halves of a VAE share a config
    if (pipeline / MODEL_INDEX).is_file():
        problems += _index(pipeline / MODEL_INDEX, sides, scheduler.get("_class_name"))
        if scheduler:
            problems += _scheduler(pipeline / SCHEDULER_FILE, scheduler)
    for tokenizer in family_of(sides).tokenizers:
        if not tokenizer.copied and (pipeline / tokenizer.name).is_dir():
            problems += _tokenizer(pipeline / tokenizer.name, tokenizer, sides, sources)
    return problems


def _config(side: Side) -> list[str]:
    """Entries that are present and differ; a missing entry takes the library's default."""
    actual, where = side.component.config, f"{side.component.path.name}/config.json"
    return [
        f"{where}: {name} is {json.dumps(actual[name])}, not {json.dumps(value)}"
        for name, value in sorted(side.config.items())
        if name in actual and name not in _FREE and not name.startswith("_") and actual[name] != value
    ]


def _index(path: Path, sides: Mapping[str, Side], scheduler: str | None) -> list[str]:
    """Components of a different class; diffusers imports whatever library an entry names."""
    wanted = model_index(family_of(sides), scheduler, sides)
    try:
        actual = read_json(path)
    except SourceError:
        return ["model_index.json: not a JSON object"]
    return [
        f"model_index.json: {name} is {json.dumps(actual.get(name))}, not {json.dumps(wanted[name])}"
        for name in sorted(name for name, value in wanted.items() if isinstance(value, list) and any(value))
        if actual.get(name) not in (wanted[name], [*wanted[name][:-1], wanted[name][-1] + "Fast"])
    ]


def _scheduler(path: Path, wanted: Mapping[str, Any]) -> list[str]:
    if not path.exists():
        return ["scheduler/scheduler_config.json: missing"]
    try:
        actual = _SCHEDULER_DEFAULTS | read_json(path)
    except SourceError:
        return ["scheduler/scheduler_config.json: not a JSON object"]
    wrong = {name: value for name, value in wanted.items() if actual.get(name) != value}
    if "_class_name" in wrong:  # the entries of another class are not comparable
        wrong = {"_class_name": wrong["_class_name"]}
    return [
        f"scheduler/scheduler_config.json: {name} is {json.dumps(actual.get(name))}, not {json.dumps(value)}"
        for name, value in wrong.items()
        if name not in _FREE_SCHEDULER
    ]


def _tokenizer(
    folder: Path, tokenizer: TokenizerFolder, sides: Mapping[str, Side], sources: Sequence[Path]
) -> list[str]:
    problems, stated, pad = [], False, tokenizer.pad or EOS
    text = sides.get(tokenizer.part)
    for name in _TOKENIZER_FILES:
        if not (folder / name).exists():
            continue
        try:
            data = read_json(folder / name)
        except SourceError:
            problems.append(f"{tokenizer.name}/{name}: not a JSON object")
            continue
        token, length = data.get("pad_token"), data.get("model_max_length")
        token = token.get("content") if isinstance(token, dict) else token
        stated = stated or token is not None
        if token is not None and token != pad:
            problems.append(
                f"{tokenizer.name}/{name}: pad_token is {json.dumps(token)}, not {json.dumps(pad)}"
            )
        if length is not None and text is not None and length != text.source.dims["length"]:
            wanted = text.source.dims["length"]
            problems.append(
                f"{tokenizer.name}/{name}: model_max_length is {json.dumps(length)}, not {wanted}"
            )
    if not stated and not problems:
        problems.append(f"{tokenizer.name}: states no pad_token, which must be {json.dumps(pad)}")
    try:
        files = find_tokenizer(folder)
        return problems + _vocabulary(tokenizer.name, files, text, sources)
    except SourceError as error:
        return [*problems, f"{tokenizer.name}: {error.problem}"]


def _vocabulary(name: str, files: TokenizerFiles, text: Side | None, sources: Sequence[Path]) -> list[str]:
    """Problems of the vocabulary.

    It must have as many tokens as the text encoder has embeddings, and equal that of a tokenizer beside a
    source.
    """
    problems = []
    if text is not None:
        tokens, rows = len(files.vocab) + len(files.placeholder_tokens), text.source.dims["vocabulary"]
        if tokens != rows and (tokens > rows or text.source.known):
            problems.append(
                f"{name}: {tokens} tokens for {rows} embeddings; convert with the text encoder's own, by "
                "--tokenizer"
            )
    for source in sources:
        if not (source / name).is_dir():
            continue
        try:
            other = find_tokenizer(source / name)
        except Error:
            continue
        if (files.vocab, files.merges) != (other.vocab, other.merges):
            problems.append(f"{name}: another vocabulary than that of {source / name}")
    return problems
