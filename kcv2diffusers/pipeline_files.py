"""File names in a pipeline folder and beside checkpoints, and variants of weight files."""

from __future__ import annotations

import re
from collections.abc import Iterable
from pathlib import Path

MODEL_INDEX = "model_index.json"
COMPONENT_CONFIG = "config.json"
SCHEDULER_FILE = Path("scheduler", "scheduler_config.json")
TOKENIZER = "tokenizer"
TOKENIZER_FILES = (
    "vocab.json",
    "merges.txt",
    "tokenizer.json",
    "tokenizer_config.json",
    "special_tokens_map.json",
    "added_tokens.json",
    "spiece.model",
)
KERAS_VOCABULARY = "vocabulary.json"
"""What KerasHub calls vocab.json."""
_SHARD = re.compile(r"-\d{5}-of-\d{5}\.")
CARD = "README.md"
CONFIG_FILE = "kcv2diffusers.json"
"""Beside a checkpoint: config entries that cannot be inferred from the weights."""
CONVERSION_FILE = "conversion.json"
"""In a pipeline folder: the sources of the conversion."""
VERIFICATION_FILE = "verification.json"
"""In a pipeline folder: the result of `--verify`. It contains local paths and is not published."""
RUN_FILE = "dreambooth.toml"
"""In a pipeline folder: the options of the DreamBooth run that trained it."""
LORA_FILE = "pytorch_lora_weights.safetensors"
"""A LoRA in the format of diffusers, whose `load_lora_weights` looks for this name."""
KOHYA_LORA_FILE = "kohya_lora_weights.safetensors"
"""The same LoRA in the format of kohya, for ComfyUI and A1111."""
SAMPLES_FILE = "samples.png"
EMBEDDINGS = "learned_embeds{}.safetensors"
"""Files for `load_textual_inversion`. The placeholder is empty for one file, else -0, -1, ..."""
EMBEDDINGS_PATTERN = EMBEDDINGS.format("*")


def with_variant(name: str, variant: str | None) -> str:
    """Return the name of a weight file in a variant, such as model.fp16.safetensors."""
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}.{variant}.{suffix}" if variant else name


def variant_of(name: str) -> str:
    """Return the variant in the name of a weight file, such as "fp16"; "" if there is none."""
    return name.rsplit("/")[-1].removesuffix(".safetensors").partition(".")[2]


def index_name(name: str) -> str:
    """Return the name of the index of a sharded weight file: model.fp16.safetensors ->
    model.safetensors.index.fp16.json, as diffusers and transformers name it."""
    stem, *variant, suffix = name.rsplit(".", 2) if name.count(".") > 1 else name.split(".")
    return ".".join([stem, suffix, "index", *variant, "json"])


def shard_names(name: str, there: Iterable[str]) -> list[str]:
    """Return the files among `there` that a sharded weight file `name` consists of, without its index."""
    stem, suffix = name.rsplit(".", 1)
    return [
        file
        for file in sorted(there)
        if (found := _SHARD.search(file)) and file[: found.start()] == stem and file[found.end() :] == suffix
    ]


def weight_names(name: str, variant: str | None, there: Iterable[str]) -> list[str]:
    """Return the possible names of the weight file `name` of a component, best first.

    The order is: the requested `variant`, the plain name, the other variants among the files `there`. Of the
    other variants, EMA weights come before "non_ema" ones.
    """
    stem, suffix = name.rsplit(".", 1)
    whole = (file for file in sorted(there) if not _SHARD.search(file))
    others = [file for file in whole if file.startswith(f"{stem}.") and file.endswith(f".{suffix}")]
    others.sort(key=lambda file: "non_ema" in file)
    return list(dict.fromkeys([with_variant(name, variant), name, *others]))
