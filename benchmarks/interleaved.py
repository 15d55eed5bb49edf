"""Contenders measured in turn, each in a process of its own, so that a busy spell of the machine does not
fall on one of them only.
"""

from __future__ import annotations

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
from collections.abc import Mapping, Sequence
from pathlib import Path

from kcv2diffusers.system.processes import ALLOCATOR

ROOT = Path(__file__).parents[1]
Figures = dict[str, float]


def rounds(
    script: str, contenders: Mapping[str, str], count: int, arguments: Sequence[str]
) -> dict[str, list[Figures]]:
    """What `script arguments --worker NAME` reports of each contender, `count` times; they map to the
    KERAS_BACKEND of their processes. One that fails is left out, with its last words on stderr.
    """
    results: dict[str, list[Figures]] = {name: [] for name in contenders}
    for _ in range(count):
        for name, backend in contenders.items():
            environment = {**os.environ, "KERAS_BACKEND": backend, "PYTHONPATH": str(ROOT)}
            if name.startswith("kcv2diffusers"):
                environment |= ALLOCATOR  # as `kcv2diffusers dreambooth` starts itself
            done = subprocess.run(
                [sys.executable, script, *arguments, "--worker", name],
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


def options(description: str | None, contenders: Mapping[str, object], count: int) -> argparse.ArgumentParser:
    """The options that each benchmark of UNet steps has; `count` is its usual number of rounds."""
    parser = argparse.ArgumentParser(
        description=description, formatter_class=argparse.RawDescriptionHelpFormatter
    )
    parser.add_argument("--small", action="store_true", help="a tenth of SD1's widths, to try the script")
    parser.add_argument("--pixels", type=int, default=256)
    parser.add_argument("--rounds", type=int, default=count)
    parser.add_argument("--repeat", type=int, default=3, help="timed calls in a process, after the first")
    parser.add_argument("--only", nargs="*", choices=contenders, default=list(contenders))
    parser.add_argument("--worker", choices=contenders, help=argparse.SUPPRESS)
    return parser


def alone() -> None:
    """In a worker, before anything else: hide JAX from other backends. Keras imports it wherever it is
    installed, for one of its callbacks, which takes 0.1 GB; who trains on PyTorch need not have it.
    """
    if os.environ["KERAS_BACKEND"] != "jax":
        sys.modules["jax"] = None  # type: ignore[assignment]


def report(figures: Figures) -> None:
    """What a worker says at its end."""
    print("RESULT", json.dumps(figures))


def medians(found: Sequence[Figures]) -> Figures:
    """Of each figure over the rounds; memory is the largest."""
    return {
        key: (max if "memory" in key else statistics.median)([figures[key] for figures in found])
        for key in found[0]
    }


def machine() -> str:
    """The processor, the system and Python, for the head of a table (Linux)."""
    lines = Path("/proc/cpuinfo").read_text().splitlines()
    found = {name.strip(): value.strip() for name, _, value in (line.partition(":") for line in lines)}
    model = found.get("model name", platform.processor())
    if "avx512f" in found.get("flags", ""):
        model += " with AVX-512"
    return (
        f"{os.cpu_count()} cores of {model}, Linux {platform.release()}, Python {platform.python_version()}"
    )
