"""Genuine KerasHub models load files that this package wrote: the variables that differ from the original.

    python load.py TOKENIZER PLAN

PLAN is a JSON file: for each kind, the file of each part by its attribute of the backbone ("diffuser"), and
the folder of a "preset". Prints a JSON object: for each kind and part, the number of variables, and the paths
of those that are not as support/kerashub/make_models.py has them, bit for bit.
"""

from __future__ import annotations

import json
import os
import sys
from pathlib import Path
from typing import Any

os.environ.setdefault("KERAS_BACKEND", "torch")
os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import keras
import keras_hub
import tiny


def values(model: Any) -> list[tuple[str, bytes]]:
    return [(v.path, keras.ops.convert_to_numpy(v).tobytes()) for v in model.weights]


def loaded(backbone: Any, part: str, file: str) -> Any:
    if part == "preset":
        return keras_hub.models.StableDiffusion3Backbone.from_preset(file)
    model = getattr(backbone, part)
    model.load_weights(file)
    return model


def main(arguments: list[str]) -> None:
    tokenizer, plan = map(Path, arguments)
    words = len(json.loads((tokenizer / "vocab.json").read_text()))
    found: dict[str, dict[str, Any]] = {}
    for kind, files in json.loads(plan.read_text()).items():
        backbone = tiny.backbone(kind, words, with_t5=kind == "sd35m")
        wanted = {p: values(backbone if p == "preset" else getattr(backbone, p)) for p in files}
        tiny.randomise(backbone, 99)
        found[kind] = {}
        for part, file in files.items():
            got = values(loaded(backbone, part, file))
            pairs = zip(got, wanted[part], strict=True)
            different = [path for (_, one), (path, other) in pairs if one != other]
            found[kind][part] = {"different": different, "variables": len(got)}
    print(json.dumps(found))


if __name__ == "__main__":
    main(sys.argv[1:])
