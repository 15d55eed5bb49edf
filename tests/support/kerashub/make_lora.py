"""A LoRA of a tiny backbone, and the tensors with it. KerasHub numbers the layers as its backend orders them.

    KERAS_BACKEND=tensorflow python make_lora.py OUT TOKENIZER

Writes `adapter.lora.h5`, a LoRA of the backbone, of "sd3" of its MMDiT alone, and `merged/COMPONENT.npz` into
OUT/KIND for each kind that make_models.py leaves out: on PyTorch KerasHub has no T5.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import expected
import numpy as np
import tiny

KINDS = ("sd3", "sd35l")  # on PyTorch, in make_models.py
LAYERS = ("query", "value", "attention_qkv", "attention_proj", "dense1")


def make(backbone: Any, out: Path, kind: str) -> None:
    model = backbone.diffuser if kind == "sd3" else backbone
    model.enable_lora(4, target_layer_names=list(LAYERS))
    rng = np.random.default_rng(3)
    for layer in model._flatten_layers(include_self=False):
        for factor in ("lora_kernel_a", "lora_kernel_b"):
            if (variable := getattr(layer, factor, None)) is not None:
                variable.assign(0.2 * rng.standard_normal(tuple(variable.shape), dtype=np.float32))
    model.save_lora_weights(str(out / "adapter.lora.h5"))
    expected.write(out / "merged", backbone)


def main(arguments: list[str]) -> None:
    out, tokenizer = map(Path, arguments)
    words = len(json.loads((tokenizer / "vocab.json").read_text()))
    for kind in set(tiny.KINDS) - set(KINDS):
        make(tiny.backbone(kind, words, with_t5=kind == "sd35m"), out / kind, kind)


if __name__ == "__main__":
    main(sys.argv[1:])
