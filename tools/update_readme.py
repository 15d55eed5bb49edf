"""Put what was measured into the README, between its markers.

    python tools/update_readme.py

Reads .cache/parity.json (left by the full-size tests of tests/test_parity.py), the tables that benchmarks/
and tools/study.py leave in .cache, and what tools/train_tiny.py measured; a file that is not there leaves
its table as it is.
"""

from __future__ import annotations

import json
import re
from pathlib import Path

ROOT = Path(__file__).parent.parent
README = ROOT / "README.md"


def parity(path: Path) -> str:
    lines = ["| part | largest error / largest value | limit in the tests |", "|---|---|---|"]
    for name, entry in json.loads(path.read_text()).items():
        lines.append(f"| {name} | {entry['error']:.1e} | {entry['limit']:.0e} |")
    return "\n".join(lines)


def fill(text: str, marker: str, table: str) -> str:
    pattern = re.compile(rf"(<!-- {marker} -->\n).*?(<!-- /{marker} -->)", re.DOTALL)
    filled, count = pattern.subn(lambda m: f"{m[1]}{table}\n{m[2]}", text)
    if count != 1:
        raise SystemExit(f"README.md has no place for {marker}")
    return filled


def main() -> None:
    text = README.read_text(encoding="utf-8")
    measured = ROOT / ".cache" / "parity.json"
    if measured.exists():
        text = fill(text, "parity", parity(measured))
    for marker, measured in (
        ("speed", ROOT / ".cache" / "benchmark.md"),
        ("train-step", ROOT / ".cache" / "train_step.md"),
        ("verify", ROOT / ".cache" / "verify.md"),
        ("dreambooth-full", ROOT / ".cache" / "dreambooth-full.md"),
        ("dreambooth-lora", ROOT / ".cache" / "dreambooth-lora.md"),
        ("gpu", ROOT / ".cache" / "gpu.md"),
        ("study", ROOT / ".cache" / "study.md"),
        ("tiny", ROOT / "kcv2diffusers" / "tiny" / "quality.txt"),
    ):
        if measured.exists():
            found = measured.read_text().strip()
            text = fill(text, marker, f"```\n{found}\n```" if measured.suffix == ".txt" else found)
    README.write_text(text, encoding="utf-8")


if __name__ == "__main__":
    main()
