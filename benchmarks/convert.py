"""Time and peak memory of a full-size SD1 conversion, interleaved with `cp` of the same files.

    python benchmarks/convert.py [--work DIR] [--runs 9] [--space] [--script FILE] [--json FILE]

Makes genuine KerasCV files in DIR first if they are not there (6 GB of memory, 8.5 GB of disk), as legacy
`.h5` and `.weights.h5`. Every run is a process of its own: wall time from start to exit; peak memory of it
and its children together, shared pages counted once (PSS, five times a second), or the largest resident size
of one of them as the kernel counts it, if that is more. One run of each kind in a round, in shuffled order;
medians of the times, after one round of warm-up, in which the memory is watched (which takes time).
`--space` adds what the former conversion Space did: build the Keras models, load, copy into torch modules,
`save_pretrained` (UNet and text encoder only, as the Space; one run). `--script` adds diffusers' own way from
a pipeline to a single file, run on the same pipeline as our conversion (one run each): a copy of its
scripts/convert_diffusers_to_original_stable_diffusion.py, which the package does not contain.
"""

from __future__ import annotations

import argparse
import compileall
import json
import os
import random
import shutil
import statistics
import subprocess
import sys
import threading
import time
from dataclasses import dataclass
from pathlib import Path

from interleaved import machine

ROOT = Path(__file__).parent.parent
PARTS = ("unet", "text_encoder", "vae_decoder", "vae_encoder")


@dataclass
class Run:
    seconds: float
    peak_mb: float


def run(command: list[str | Path], watched: bool = True) -> Run:
    """Run a command to its end; raises if it fails. Unless it is `watched`, the memory is that of the largest
    of its processes.
    """
    os.sync()  # so that nobody pays for writing back the run before
    started = time.perf_counter()
    child = subprocess.Popen(command, stdout=subprocess.DEVNULL, stderr=subprocess.PIPE)
    assert child.stderr is not None
    peak, watching = 0.0, threading.Event()

    def watch() -> None:
        nonlocal peak
        while not watching.wait(0.2):
            peak = max(peak, memory_mb(child.pid))

    watcher = threading.Thread(target=watch)
    if watched:
        watcher.start()
    error = child.stderr.read()
    _, status, usage = os.wait4(child.pid, 0)
    seconds = time.perf_counter() - started
    watching.set()
    if watched:
        watcher.join()
    child.returncode = os.waitstatus_to_exitcode(status)
    if child.returncode:
        raise RuntimeError(f"{command}: {error.decode()[-2000:]}")
    return Run(seconds, max(peak, usage.ru_maxrss / 1024))


def memory_mb(process: int) -> float:
    """Proportional set size of a process and its children (Linux; 0 for those that have ended)."""
    try:
        children = Path(f"/proc/{process}/task/{process}/children").read_text().split()
        rollup = Path(f"/proc/{process}/smaps_rollup").read_text()
    except OSError:
        return 0.0
    own = next(int(line.split()[1]) for line in rollup.splitlines() if line.startswith("Pss:")) / 1024
    return own + sum(memory_mb(int(child)) for child in children)


