"""Small diffusers pipelines with random weights, written without building a model."""

from __future__ import annotations

import json
from importlib import resources
from pathlib import Path
from shutil import copytree
from typing import Any

import numpy as np
from safetensors.numpy import save_file

from kcv2diffusers.json_text import write_json
from kcv2diffusers.maps.parts import family_named
from kcv2diffusers.maps.tables import REPEAT, specs, tables_of
from kcv2diffusers.pipeline.configs import config_of, model_index
from kcv2diffusers.pipeline.scheduler import SCHEDULER

TOKENIZER = Path(str(resources.files("kcv2diffusers") / "tiny" / "tokenizer"))
LAYERS = {"sd1": 2, "sd2": 23}  # by the 23rd layer diffusers' script knows Stable Diffusion 2
CONFIGS: dict[str, dict[str, Any]] = {
    "unet": {"attention_head_dim": 4, "norm_num_groups": 4},
    "text_encoder": {"num_attention_heads": 2},
    "vae": {"norm_num_groups": 4},
}


def sizes(version: str) -> dict[str, dict[str, int]]:
    """The symbols of each component's weight map: widths that differ wherever Stable Diffusion's do."""
    words = len(json.loads((TOKENIZER / "vocab.json").read_text()))
    return {
        "unet": {"c0": 8, "c1": 16, "c2": 24, "c3": 24, "context": 12, "latent": 4},
        "text_encoder": {"width": 12, "length": 77, "vocabulary": words, REPEAT: LAYERS[version]},
        "vae": {"c0": 4, "c1": 8, "c2": 12, "c3": 12, "latent": 4},
    }


def random_pipeline(
    folder: Path, version: str = "sd1", dtype: str = "float32", prediction_type: str = "epsilon"
) -> Path:
    """Write a pipeline of "sd1" or "sd2"; every tensor is random, the same each time."""
    rng = np.random.default_rng(0)
    family = family_named("StableDiffusionPipeline")
    assert family is not None
    for table in tables_of(family):
        dims = sizes(version)[table.name]
        of = version if version in table.versions else "any"
        config = config_of(table, of, dims, image_size=64, overrides=CONFIGS[table.name])
        write_json(folder / table.folder / "config.json", config)
        tensors = {
            slot.target: rng.standard_normal([s.value(dims) for s in slot.diffusers_shape]).astype(dtype)
            for spec in specs()
            if spec.table is table and spec.version == of
            for slot in spec.slots(dims.get(REPEAT, 0))
            if slot.exists(dims)
        }
        save_file(tensors, folder / table.folder / table.weights, {"format": "pt"})
    copytree(TOKENIZER, folder / "tokenizer")
    write_json(
        folder / "scheduler" / "scheduler_config.json", SCHEDULER | {"prediction_type": prediction_type}
    )
    write_json(folder / "model_index.json", model_index(family, SCHEDULER["_class_name"], family.parts))
    return folder
