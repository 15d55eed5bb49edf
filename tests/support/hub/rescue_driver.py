"""A rescue in this process, without long waits, to be killed.

`python rescue_driver.py SOURCE OWNER WORK BASE` prints the number of repositories of each outcome.
"""

from __future__ import annotations

import sys
import time
from collections import Counter
from pathlib import Path

from kcv2diffusers.rescue import repositories, run

_sleep = time.sleep


def main(source: str, owner: str, work: str, base: str) -> None:
    time.sleep = lambda seconds: _sleep(min(seconds, 0.02))
    options = run.Options(work=Path(work), target=owner, base=[base])
    outcome = run.rescue(source, lambda: repositories.named(source), options, engine=run.in_this_process)
    print(Counter(result.outcome for result in outcome.results))
    sys.exit(0 if outcome.complete else 1)


if __name__ == "__main__":
    main(*sys.argv[1:])
