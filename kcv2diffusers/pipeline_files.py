"""Names of the files in a pipeline folder and beside checkpoints, and the variants of weight files."""

from __future__ import annotations

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
)
CARD = "README.md"
CONFIG_FILE = "kcv2diffusers.json"
"""Beside a checkpoint: what its weights do not tell."""
CONVERSION_FILE = "conversion.json"
"""In a pipeline folder: what it was converted from."""
VERIFICATION_FILE = "verification.json"
"""In a pipeline folder: what `--verify` found. It holds paths and is not published."""
RUN_FILE = "dreambooth.toml"
"""In a pipeline folder: the options of the DreamBooth run that made it."""
LORA_FILE = "pytorch_lora_weights.safetensors"
SAMPLES_FILE = "samples.png"
EMBEDDINGS = "learned_embeds{}.safetensors"
"""Files of `load_textual_inversion`: the plain name, or -0, -1, ... if there are several."""
EMBEDDINGS_PATTERN = EMBEDDINGS.format("*")


def with_variant(name: str, variant: str | None) -> str:
    """The name of a weight file in a variant: model.fp16.safetensors."""
    stem, suffix = name.rsplit(".", 1)
    return f"{stem}.{variant}.{suffix}" if variant else name


def variant_of(name: str) -> str:
    """What stands between the name of a weight file and .safetensors: "fp16", or nothing."""
    return name.rsplit("/")[-1].removesuffix(".safetensors").partition(".")[2]


def weight_names(name: str, variant: str | None, there: Iterable[str]) -> list[str]:
    """The names that the weight file `name` of a component may have, best first: the `variant` asked for, the
    plain name, then other variants among the files that are `there`, averaged weights first.
    """
    stem, suffix = name.rsplit(".", 1)
    others = [file for file in sorted(there) if file.startswith(f"{stem}.") and file.endswith(f".{suffix}")]
    others.sort(key=lambda file: "non_ema" in file)
    return list(dict.fromkeys([with_variant(name, variant), name, *others]))
