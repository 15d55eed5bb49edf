"""The file of a study: what it expands to, what keeps its id, what is refused; the commands and the table."""

from __future__ import annotations

import csv
import io
import json
import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

from kcv2diffusers.cli.app import app
from kcv2diffusers.errors import Error
from kcv2diffusers.study import table
from kcv2diffusers.study.one import MEASURES, _said, config, order, run_folder, undone
from kcv2diffusers.study.plan import Plan, read_plan
from kcv2diffusers.study.run import prepare

TRAIN = """
base = "tiny"
instance-images = "photos"
instance-prompt = "a sks cat"
"""
SAMPLE = '[sample]\nprompts = ["a sks cat in the snow"]\n'


@pytest.fixture
def study(tmp_path: Path) -> Callable[..., Plan]:
    """Reads a study with these lines in [train] and after [sample]."""

    def read(train: str = "", sample: str = "", top: str = "") -> Plan:
        file = tmp_path / "grid.toml"
        file.write_text(f"{top}\n[train]{TRAIN}{train}\n{SAMPLE}{sample}\n")
        return read_plan(file)

    return read


def test_the_grid(study: Callable[..., Plan], tmp_path: Path) -> None:
    plan = study(
        'learning-rate = [1e-4, 2]\ntrain_text_encoder = [true, false]\nclass-prompt = "a cat"',
        'scheduler = ["kerascv", "dpm++"]\nsteps = [10, 25, 10]\nseeds = [3, 4]\nclass-prompts = ["a cat"]',
    )
    assert (plan.name, len(plan.runs), len(plan.cells), len(plan.pictures())) == ("grid", 4, 16, 64)
    assert [(r.varied["learning_rate"], r.varied["train_text_encoder"]) for r in plan.runs] == [
        (1e-4, True), (1e-4, False), (2.0, True), (2.0, False),
    ]  # fmt: skip
    assert plan.varied == (["learning_rate", "train_text_encoder"], ["scheduler", "steps"])
    assert len({cell.id for cell in plan.cells}) == 16
    assert plan.runs[0].options["instance_images"] == str(tmp_path / "photos")
    assert plan.runs[0].options["base"] == ["tiny"] and plan.measure.judge == "tiny"
    made = [config(tmp_path / "out", run.id, run.options) for run in plan.runs]
    assert len({one.class_images for one in made}) == 1 and len({one.out for one in made}) == 4
    wanted = order(plan, plan.runs[0], tmp_path / "out")
    assert len(wanted.cells) == 4 and len(wanted.pictures) == 16
    assert json.loads(json.dumps(vars(wanted))) == vars(wanted)
    assert {name: len(left) for name, left in undone(wanted).items()} == {"pictures": 16, "cells": 4}


def test_several_grids_and_options_that_are_lists(tmp_path: Path) -> None:
    (tmp_path / "mine").mkdir()
    file = tmp_path / "x.toml"
    file.write_text(
        f'[[train]]{TRAIN}\nbase = [["tiny"], ["mine", "other.h5"]]\n'.replace('base = "tiny"\n', "")
        + f"[[train]]{TRAIN}\nlora-rank = [4, 8]\n[[train]]{TRAIN}{SAMPLE}"
    )
    plan = read_plan(file)
    assert [run.options["base"] for run in plan.runs[:2]] == [["tiny"], [str(tmp_path / "mine"), "other.h5"]]
    assert [run.varied for run in plan.runs] == [
        {"base": ["tiny"], "lora_rank": 0},
        {"base": ["mine", "other.h5"], "lora_rank": 0},
        {"base": ["tiny"], "lora_rank": 4},
        {"base": ["tiny"], "lora_rank": 8},
    ]  # the run of the third table is the first of the first


