"""Time and peak memory of converting a full-size MMDiT of Stable Diffusion 3 medium, interleaved with `cp`.

    python benchmarks/convert_sd3.py [--work DIR] [--runs 5] [--dtypes float32 float16]

The file has the names, shapes and layout of KerasHub's and random values: 2 billion numbers need no model to
be built. It is written to DIR first (8 GB in float32, and as much again for the copy), and removed at last.
Time and memory are measured as in benchmarks/convert.py. The table goes to .cache/benchmark-sd3.md.
"""

from __future__ import annotations

import argparse
import compileall
import multiprocessing
import random
import shutil
import statistics
import sys
from pathlib import Path

import h5py
import numpy as np
from convert import ROOT, Run, run
from interleaved import machine

from kcv2diffusers.maps.tables import spec


def make(path: Path, dtype: str) -> int:
    """Write the weights; returns their number."""
    mmdit, total = spec("mmdit", "sd3"), 0
    values = np.random.default_rng(0).standard_normal(1 << 27, dtype=np.float32).astype(dtype, copy=False)
    with h5py.File(path, "w") as file:
        for slot in mmdit.existing(mmdit.nominal):
            if slot.keras_name in file:
                continue  # another piece of the same variable
            shape = slot.whole_shape(mmdit.nominal)
            count = int(np.prod(shape))
            start = total % (values.size - count)
            file[slot.keras_name] = values[start : start + count].reshape(shape)
            total += count
    return total


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "benchmark-sd3")
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--dtypes", nargs="+", default=["float32", "float16"])
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    compileall.compile_dir(ROOT / "kcv2diffusers", quiet=1)  # as an installation does
    lines = [
        f"{machine()}; medians of {args.runs} rounds in shuffled order:",
        "",
        "| | GB | seconds | to cp | peak MB |",
        "|---|--:|--:|--:|--:|",
    ]
    for dtype in args.dtypes:
        lines += compare(args.work, dtype, args.runs)
    shutil.rmtree(args.work)
    print("\n".join(lines))
    (ROOT / ".cache" / "benchmark-sd3.md").write_text("\n".join(lines) + "\n")


def compare(work: Path, dtype: str, runs: int) -> list[str]:
    """The rows of the table for one dtype."""
    file, out, copy = work / "mmdit.weights.h5", work / "out", work / "copy.h5"
    with multiprocessing.get_context("spawn").Pool(1) as child:  # whose memory the commands do not inherit
        count = child.apply(make, (file, dtype))
    kinds: dict[str, list[str | Path]] = {
        f"cp, {dtype}": ["cp", file, copy],
        f"convert {count / 1e9:.2f} billion weights, {dtype}": [
            sys.executable, "-m", "kcv2diffusers", "convert", file, "--out", out, "--base", "none"
        ],
    }  # fmt: skip
    results: dict[str, list[Run]] = {kind: [] for kind in kinds}
    for round_ in range(runs + 1):
        for kind in random.Random(round_).sample(list(kinds), len(kinds)):
            shutil.rmtree(out, ignore_errors=True)
            copy.unlink(missing_ok=True)
            done = run(kinds[kind], watched=not round_)
            results[kind].append(done)
            print(
                f"{round_} {kind}: {done.seconds:.2f} s, {done.peak_mb:.0f} MB", file=sys.stderr, flush=True
            )
    # The first run is the warm-up: its time does not count, its memory does.
    seconds = {kind: statistics.median(r.seconds for r in found[1:]) for kind, found in results.items()}
    size, base = file.stat().st_size / 1e9, next(iter(seconds.values()))
    return [
        f"| {kind} | {size:.2f} | {typical:.2f} | {typical / base:.2f} | "
        f"{max(r.peak_mb for r in results[kind]):.0f} |"
        for kind, typical in seconds.items()
    ]


if __name__ == "__main__":
    main()
