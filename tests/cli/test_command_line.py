"""What all commands have in common: help, version, debugging, quiet, progress, paths, older spellings."""

from __future__ import annotations

import json
import os
import re
import shutil
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest
import typer
from support.waiting import until

from kcv2diffusers import __version__, convert, environment, inspect
from kcv2diffusers.cli import main, progress
from kcv2diffusers.cli.app import app
from kcv2diffusers.cli.command import PATHS
from kcv2diffusers.dreambooth.config import Config, make_config, read_options
from kcv2diffusers.errors import Error
from kcv2diffusers.sources.locate import TINY, locate
from kcv2diffusers.verification.request import Request

Patch = pytest.MonkeyPatch
COMMANDS = [
    *("convert", "convert-lora", "extract-lora", "inspect", "to-keras"),
    *("verify", "dreambooth", "generate", "push", "space", "rescue", "app", "study", "env"),
]
Cli = Callable[..., tuple[int, str, str]]


@pytest.fixture
def cli(monkeypatch: Patch, capsys: pytest.CaptureFixture[str]) -> Cli:
    """Runs a command line in this process: exit code, stdout, stderr."""
    monkeypatch.setenv("HF_HUB_DISABLE_PROGRESS_BARS", "1")  # which --quiet sets

    def run(*arguments: str | Path) -> tuple[int, str, str]:
        monkeypatch.setattr(sys, "argv", ["kcv2diffusers", *map(str, arguments)])
        with pytest.raises(SystemExit) as stop:
            main()
        told = capsys.readouterr()
        assert isinstance(stop.value.code, int)
        return stop.value.code, told.out, told.err

    yield run
    progress.be_quiet(False)


@pytest.fixture
def tiny(tmp_path: Path) -> Path:
    """A folder with two of the tiny base's parts."""
    folder = tmp_path / "parts"
    folder.mkdir()
    for name in ("vae_decoder.weights.h5", "vae_encoder.weights.h5", "kcv2diffusers.json"):
        shutil.copy(locate(TINY) / name, folder)
    return folder


def test_version(cli: Cli) -> None:
    assert cli("--version") == (0, f"kcv2diffusers {__version__}\n", "")


@pytest.mark.parametrize("name", [*COMMANDS, "maps", "maps list", "maps show", "maps check", ""])
def test_short_and_long_help(cli: Cli, name: str) -> None:
    code, short, _ = cli(*name.split(), "-h")
    assert code == 0 and "Usage" in short and "-h, --help" in short
    assert cli(*name.split(), "--help") == (0, short, "")


def test_every_command_has_one_line_of_80_columns(cli: Cli, monkeypatch: Patch) -> None:
    monkeypatch.setenv("COLUMNS", "80")
    lines = cli("--help")[1].split("Commands:\n")[1].splitlines()
    assert [line.split()[0] for line in lines] == [*COMMANDS, "maps"]
    assert all(len(line) <= 80 and not line.endswith("...") for line in lines)


@pytest.mark.parametrize(
    ("name", "groups"),
    [
        ("convert", ["Arguments", "Sources", "Result", "Verification", "The Hub", "Options"]),
        ("dreambooth", ["Photos and base", "Training", "Checkpoints", "The Hub", "Options"]),
        ("verify", ["Arguments", "Sources", "Verification", "Images", "Options"]),
        ("push", ["Arguments", "The Hub", "The model card", "Options"]),
    ],
)
def test_options_are_grouped(cli: Cli, name: str, groups: list[str]) -> None:
    found = re.findall(r"^([A-Z][\w ]+):$", cli(name, "--help")[1], re.M)
    assert set(groups) <= set(found) and found[-1] == "Options"
    assert len(found) == len(set(found))


