"""Contenders measured in turn, each in a process of its own, so that a busy spell of the machine does not
fall on one of them only.
"""

from __future__ import annotations

import json
import os
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

ROOT = Path(__file__).parents[1]
Figures = dict[str, float]


def rounds(
    script: str, contenders: Mapping[str, str], count: int, options: Sequence[str]
) -> dict[str, list[Figures]]:
    """What `script options --worker NAME` reports of each contender, `count` times; they map to the
    KERAS_BACKEND of their processes. One that fails is left out, with its last words on stderr.
    """
    results: dict[str, list[Figures]] = {name: [] for name in contenders}
    for _ in range(count):
        for name, backend in contenders.items():
            environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
            done = subprocess.run(
                [sys.executable, script, *options, "--worker", name],
                env=environment,
                capture_output=True,
                text=True,
                check=False,
            )
            lines = [line for line in done.stdout.splitlines() if line.startswith("RESULT ")]
            if not lines:
                print(f"{name} failed ({done.returncode}):\n{done.stderr[-2000:]}", file=sys.stderr)
                continue
            results[name].append(json.loads(lines[-1].removeprefix("RESULT ")))
            print(name, results[name][-1], file=sys.stderr, flush=True)
    return {name: found for name, found in results.items() if found}


def report(figures: Figures) -> None:
    """What a worker says at its end."""
    print("RESULT", json.dumps(figures))


def medians(found: Sequence[Figures]) -> Figures:
    """Of each figure over the rounds; memory is the largest."""
    return {
        key: (max if "memory" in key else statistics.median)([figures[key] for figures in found])
        for key in found[0]
    }
