"""Load weights files into KerasCV models that held other values; print the digests of what they then hold.

    python load_checkpoint.py [--kind small|full] FILE PART VERSION VOCABULARY [FILE PART VERSION ...]

The output is JSON, the digests by file. VOCABULARY is 0 for the usual one.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
from typing import Any

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import expected
import stack


def main(arguments: list[str]) -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("--kind", default="small")
    parser.add_argument("files", nargs="+")
    args = parser.parse_args(arguments)
    models: dict[tuple[str, ...], Any] = {}
    digests = {}
    for at in range(0, len(args.files), 4):
        file, *wanted = args.files[at : at + 4]
        part, version, vocabulary = wanted
        key = tuple(wanted)
        if key not in models:
            models[key] = stack.build(part, int(version), args.kind, vocabulary=int(vocabulary) or None)
        stack.randomise(models[key], seed=999)
        models[key].load_weights(file)
        digests[file] = expected.digests(part, models[key])
    print(json.dumps(digests))


if __name__ == "__main__":
    main(sys.argv[1:])
