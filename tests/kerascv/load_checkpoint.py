"""Load a weights file into a KerasCV model that held other values; print the digests of what it then holds.

python load_checkpoint.py FILE PART VERSION [--kind small|full] [--vocabulary N]
"""

from __future__ import annotations

import argparse
import json
import os

os.environ.setdefault("TF_CPP_MIN_LOG_LEVEL", "3")

import expected
import stack


def main() -> None:
    parser = argparse.ArgumentParser()
    parser.add_argument("file")
    parser.add_argument("part")
    parser.add_argument("version", type=int)
    parser.add_argument("--kind", default="small")
    parser.add_argument("--vocabulary", type=int)
    args = parser.parse_args()
    model = stack.build(args.part, args.version, args.kind, 64, 999, args.vocabulary)
    model.load_weights(args.file)
    print(json.dumps(expected.digests(args.part, model)))


if __name__ == "__main__":
    main()
