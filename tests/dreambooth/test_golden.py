"""The losses of a run on the tiny base are those of golden.csv: a change of what training computes shows.

python tests/dreambooth/test_golden.py      # writes golden.csv anew, after a change that is meant
"""

from __future__ import annotations

import csv
import shutil
import sys
from pathlib import Path
from tempfile import TemporaryDirectory

import pytest

pytestmark = pytest.mark.slow

GOLDEN = Path(__file__).with_name("golden.csv")
SUBJECT = Path(__file__).parents[2] / "kcv2diffusers" / "tiny" / "subject"
OPTIONS = [
    "--class-prompt", "a cat", "--class-images", SUBJECT, "--num-class-images", "3", "--train-text-encoder",
    "--batch-size", "2", "--accumulate", "2", "--steps", "12", "--learning-rate", "5e-4", "--snr-gamma", "5",
    "--lr-schedule", "cosine", "--warmup-steps", "2", "--flip", "--offset-noise", "0.1",
]  # fmt: skip


def train(out: Path) -> Path:
    sys.path.insert(0, str(Path(__file__).parents[1]))
    from support.dreambooth.run import PROMPTS, run

    done = run(Path("tiny"), SUBJECT, out, *PROMPTS, *OPTIONS)
    assert done.returncode == 0, done.stderr
    return out / "log.csv"


def losses(path: Path) -> list[float]:
    with path.open() as file:
        return [float(row["loss"]) for row in csv.DictReader(file)]


def test_losses(tmp_path: Path) -> None:
    found, expected = losses(train(tmp_path / "run")), losses(GOLDEN)
    assert len(expected) == 12
    assert found == pytest.approx(expected, rel=1e-3)


if __name__ == "__main__":
    with TemporaryDirectory() as folder:
        shutil.copy(train(Path(folder) / "run"), GOLDEN)
