"""Options from the command line and from a file; what is wrong is said before anything is loaded."""

from __future__ import annotations

import sys
from pathlib import Path

import pytest

from kcv2diffusers.cli import main
from kcv2diffusers.dreambooth.config import make_config
from kcv2diffusers.errors import Error

NEEDED = {"instance_images": "photos", "instance_prompt": "a sks dog", "base": ["tiny"], "out": "run"}


def test_the_command_line_goes_before_the_file_before_the_defaults(tmp_path: Path) -> None:
    file = tmp_path / "run.toml"
    file.write_text('steps = 7\nlearning_rate = 1\nbase = "tiny"\nflip = true\n')
    config = make_config({**NEEDED, "steps": 9}, file)
    assert (config.steps, config.learning_rate, config.flip, config.batch_size) == (9, 1.0, True, 1)


def test_the_record_gives_the_same_config(tmp_path: Path) -> None:
    given = {
        **NEEDED,
        "instance_prompt": 'a "sks" \\ dog\n',
        "ema": 0.5,
        "cache": False,
        "sample_prompt": ["a", "b"],
    }
    config = make_config(given)
    (tmp_path / "config.toml").write_text(config.toml())
    assert make_config({}, tmp_path / "config.toml") == config
    assert "learning_rate" not in config.toml()


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("stesp = 3", "unknown options stesp"),
        ("steps = 3.5", "steps is 3.5"),
        ('steps = "3"', "steps is '3'"),
        ("flip = 1", "flip is 1"),
        ("sample_prompt = [1]", "sample_prompt is"),
        ("steps =", "not a TOML file"),
        ("[steps]\na = 1", "steps is"),
    ],
)
def test_a_bad_file(tmp_path: Path, text: str, message: str) -> None:
    (tmp_path / "run.toml").write_text(text)
    with pytest.raises(Error, match=message):
        make_config(NEEDED, tmp_path / "run.toml")


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"instance_images": ""}, "--instance-images is needed"),
        ({"base": []}, "--base is needed"),
        ({"steps": 0}, "--steps 0: give at least 1"),
        ({"learning_rate": -1.0}, "at least 0"),
        ({"learning_rate": float("nan")}, "at least 0"),
        ({"optimizer": "sgd"}, "choose one of adamw"),
        ({"ema": 1.0}, "--ema 1.0"),
        ({"resolution": 100}, "multiple of 64"),
        ({"beta1": 1.0}, "--beta1 1.0: give at most"),
        ({"optimizer": "adafactor", "beta2": 0.9}, "--beta2 is not an option of adafactor"),
        ({"optimizer": "lion", "epsilon": 1e-6}, "--epsilon is not an option of lion"),
        ({"train_token": ["sks"], "lora_rank": 4}, "Omit --lora-rank, or omit --train-token"),
        ({"train_token": ["sks"], "train_text_encoder": True}, "Omit --train-text-encoder"),
        ({"lora_conv_rank": 4}, "--lora-conv-rank goes with --lora-rank"),
        ({"optimizer": "prodigy", "text_encoder_steps": 4}, "one learning rate for all weights"),
        ({"caption_dropout": 1.5}, "--caption-dropout 1.5: give at most 1"),
        ({"class_images": "dogs"}, "needs --class-prompt"),
        ({"verify": True}, "pipeline of --export; give that as well"),
        (
            {"instance_prompt": "\udce9t\udce9"},
            r"--instance-prompt \\udce9t\\udce9: holds bytes that are not",
        ),
        ({"sample_prompt": ["a", "\udce9"]}, "--sample-prompt"),
        ({"out": "\udce9"}, "--out"),
    ],
)
def test_bad_options(change: dict, message: str) -> None:
    with pytest.raises(Error, match=message):
        make_config(NEEDED | change)


def refused(
    monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str], *arguments: str | Path
) -> str:
    monkeypatch.setattr(sys, "argv", ["kcv2diffusers", "dreambooth", *map(str, arguments)])
    with pytest.raises(SystemExit) as stop:
        main()
    assert stop.value.code == 1
    return capsys.readouterr().err


def test_the_command_refuses(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    photos, out = tmp_path / "photos", tmp_path / "run"
    options = ["--instance-prompt", "a sks dog", "--base", "tiny", "--out", out]
    assert "--instance-images is needed" in refused(monkeypatch, capsys, *options)
    options += ["--instance-images", photos]
    assert f"{photos}: no such folder" in refused(monkeypatch, capsys, *options)
    photos.mkdir()
    (photos / "notes.txt").write_text("a dog")
    message = refused(monkeypatch, capsys, *options)
    assert "no picture in this folder" in message and "notes.txt" in message
    assert "missing.toml: cannot be read" in refused(
        monkeypatch, capsys, "--config", tmp_path / "missing.toml"
    )
    assert not out.exists()
    (out / "checkpoints").mkdir(parents=True)
    assert "Use --resume to go on" in refused(monkeypatch, capsys, *options)