def test_completion() -> None:
    asked = {
        "_KCV2DIFFUSERS_COMPLETE": "complete_bash",
        "COMP_WORDS": "kcv2diffusers con",
        "COMP_CWORD": "1",
    }
    code = "import sys; sys.argv = ['kcv2diffusers']; from kcv2diffusers.cli import main; main()"
    done = subprocess.run(
        [sys.executable, "-c", code],
        env={**os.environ, **asked},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.stdout.split() == ["convert", "convert-lora"], done.stderr


@pytest.mark.parametrize(
    ("arguments", "meant"),
    [
        (["conver"], "'convert'"),
        (["inspct", "x"], "'inspect'"),
        (["maps", "shw"], "'show'"),
        (["convert", "--dtyp", "float16"], "--dtype"),
        (["convert", "--dtype", "float61"], "Did you mean 'float16'?"),
        (["verify", "x", "--level", "wieghts"], "Did you mean 'weights'?"),
        (["dreambooth", "--optimizer", "adamv"], "Did you mean 'adamw'?"),
    ],
)
def test_what_was_meant(cli: Cli, arguments: list[str], meant: str) -> None:
    code, _, err = cli(*arguments)
    assert code == 2 and meant in err


def test_what_was_meant_in_python(tmp_path: Path) -> None:
    with pytest.raises(Error, match=r"Did you mean float16\?"):
        convert(TINY, out=tmp_path / "x", dtype="flaot16")


# Debugging


def test_debugging_shows_the_traceback(cli: Cli, tmp_path: Path, monkeypatch: Patch) -> None:
    code, _, plain = cli("inspect", tmp_path / "no.h5")
    assert code == 1 and "Traceback" not in plain and len(plain.splitlines()) == 2
    monkeypatch.setenv("KCV2DIFFUSERS_DEBUG", "1")
    code, _, err = cli("inspect", tmp_path / "no.h5")
    assert code == 1 and err.startswith("Traceback") and err.endswith(plain)


def test_what_the_system_says_names_the_way_to_debug(cli: Cli, monkeypatch: Patch) -> None:
    def fail(*_: object, **__: object) -> None:
        raise OSError(5, "Input/output error", "/dev/x")

    monkeypatch.setattr("kcv2diffusers.conversion.inspection.inspect", fail)
    code, _, err = cli("inspect", "x")
    assert (code, err) == (
        1,
        "kcv2diffusers: /dev/x: Input/output error.\nKCV2DIFFUSERS_DEBUG=1 shows where.\n",
    )


def test_a_mistake_of_ours_says_how_to_report_it(tmp_path: Path) -> None:
    code = (
        "import sys, kcv2diffusers.conversion.inspection as i; sys.argv = ['kcv2diffusers', 'inspect', 'x']\n"
        "def fail(*_, **__): raise KeyError('gone')\n"
        "i.inspect = fail\n"
        "from kcv2diffusers.cli import main; main()"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
    assert done.returncode == 1 and "KeyError: 'gone'" in done.stderr
    assert "Please report it" in done.stderr and "`kcv2diffusers env`" in done.stderr


# env


def test_env(cli: Cli, monkeypatch: Patch) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_secret")
    monkeypatch.setenv("KERAS_BACKEND", "jax")
    monkeypatch.setattr(environment, "_ASK", {"torch": lambda: ["cpu"]})
    code, out, _ = cli("env", "--json")
    told = json.loads(out)
    assert code == 0 and told["kcv2diffusers"] == __version__
    assert told["backend"] == "jax" and "torch" in told["backends"]
    assert told["devices"] == {"torch": ["cpu"]} and "numpy" in told["packages"]
    for text in (out, cli("env")[1]):
        assert str(Path.home()) not in text and "secret" not in text


def test_env_without_a_backend_set(monkeypatch: Patch) -> None:
    monkeypatch.delenv("KERAS_BACKEND")
    monkeypatch.setattr(environment, "installed", lambda: ["tensorflow"])
    monkeypatch.setattr(environment, "_ASK", {})
    assert environment.environment().backend == "tensorflow"
    monkeypatch.setattr(environment, "installed", list)
    assert environment.environment().backend is None


def test_env_says_that_a_device_cannot_be_asked(monkeypatch: Patch) -> None:
    def fail() -> list[str]:
        raise RuntimeError("no driver in /home/me")

    monkeypatch.setattr(environment, "_ASK", {"torch": fail})
    assert environment.environment().devices == {"torch": ["cannot be asked (RuntimeError)"]}


# Quiet, and progress in a log


def test_quiet(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    arguments = ["convert", tiny, "--base", "none", "--out"]
    assert "Parts written" in cli(*arguments, tmp_path / "a")[1]
    assert cli(*arguments, tmp_path / "b", "-q") == (0, "", "")
    code, out, err = cli(*arguments, tmp_path / "c", "--quiet", "--json")
    assert code == 0 and json.loads(out)["complete"] is False and not err
    code, out, err = cli(*arguments, tmp_path / "b", "-q")
    assert code == 1 and not out and "exists already" in err
    assert cli("to-keras", tmp_path / "a", "--out", tmp_path / "d", "-q") == (0, "", "")
    code, out, err = cli("verify", tmp_path / "a", tiny, "--level", "weights", "-q")
    assert code == 0 and not err  # nothing of the progress


def test_generate_tells_of_its_pictures(cli: Cli, monkeypatch: Patch) -> None:
    def generate(*_: object, **__: object) -> list[Path]:
        return [Path("x/000.png")]

    monkeypatch.setattr("kcv2diffusers.generation.generate", generate)
    monkeypatch.setattr("kcv2diffusers.cli.training.choose_backend", lambda say: say("Keras runs on x."))
    arguments = ["generate", "--base", "tiny", "--prompt", "a fox", "--out", "x"]
    assert cli(*arguments) == (0, "x/000.png\n", "Keras runs on x.\n")
    assert cli(*arguments, "--quiet") == (0, "x/000.png\n", "")
    code, out, _ = cli(*arguments, "--json")
    assert code == 0 and json.loads(out) == {"out": "x", "images": ["x/000.png"]}


def test_dreambooth_is_quiet(cli: Cli, monkeypatch: Patch, tmp_path: Path) -> None:
    from kcv2diffusers.dreambooth import train

    def run(config: Config, tell: Callable[..., None]) -> train.Result:
        tell("Training", 2, 2, "")
        return train.Result(Path(config.out), tmp_path / "step-2", 2, True)

    monkeypatch.setattr(train, "train", run)
    needed = ["--base", "tiny", "--instance-images", "x", "--instance-prompt", "y", "--out", "run"]
    code, out, err = cli("dreambooth", *needed)
    assert code == 0 and "Step 2" in out and "Training 2/2" in err
    assert cli("dreambooth", *needed, "-q") == (0, "", "")
    code, out, err = cli("dreambooth", *needed, "-q", "--json")
    assert code == 0 and json.loads(out)["step"] == 2 and not err


class Clock:
    """A clock that goes on when it is told to."""

    def __init__(self) -> None:
        self.now = 0.0

    def monotonic(self) -> float:
        return self.now


@pytest.fixture
def clock(monkeypatch: Patch) -> Clock:
    clock = Clock()
    monkeypatch.setattr(progress, "time", clock)
    return clock


def test_a_log_gets_a_line_now_and_then(clock: Clock, capsys: pytest.CaptureFixture[str]) -> None:
    with progress.stages() as tell:
        for second in range(1, 601):
            clock.now = second
            tell("Training", second, 600, "loss 1")
    steps = [int(line.split()[1].split("/")[0]) for line in capsys.readouterr().err.splitlines()]
    assert steps == [*range(5, 600, 30), 600]


@pytest.mark.parametrize(("steps", "expected"), [(True, "Drawing 5/60"), (False, "Drawing 0.00/0.00 GB")])
def test_a_log_gets_nothing_of_short_work(
    clock: Clock, capsys: pytest.CaptureFixture[str], steps: bool, expected: str
) -> None:
    with progress.progress_bar("Drawing", steps=steps) as tell:
        for second in range(1, 5):
            clock.now = second
            tell(second, 60)
        assert capsys.readouterr().err == ""
        for second in range(5, 35):
            clock.now = second
            tell(second, 60)
    assert capsys.readouterr().err.splitlines() == [expected]


def test_a_log_is_not_silent_for_minutes(
    clock: Clock, monkeypatch: Patch, capsys: pytest.CaptureFixture[str]
) -> None:
    """Where nothing is told: models are compiled, files downloaded."""
    monkeypatch.setattr(progress, "_LOOK", 0.001)
    said: list[str] = []

    def printed() -> str:
        said.append(capsys.readouterr().err)  # text and end of a line are written one after the other
        return "".join(said)

    with progress.stages() as tell:
        for now, told in ((61, 0), (122, 3)):
            if told:
                tell("Drawing", told, 5, "")
            clock.now = now
            until(lambda lines=now // 61: printed().count("\n") >= lines)
    assert printed().splitlines() == [
        "Starting: still at work after 1 min",
        "Drawing 3/5: still at work after 2 min",
    ]


# Paths, sources, dtypes


def test_home_is_expanded_where_the_shell_did_not(
    cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: Patch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    options = ["--base", "none", "--out=~/out"]
    assert cli("convert", "~/parts", *options)[0] == 0
    assert (tmp_path / "out" / "vae" / "config.json").is_file()
    assert cli("convert", "--vae-decoder=~/parts", "--vae-encoder=~/parts", *options, "--overwrite")[0] == 0
    assert cli("inspect", "~/parts")[0] == 0
    assert cli("verify", "~/out", "~/parts", "--level=weights")[0] == 0
    file = tmp_path / "run.toml"
    file.write_text('out = "~/run"\ninstance_prompt = "~ dog"\nbase = ["~/parts"]\n')
    options_of_file = read_options(file)
    assert options_of_file["out"] == str(tmp_path / "run") and options_of_file["instance_prompt"] == "~ dog"
    assert options_of_file["base"] == [str(tmp_path / "parts")]


def test_every_path_has_a_metavar_that_is_expanded() -> None:
    """A new option with a path would else be forgotten."""
    names = {"out", "report", "config", "tokenizer", "base", "unet", "sources", "pipeline", "export"}
    names |= {"instance_images", "class_images", "text_encoder", "vae_decoder", "vae_encoder", "vae"}
    for each in typer.main.get_command(app).commands.values():  # type: ignore[attr-defined]
        for param in each.params:
            if param.name in names:
                assert param.metavar in PATHS, (each.name, param.name)


@pytest.mark.slow
@pytest.mark.parametrize("name", ["tiny", "tiny://"])
def test_tiny_is_a_source_everywhere(cli: Cli, name: str, tmp_path: Path) -> None:
    code, out, _ = cli("inspect", name, "--json")
    assert code == 0 and len(json.loads(out)) == 4
    assert cli("convert", name, "--out", tmp_path / "out")[0] == 0
    assert cli("verify", tmp_path / "out", name, "--level", "weights")[0] == 0


def test_inspect_takes_several(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    files = sorted(tiny.glob("*.h5"))
    code, out, _ = cli("inspect", *files, "--json")
    assert code == 0 and [Path(entry["path"]) for entry in json.loads(out)] == files
    assert json.loads(cli("inspect", files[0], "--json")[1]) == json.loads(out)[:1]
    code, out, err = cli("inspect", tmp_path / "no.h5", *files)
    assert code == 1 and out.count("VAE") == 2 and "no.h5: no such file" in err


@pytest.mark.parametrize(("short", "full"), [("fp16", "float16"), ("bf16", "bfloat16"), ("fp32", "float32")])
def test_short_names_of_dtypes(cli: Cli, tiny: Path, tmp_path: Path, short: str, full: str) -> None:
    told = json.loads(
        cli("convert", tiny, "--base", "none", "--dtype", short, "--out", tmp_path / "a", "--json")[1]
    )
    assert told["dtypes"] == {"vae": full}
    assert convert(tiny, base="none", dtype=short, out=tmp_path / "b").dtypes == {"vae": full}
    needed = {"instance_images": "x", "instance_prompt": "x", "base": ["x"], "out": "x"}
    config = make_config({**needed, "precision": short})
    assert config.precision == (full if short == "fp32" else f"mixed_{full}")


# Older spellings


def test_older_spellings_of_verify_still_work(cli: Cli, monkeypatch: Patch) -> None:
    given = {}

    def verify(*_: object, **options: object) -> None:
        given.update(options)
        raise Error("seen")

    monkeypatch.setattr("kcv2diffusers.verification.run.verify", verify)
    for words in (
        ["--guidance", "5", "--seeds=2", "--size", "128"],
        ["--guidance-scale", "5", "--images-per-prompt=2", "--image-size", "128"],
    ):
        given.clear()
        assert cli("verify", "x", *words)[0] == 1
        assert (given["guidance"], given["seeds"], given["size"]) == (5.0, 2, 128)
    assert "--seeds" not in cli("verify", "--help")[1]
    assert cli("generate", "--seeds", "3")[0] == 2  # never one of these


def test_the_command_of_a_report_has_the_names_of_today() -> None:
    words = Request(pipeline="x", size=64).command()
    assert "--image-size 64" in words and "--guidance-scale 7.5 --images-per-prompt 3" in words


def test_older_spellings_of_dreambooth_still_work(cli: Cli, tmp_path: Path) -> None:
    assert "--instance-images is needed" in cli("dreambooth", "--gelu", "tanh")[2]
    file = tmp_path / "config.toml"
    file.write_text('gelu = "tanh"\n')
    assert read_options(file) == {"unet_gelu": "tanh"}


def test_python_takes_several_sources_one_by_one(tiny: Path) -> None:
    assert [found.part for found in inspect(tiny)] == ["vae_decoder", "vae_encoder"]


# Dry runs


def test_dry_run_of_convert(cli: Cli, tmp_path: Path) -> None:
    out = tmp_path / "no" / "pipeline"
    code, plan, err = cli("convert", TINY, "--dtype", "fp16", "--out", out, "--dry-run")
    assert code == 0 and not err and list(tmp_path.iterdir()) == []
    unet = locate(TINY) / "unet.weights.h5"
    assert f"UNet: {unet} (" in plan and "-> unet/diffusion_pytorch_model.safetensors" in plan
    assert re.search(r"\d+ tensors, \d+\.\d MB float16 -> \d+\.\d MB float16", plan)
    assert "scheduler: EulerDiscreteScheduler, as Stable Diffusion has it" in plan
    assert f"tokenizer: {locate(TINY) / 'tokenizer'}" in plan
    assert "safety checker is off" in plan and "Nothing was written" in plan
    told = json.loads(cli("convert", TINY, "--dtype", "fp16", "--out", out, "--dry-run", "--json")[1])
    done = json.loads(cli("convert", TINY, "--dtype", "fp16", "--out", out, "--json")[1])
    assert told.pop("seconds") >= 0 and done.pop("seconds") >= 0
    assert told == told | done  # the plan is what is done then
    assert told.keys() - done.keys() == {"moved", "scheduler", "tokenizer", "dry_run"}
    moved = {part["part"]: part for part in told["moved"]}
    for name, folder in (("unet", "unet"), ("text_encoder", "text_encoder")):
        weights = moved[name]["target"]
        assert weights.startswith(folder) and (out / weights).is_file()
        assert 0 <= (out / weights).stat().st_size - moved[name]["to_bytes"] < 100_000


def test_dry_run_tells_of_other_origins(cli: Cli, tmp_path: Path) -> None:
    base = tmp_path / "base"
    convert(TINY, out=base, prediction_type="v_prediction")
    mine = locate(TINY) / "text_encoder.weights.h5"
    plan = cli("convert", mine, "--base", base, "--out", tmp_path / "x", "--dry-run")[1]
    assert f"as {base / 'scheduler' / 'scheduler_config.json'} states" in plan
    assert f"{base / 'unet' / 'diffusion_pytorch_model.safetensors'} (diffusers .safetensors)" in plan
    plan = cli("convert", mine, "--base", "none", "--out", tmp_path / "x", "--dry-run")[1]
    assert "A full pipeline still needs: UNet" in plan and "scheduler:" not in plan


def test_dry_run_makes_the_checks(cli: Cli, tiny: Path, tmp_path: Path, monkeypatch: Patch) -> None:
    (tmp_path / "there").mkdir()
    (tmp_path / "there" / "file").touch()
    arguments = ["convert", tiny, "--base", "none", "--dry-run", "--out"]
    assert "exists already" in cli(*arguments, tmp_path / "there")[2]
    assert "not a folder" in cli(*arguments, tmp_path / "there" / "file" / "x")[2]
    assert "needs" in cli("convert", tiny, "--dry-run", "--out", tmp_path / "x")[2]
    assert "report" in cli(*arguments, tmp_path / "x", "--report", tmp_path / "y")[2]
    monkeypatch.setattr("shutil.disk_usage", lambda _: shutil._ntuple_diskusage(1, 1, 0))
    code, _, err = cli(*arguments, tmp_path / "x")
    assert code == 1 and "are needed and 0.00 GB are free" in err


def test_dry_run_of_to_keras(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    convert(tiny, base="none", out=tmp_path / "vae", dtype="float16")
    arguments = ["to-keras", tmp_path / "vae", "--out", tmp_path / "keras"]
    code, plan, err = cli(*arguments, "--dry-run")
    assert code == 0 and not err and not (tmp_path / "keras").exists()
    assert "-> vae_decoder.weights.h5" in plan and "MB float16 -> " in plan and "MB float32" in plan
    told = json.loads(cli(*arguments, "--dry-run", "--json")[1])
    done = json.loads(cli(*arguments, "--json")[1])
    assert told.pop("seconds") >= 0 and done.pop("seconds") >= 0
    assert told == told | done and len(told["moved"]) == 2
    assert "exists already" in cli(*arguments, "--dry-run")[2]


def test_inspect_says_what_is_missing(cli: Cli, tiny: Path, tmp_path: Path) -> None:
    _, told, _ = cli("inspect", tiny)
    assert told.endswith("\nMissing for a pipeline: UNet, text encoder.\n")
    assert json.loads(cli("inspect", tiny, "--json")[1])[0]["missing"] == ["unet", "text_encoder"]
    convert(tiny, out=tmp_path / "out", base="none")
    assert "Missing for a pipeline: UNet, text encoder." in cli("inspect", tmp_path / "out")[1]
    assert "Missing" not in cli("inspect", "tiny")[1]
