"""What a run leaves written of itself repeats the whole of it, however often it was taken up again."""

from __future__ import annotations

import json
from dataclasses import replace
from datetime import datetime
from pathlib import Path

from kcv2diffusers.dreambooth.config import Config, make_config
from kcv2diffusers.dreambooth.record import keep_record


def config(out: Path, **options) -> Config:
    needed = {"instance_images": "photos", "instance_prompt": "a sks dog", "base": ["tiny"], "out": str(out)}
    return make_config({**needed, "backend": "torch", "precision": "float32", **options})


def legs(out: Path) -> list[dict]:
    return json.loads((out / "legs.json").read_text())


def test_a_run_that_was_taken_up_again(tmp_path: Path) -> None:
    first = config(tmp_path, steps=6, flip=True, export="first", sample_prompt=["a dog"])
    keep_record(first, 0)
    assert make_config({}, tmp_path / "config.toml") == first
    assert 'backend = "torch"' in (tmp_path / "config.toml").read_text()
    later = config(tmp_path, steps=9, resume=True, export="other", flip=True, sample_prompt=["a dog"])
    keep_record(later, 6)
    keep_record(replace(later, export="first", learning_rate=1e-4), 8)
    assert make_config({}, tmp_path / "config.toml") == replace(first, steps=9)
    assert "resume" not in (tmp_path / "config.toml").read_text()
    assert [leg["start"] for leg in legs(tmp_path)] == [0, 6, 8]
    assert [leg["changed"] for leg in legs(tmp_path)] == [
        {},
        {"steps": 9, "export": "other"},
        {"learning_rate": 1e-4},
    ]
    for leg in legs(tmp_path):
        assert leg["backend"] == "torch" and {"python", "keras", "torch", "numpy"} <= leg["versions"].keys()
        assert datetime.fromisoformat(leg["date"]).utcoffset() is not None


def test_a_run_that_begins_anew(tmp_path: Path) -> None:
    """It was stopped before its first checkpoint."""
    keep_record(config(tmp_path, steps=6), 0)
    again = config(tmp_path, steps=7, resume=True)
    keep_record(again, 0)
    assert make_config({}, tmp_path / "config.toml") == replace(again, resume=False)
    assert len(legs(tmp_path)) == 1


def test_records_that_cannot_be_read(tmp_path: Path) -> None:
    (tmp_path / "config.toml").write_text("colour = 3")
    for text in ("{", "{}", "[" * 100_000, "\xff"):
        (tmp_path / "legs.json").write_text(text, encoding="latin-1")
        keep_record(config(tmp_path, resume=True), 5)
        assert len(legs(tmp_path)) == 1
    assert make_config({}, tmp_path / "config.toml") == config(tmp_path)
