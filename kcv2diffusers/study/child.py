"""A command of this package as a child: `python -m kcv2diffusers.study.child dreambooth ...`.

If its standard input closes because its parent ended, it receives SIGTERM: a training then saves and ends,
and the next run of the study goes on with it.
"""

from __future__ import annotations

import runpy
import signal
import sys

from kcv2diffusers.system.children import end_with_parent
from kcv2diffusers.system.interruption import hold_signals
from kcv2diffusers.system.processes import restart_to_train


def main() -> None:
    """Run the command."""
    hold_signals()
    restart_to_train()  # before the thread that watches the standard input
    end_with_parent(signal.SIGTERM)
    sys.argv[0] = "kcv2diffusers"
    runpy.run_module("kcv2diffusers", run_name="__main__")


if __name__ == "__main__":
    main()
