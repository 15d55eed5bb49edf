"""Entry point of `kcv2diffusers` and `python -m kcv2diffusers`."""

import sys

from kcv2diffusers.errors import Error
from kcv2diffusers.system.garbage import collect_seldom
from kcv2diffusers.system.interruption import hold_signals, interruptible
from kcv2diffusers.system.processes import let_threads_sleep, restart_to_train


def start() -> None:
    """Run the command line."""
    hold_signals()
    if sys.argv[1:2] == ["dreambooth"]:
        restart_to_train()
    else:
        let_threads_sleep()
    collect_seldom()
    with interruptible():
        try:
            from kcv2diffusers.cli import main
        except Error as error:  # a weight map that the user supplied is invalid
            sys.exit(f"kcv2diffusers: {error}")
        main()


if __name__ == "__main__":
    start()
