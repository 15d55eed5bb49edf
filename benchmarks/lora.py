"""Time and peak memory of LoRA files at full size: merged into a pipeline, and extracted from a fine-tune.

    python benchmarks/lora.py [--work DIR] [--runs 3]

Makes in DIR, if they are not there (13 GB), a pipeline folder of SD1 with random weights, a fine-tune that
differs in every weight, and a LoRA of rank 32 of all layers. The tokenizer is that of an installed open_clip.
Each run is a process of its own, measured as benchmarks/convert.py does: medians of the times, the largest
peak of memory. The CPU seconds are what other work on the machine changes least.
"""

from __future__ import annotations

import argparse
import os
import resource
import shutil
import statistics
import subprocess
import sys
from pathlib import Path

import numpy as np
from convert import ROOT, Run, run
from interleaved import machine
from safetensors.numpy import save_file

from kcv2diffusers.json_text import write_json
from kcv2diffusers.maps.parts import families
from kcv2diffusers.maps.tables import REPEAT, specs, tables_of
from kcv2diffusers.pipeline.configs import config_of, model_index
from kcv2diffusers.pipeline.scheduler import SCHEDULER
from kcv2diffusers.pipeline_files import MODEL_INDEX, SCHEDULER_FILE

VERSION, RANK = "sd1", 32


def make(work: Path) -> None:
    """The two pipelines and the LoRA, once. The weights of the parts that are not changed are the same."""
    if (work / "done").exists():
        return
    rng = np.random.default_rng(0)
    factors: dict[str, np.ndarray] = {}
    family = families()[0]
    for table in tables_of(family):
        version = VERSION if VERSION in table.versions else "any"
        every = [spec for spec in specs() if spec.table is table and spec.version == version]
        dims = every[0].nominal
        base: dict[str, np.ndarray] = {}
        for slot in (slot for spec in every for slot in spec.slots(dims.get(REPEAT, 0)) if slot.exists(dims)):
            shape = [size.value(dims) or 1 for size in slot.diffusers_shape]
            base[slot.target] = rng.standard_normal(shape, "float32") * np.float32(0.02)
            if slot.variable.name == "kernel" and table.name != "vae":
                name = f"{table.name}.{slot.target.removesuffix('.weight')}"
                up, down = (shape[0], RANK, *[1] * len(shape[2:])), (RANK, *shape[1:])
                factors[f"{name}.lora_A.weight"] = rng.standard_normal(down, "float32") * np.float32(0.01)
                factors[f"{name}.lora_B.weight"] = rng.standard_normal(up, "float32") * np.float32(0.01)
        for name in ("base", "tuned"):
            folder = work / name / table.folder
            write_json(folder / "config.json", config_of(table, version, dims, image_size=512))
            save_file(base, folder / table.weights, {"format": "pt"})
            for weight in base.values() if table.name != "vae" else ():
                weight += rng.standard_normal(weight.shape, "float32") * np.float32(1e-3)
    for name in ("base", "tuned"):
        write_json(work / name / SCHEDULER_FILE, SCHEDULER)
        write_json(work / name / MODEL_INDEX, model_index(family, SCHEDULER["_class_name"], family.parts))
    save_file(factors, work / "lora.safetensors", {"format": "pt"})
    (work / "done").touch()


def cpu_seconds() -> float:
    """CPU time of all processes that have ended, in user and system mode."""
    used = resource.getrusage(resource.RUSAGE_CHILDREN)
    return used.ru_utime + used.ru_stime


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--work", type=Path, default=ROOT / ".cache" / "benchmark-lora")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--make", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    args.work.mkdir(parents=True, exist_ok=True)
    if args.make:
        return make(args.work)
    # In a process of its own: the peak of a process counts the memory of the one that started it.
    subprocess.run([sys.executable, __file__, "--work", args.work, "--make"], check=True)
    base, tuned, lora, out = (args.work / n for n in ("base", "tuned", "lora.safetensors", "out"))
    cli = [sys.executable, "-m", "kcv2diffusers"]
    extract = [*cli, "extract-lora", tuned, "--base", base, "--out", out.with_suffix(".safetensors")]
    convert = [*cli, "convert", "--base", base, "--out", out]
    kinds: dict[str, list[str | Path]] = {
        "convert, without a LoRA": convert,
        "convert --lora, rank 32 of all layers": [*convert, "--lora", lora],
        "convert-lora": [*cli, "convert-lora", lora, "--out", out.with_suffix(".safetensors")],
        "extract-lora --rank 32": [*extract, "--rank", "32"],
        "extract-lora --rank auto --keep 0.95": [*extract, "--rank", "auto", "--dtype", "fp16"],
    }
    results: dict[str, list[tuple[Run, float]]] = {kind: [] for kind in kinds}
    for _ in range(args.runs):
        for kind, command in kinds.items():
            shutil.rmtree(out, ignore_errors=True)
            out.with_suffix(".safetensors").unlink(missing_ok=True)
            before = cpu_seconds()
            results[kind].append((run(command), cpu_seconds() - before))
            write(results)  # after each command: the later ones take long
    shutil.rmtree(out, ignore_errors=True)
    out.with_suffix(".safetensors").unlink(missing_ok=True)


def write(results: dict[str, list[tuple[Run, float]]]) -> None:
    """Print the table of what has been measured, and leave it in .cache/lora.md."""
    count = max(map(len, results.values()))
    how = "one run" if count == 1 else f"medians of {count} runs"
    lines = [
        f"{machine()}; {how}; load average {os.getloadavg()[2]:.0f}; SD1 in float32 with a text encoder:",
        "",
        "| | seconds | CPU seconds | peak MB |",
        "|---|--:|--:|--:|",
    ]
    for kind, runs in results.items():
        if runs:
            seconds = statistics.median(done.seconds for done, _ in runs)
            cpu = statistics.median(cpu for _, cpu in runs)
            peak = max(done.peak_mb for done, _ in runs)
            lines.append(f"| `{kind}` | {seconds:.1f} | {cpu:.1f} | {peak:.0f} |")
    print("\n".join(lines), flush=True)
    (ROOT / ".cache").mkdir(exist_ok=True)
    (ROOT / ".cache" / "lora.md").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
