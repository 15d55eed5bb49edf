"""Verification of a full-size SD1 conversion with random weights: time, memory, and what is measured.

    python benchmarks/verify.py [--work DIR] [--runs 3] [--size 256] [--steps 25] [--reference builtin]

Takes the KerasCV files of benchmarks/convert.py from DIR (made if they are not there) and converts them. Then
the level of weights and a conversion in turn, a process each, medians of `--runs` after one round of warm-up;
then all levels once, with a report in DIR/report. Peak memory is that of the process and its children
together. The table goes to .cache/verify.md.
"""

from __future__ import annotations

import argparse
import json
import os
import shutil
import statistics
import sys
from pathlib import Path

from convert import PARTS, ROOT, Run, make, run
from interleaved import machine

NAMES = {"builtin": "the models of kcv2diffusers", "keras-cv": "KerasCV's own classes"}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "benchmark")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--size", type=int, default=256)
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--reference", choices=NAMES, default="builtin")
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    make(args.work)
    os.environ.setdefault("KERAS_BACKEND", "tensorflow" if args.reference == "keras-cv" else "torch")
    sources = [args.work / f"{part}-sd1-float32" / "weights.weights.h5" for part in PARTS]
    pipeline, other, report = (args.work / name for name in ("pipeline", "out", "report"))
    cli: list[str | Path] = [sys.executable, "-m", "kcv2diffusers"]
    run([*cli, "convert", *sources, "--out", pipeline, "--overwrite"])
    kinds: dict[str, list[str | Path]] = {
        "convert": [*cli, "convert", *sources, "--out", other],
        "verify --level weights": [*cli, "verify", pipeline, *sources, "--level", "weights"],
    }
    results: dict[str, list[Run]] = {kind: [] for kind in kinds}
    for round_ in range(args.runs + 1):
        for kind, command in kinds.items():
            shutil.rmtree(other, ignore_errors=True)
            done = run(command)
            if round_:
                results[kind].append(done)
            print(
                f"{round_} {kind}: {done.seconds:.2f} s, {done.peak_mb:.0f} MB", file=sys.stderr, flush=True
            )
    shutil.rmtree(other, ignore_errors=True)
    options = {
        "steps": args.steps,
        "images-per-prompt": args.seeds,
        "image-size": args.size,
        "reference": args.reference,
    }
    chosen = [word for name, value in options.items() for word in (f"--{name}", str(value))]
    whole = run([*cli, "verify", pipeline, *sources, *chosen, "--report", report])
    told = json.loads((report / "report.json").read_text())
    lines = [*table(results, whole, args), "", *figures(told)]
    print("\n".join(lines))
    (ROOT / ".cache" / "verify.md").write_text("\n".join(lines) + "\n")


def table(results: dict[str, list[Run]], whole: Run, args: argparse.Namespace) -> list[str]:
    lines = [
        f"{machine()}; SD1, 4.27 GB of random fp32 weights. The Keras side is {NAMES[args.reference]} on "
        f"{os.environ['KERAS_BACKEND']}; {args.size} px, {args.steps} steps, {args.seeds} seed(s):",
        "",
        "| | seconds | to convert | peak MB |",
        "|---|--:|--:|--:|",
    ]
    base = statistics.median(r.seconds for r in results["convert"])
    for kind, runs in results.items():
        seconds, peak = statistics.median(r.seconds for r in runs), max(r.peak_mb for r in runs)
        lines.append(f"| {kind} | {seconds:.2f} | {seconds / base:.2f} | {peak:.0f} |")
    return [*lines, f"| verify, all levels, with a report | {whole.seconds:.0f} |  | {whole.peak_mb:.0f} |"]


def figures(told: dict) -> list[str]:
    """Errors of the parts and of the pictures beside their bars."""
    lines = ["| part | stock | bar | attributed | bar | worst block |", "|---|--:|--:|--:|--:|--:|"]
    for part in told["modules"]:
        worst = max(block["error"] for block in part["blocks"])
        lines.append(
            f"| {part['name']} | {part['stock']:.1e} | {part['bar']:.0e} | {part['attributed']:.1e} "
            f"| {part['bar_attributed']:.0e} | {worst:.1e} |"
        )
    images = told["images"]
    least = {
        side: min(
            (run[side]["psnr"] for run in images["runs"] if run[side]["psnr"] != "infinite"), default=None
        )
        for side in ("stock", "attributed")
    }
    said = {side: "identical" if value is None else f"{value:.1f} dB" for side, value in least.items()}
    lines.append(
        f"| pictures, least PSNR | {said['stock']} | {images['bar']:g} dB | {said['attributed']} "
        f"| {images['bar_attributed']:g} dB |  |"
    )
    return [*lines, "", f"Verdict: {told['reason']}."]


if __name__ == "__main__":
    main()