def make(work: Path) -> None:
    """Genuine KerasCV files of all four parts, once."""
    if (work / "done").exists():
        return
    environment = {**os.environ, "TF_USE_LEGACY_KERAS": "1"}
    for part in PARTS:
        script = ROOT / "tests" / "support" / "kerascv" / "make_checkpoints.py"
        wanted = ["--parts", part, "--versions", "1", "--containers", "legacy.h5", "weights.weights.h5"]
        subprocess.run(
            [sys.executable, script, work, "--kind", "full", *wanted],
            env=environment,
            check=True,
        )
    (work / "done").touch()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "benchmark")
    parser.add_argument("--runs", type=int, default=9)
    parser.add_argument("--space", action="store_true")
    parser.add_argument("--script", type=Path)
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    make(args.work)
    compileall.compile_dir(ROOT / "kcv2diffusers", quiet=1)  # as an installation does
    folders = [args.work / f"{part}-sd1-float32" for part in PARTS]
    legacy = [folder / "legacy.h5" for folder in folders]
    keras3 = [folder / "weights.weights.h5" for folder in folders]
    unet = legacy[0]
    out, copies = args.work / "out", args.work / "copies"
    single = out / "model.safetensors"
    cli: list[str | Path] = [sys.executable, "-m", "kcv2diffusers"]
    convert = [*cli, "convert", "--out", out, "--base", "none"]
    to_single = [*cli, "convert", "--out", single, "--base", "none", *legacy]
    kinds: dict[str, list[str | Path]] = {
        "cp of the legacy .h5 files": ["cp", *legacy, copies],
        "convert legacy .h5, fp32": [*convert, *legacy],
        "convert .weights.h5, fp32": [*convert, *keras3],
        "convert legacy .h5, fp16": [*convert, *legacy, "--dtype", "float16"],
        "convert .weights.h5, fp16": [*convert, *keras3, "--dtype", "float16"],
        "convert to a single file, fp32": to_single,
        "convert to a single file, fp16": [*to_single, "--dtype", "float16"],
        "convert to a single file, fp32, --no-hash": [*to_single, "--no-hash"],
        "convert to a single file, fp16, --no-hash": [*to_single, "--no-hash", "--dtype", "float16"],
        "kcv2diffusers --help": [*cli, "--help"],
        "inspect the UNet": [*cli, "inspect", unet],
    }
    # cp of four files of one name needs one folder each; hard links give them names of their own.
    named = args.work / "named"
    shutil.rmtree(named, ignore_errors=True)
    named.mkdir()
    for part, path in zip(PARTS, legacy, strict=True):
        os.link(path, named / f"{part}.h5")
    kinds["cp of the legacy .h5 files"] = ["cp", *sorted(named.iterdir()), copies]
    results: dict[str, list[Run]] = {kind: [] for kind in kinds}
    for round_ in range(args.runs + 1):
        # Freed memory is slower to get again for a while, so nothing may always follow the same thing.
        for kind, command in random.Random(round_).sample(list(kinds.items()), len(kinds)):
            for folder in (out, copies):
                shutil.rmtree(folder, ignore_errors=True)
            copies.mkdir()
            if single in command:
                out.mkdir()
            done = run(command, watched=not round_)
            results[kind].append(done)
            print(
                f"{round_} {kind}: {done.seconds:.2f} s, {done.peak_mb:.0f} MB", file=sys.stderr, flush=True
            )
    if args.space:
        kinds["the Space's way (UNet, text encoder)"] = [
            sys.executable, ROOT / "benchmarks" / "space_way.py", legacy[0], legacy[1], out
        ]  # fmt: skip
        shutil.rmtree(out, ignore_errors=True)
        results["the Space's way (UNet, text encoder)"] = [run(kinds["the Space's way (UNet, text encoder)"])]
        shutil.rmtree(out, ignore_errors=True)
        same = [*convert, *legacy[:2]]
        results["convert legacy .h5, fp32 (UNet, text encoder)"] = [run(same)]
    if args.script:
        pipeline = args.work / "pipeline"
        subprocess.run(
            [*cli, "convert", *legacy, "--base", "none", "--out", pipeline, "--overwrite"], check=True
        )
        theirs = ["--model_path", pipeline, "--checkpoint_path", single, "--use_safetensors"]
        ways = {
            "diffusers' script: pipeline to a single file": [sys.executable, args.script, *theirs],
            "convert a pipeline to a single file": [*cli, "convert", pipeline, "--out", single],
        }
        for kind, command in ways.items():
            shutil.rmtree(out, ignore_errors=True)
            out.mkdir()
            results[kind] = [run(command)]
        shutil.rmtree(pipeline)
    for folder in (out, copies, named):
        shutil.rmtree(folder, ignore_errors=True)
    # The first of several runs is the warm-up: its time does not count, its memory does.
    seconds = {kind: [r.seconds for r in runs[1:] or runs] for kind, runs in results.items()}
    peaks = {kind: max(r.peak_mb for r in runs) for kind, runs in results.items()}
    base = statistics.median(seconds["cp of the legacy .h5 files"])
    lines = [
        f"{machine()}; medians of {args.runs} rounds in shuffled order, 4.27 GB of fp32 weights:",
        "",
        "| | seconds | to cp | peak MB |",
        "|---|--:|--:|--:|",
    ]
    for kind, times in seconds.items():
        typical = statistics.median(times)
        compared = len(times) == args.runs and kind.startswith(("cp", "convert"))
        ratio = f"{typical / base:.2f}" if compared else ""
        lines.append(f"| {kind} | {typical:.2f} | {ratio} | {peaks[kind]:.0f} |")
    print("\n".join(lines))
    (ROOT / ".cache" / "benchmark.md").write_text("\n".join(lines) + "\n")
    if args.json:
        data = {"machine": machine(), "seconds": seconds, "peak_mb": peaks}
        args.json.write_text(json.dumps(data, indent=2))


if __name__ == "__main__":
    main()
