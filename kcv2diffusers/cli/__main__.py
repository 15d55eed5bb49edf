"""What `kcv2diffusers` and `python -m kcv2diffusers.cli` start."""

import gc
import sys

from kcv2diffusers.cli import main
from kcv2diffusers.processes import restart_to_train


def start() -> None:
    if sys.argv[1:2] == ["dreambooth"]:
        restart_to_train()
    try:
        main()
    finally:
        gc.freeze()  # or else Python looks through all objects once more before it ends, a tenth of `inspect`


if __name__ == "__main__":
    start()
