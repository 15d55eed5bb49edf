"""Digests of the variables after genuine KerasHub models load files: written by this package.

    python load.py KIND TOKENIZER [PART=FILE | preset=FOLDER ...]

Prints a JSON object: for each argument, the SHA-256 of each variable's bytes by its path.
"""

from __future__ import annotations

import hashlib
import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "jax")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras_hub
import numpy as np
import tiny


def digests(model: Any) -> dict[str, str]:
    return {v.path: hashlib.sha256(np.asarray(v.value).tobytes()).hexdigest() for v in model.weights}


def main(arguments: list[str]) -> None:
    kind, tokenizer, *given = arguments
    words = len(json.loads((Path(tokenizer) / "vocab.json").read_text()))
    backbone = tiny.backbone(kind, words, with_t5=kind == "sd35m", seed=0)
    found = {"": digests(backbone)}
    tiny.randomise(backbone, 99)
    for argument in given:
        part, _, path = argument.partition("=")
        if part == "preset":
            model = keras_hub.models.StableDiffusion3Backbone.from_preset(path)
        else:
            model = backbone if part == "backbone" else getattr(backbone, part)
            model.load_weights(path)
        found[argument] = digests(model)
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
