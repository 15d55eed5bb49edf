"""What `kcv2diffusers` and `python -m kcv2diffusers` start."""

import sys

from kcv2diffusers.interruption import hold_signals, interruptible


def start() -> None:
    """Run the command line."""
    hold_signals()
    if sys.argv[1:2] == ["dreambooth"]:
        from kcv2diffusers.processes import restart_to_train

        restart_to_train()
    with interruptible():
        from kcv2diffusers.cli import main

        main()


if __name__ == "__main__":
    start()