def test_ids_outlive_changes_of_the_file(study: Callable[..., Plan], tmp_path: Path) -> None:
    """What a changed file still contains has the same id: another order, more values, a default spelt out."""
    before = study("steps = 20\nlearning-rate = [1e-4, 2e-4]", "guidance-scale = 5")
    after = study(
        "learning_rate = [3e-4, 2e-4, 0.0001]\nsteps = 20\nflip = false\nprior-weight = 1",
        'guidance-scale = [5.0, 7]\nother-prompts = ["a red car"]',
    )
    assert {run.id for run in before.runs} < {run.id for run in after.runs}
    assert {cell.id for cell in before.cells} < {cell.id for cell in after.cells}
    pictures = [
        {name for run in plan.runs[:2] for name in order(plan, run, tmp_path).pictures}
        for plan in (before, after)
    ]
    assert pictures[0] < pictures[1]
    moved = tmp_path / "moved"
    moved.mkdir()
    (tmp_path / "grid.toml").rename(moved / "grid.toml")
    assert [run.id for run in read_plan(moved / "grid.toml").runs] == [run.id for run in after.runs]
    assert study("steps = 20").runs[0].id == "c5985fbe1f"  # a new version finds what an old one did


@pytest.mark.parametrize(
    ("train", "sample", "words"),
    [
        ("learning-rat = 1", "", "unknown option learning-rat. Did you mean learning_rate?"),
        ("steps = [10, 'x']", "", "steps is 'x'"),
        ("steps = [10, 0]", "", "--steps 0: give at least 1"),
        ("steps = []", "", "steps is an empty list"),
        ("optimizer = 'adamv'", "", "Did you mean adamw?"),
        ("lora-conv-rank = 4", "", "--lora-conv-rank goes with --lora-rank"),
        ("out = 'x'", "", "out cannot be set in a study"),
        ("subjects = [{}]", "", "subjects cannot be set in a study"),
        ("push-to-hub = 'a/b'", "", "push-to-hub cannot be set in a study"),
        ("", "scheduler = ['ddim', 'dppm']", "Did you mean ddpm?"),
        ("", "step = 3", "unknown key step. Did you mean steps?"),
        ("", "steps = 2.5", "steps is 2.5"),
        ("", "seeds = [true]", "seeds is True"),
        ("", "guidance-scale = nan", "guidance-scale is nan"),
        ("", "seeds = []", "seeds is an empty list"),
        ("", "[measure]\nthing = 'tigre'", "Did you mean tiger?"),
        ("", "[measure]\nbest = ['dino']", "best: dino is not measured"),
        ("", "class-prompts = ['an animal']", "names none of what the judge knows"),
        ("", "other-prompts = ['a cat and a dog']", "names cat and dog of what the judge knows"),
        ("", "[page]\npictures = 3", "unknown key pictures. Did you mean picture?"),
        ("", "[smaple]", "unknown table smaple. Did you mean sample?"),
        ("", "x = \x1b", "not a TOML file"),
    ],
)
def test_refused_before_anything_is_run(train: str, sample: str, words: str, tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    file.write_text(f"[train]{TRAIN}{train}\n{SAMPLE}{sample}\n")
    with pytest.raises(Error) as refused:
        prepare(file)
    text = str(refused.value)
    assert words in text and len(text.splitlines()) <= 2 and "\x1b" not in text
    assert [*tmp_path.iterdir()] == [file]


def test_no_prompts_no_training_no_file(tmp_path: Path) -> None:
    file = tmp_path / "grid.toml"
    for text, words in ((f"[train]{TRAIN}", "no prompts"), (SAMPLE, "no [train] table")):
        file.write_text(text)
        with pytest.raises(Error, match=re.escape(words)):
            read_plan(file)
    with pytest.raises(Error, match="cannot be read"):
        read_plan(tmp_path / "none.toml")


def measured(plan: Plan, out: Path, values: list[dict[str, float]]) -> None:
    """Leave measures of the first cells of the first run."""
    wanted = order(plan, plan.runs[0], out)
    folder = run_folder(out, plan.runs[0].id)
    folder.mkdir(parents=True)
    entries = zip(wanted.cells, values, strict=False)
    found = {
        id: {"key": wanted.cells[id]["key"], "values": v, "models": {"judge": "=x"}} for id, v in entries
    }
    (folder / MEASURES).write_text(json.dumps(found))


def test_the_table(study: Callable[..., Plan], tmp_path: Path) -> None:
    plan = study("steps = [20, 30]", 'steps = [5, 6]\nnegative-prompt = ["", "=1+1"]\nscheduler = "ddim"')
    values = [{"subject": 0.5, "pres": 0.9}, {"subject": 0.75, "pres": 0.25}, {"subject": 0.1, "pres": 0.2}]
    measured(plan, tmp_path, values)
    names = ["subject", "pres"]
    rows = table.rows(plan, names, tmp_path, {plan.runs[1].id: "its process ended"})
    assert [row.score for row in rows[:4]] == [0.75, 0.45, 0.3, None]
    assert [row.reason for row in rows] == ["", "", "", "not done", *["its process ended"] * 4]
    assert dict(rows[0].settings) == {"training steps": 20, "sampling steps": 5, "negative prompt": "=1+1"}
    found = [*csv.DictReader(io.StringIO(table.as_csv(plan, names, rows)))]
    assert found[0]["negative prompt"] == "'=1+1" and found[0]["sampling steps"] == "5"
    assert (found[0]["subject"], found[0]["score"], found[3]["subject"]) == ("0.75", "0.75", "")
    assert "DDIMScheduler.from_config" in found[0]["draw"] and "--steps 20" in found[0]["train"]
    assert str(tmp_path) not in "".join(found[0].values())
    text = table.as_text(rows, names, {"r": "why"}).splitlines()
    assert text[1].split()[:4] == ["1", "0.75", "0.750", "0.250"] and text[-2:] == [
        "Run r failed: why", "3 of 8 cells of 2 runs",
    ]  # fmt: skip


def test_commands(study: Callable[..., Plan]) -> None:
    """The command of a run has its options, and is one that the command line takes."""
    plan = study("captions = false\ntrain-token = ['<a>']")
    words = table.train_command(plan.runs[0])
    assert words.startswith("kcv2diffusers dreambooth --instance-images ") and "--no-captions" in words
    assert "--train-token '<a>'" in words and "--class-images" not in words and "--resume" not in words
    draw = table.draw_command(plan.cells[0], plan.sample)
    assert "generate --base pipeline/ --prompt 'a sks cat in the snow'" in draw and "--seed 0" in draw


def test_a_dry_run_writes_nothing(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    (tmp_path / "grid.toml").write_text(f"[train]{TRAIN}\nsteps = [2, 3]\n{SAMPLE}")
    done = CliRunner().invoke(app, ["study", "grid.toml", "--dry-run"])
    assert done.exit_code == 0 and "2 training runs, 2 cells, 4 pictures" in done.stdout
    assert done.stdout.count("kcv2diffusers dreambooth") == 2
    told: dict[str, Any] = json.loads(
        CliRunner().invoke(app, ["study", "grid.toml", "--dry-run", "--json"]).stdout
    )
    assert len(told["runs"]) == 2 and told["measures"] == ["subject"]
    assert [*tmp_path.iterdir()] == [tmp_path / "grid.toml"]


def test_the_reason_is_what_the_process_said() -> None:
    said = "Warning: x\nkcv2diffusers: photos: no such folder.\nCheck the path.\n"
    assert _said(said) == "photos: no such folder.\nCheck the path."
    assert (
        _said("kcv2diffusers: a.\nb") == "a.\nb"
        and _said("Traceback\nValueError: x") == ""
        and _said("") == ""
    )
    assert "hf_secret" not in _said("kcv2diffusers: hf_secretToken00 is bad")
