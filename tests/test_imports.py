"""The conversion path stays light: no framework is imported, and the command line answers at once."""

from __future__ import annotations

import json
import resource
import statistics
import subprocess
import sys
from pathlib import Path

import pytest
from support.checkpoints import Checkpoints
from support.frameworks import HEAVY


@pytest.mark.slow
def test_convert_and_back_import_no_framework(checkpoints: Checkpoints, tmp_path: Path) -> None:
    files = [
        str(checkpoints("keras3", part) / name)
        for part, name in (("vae_decoder", "weights.weights.h5"), ("vae_encoder", "export"))
    ]
    code = f"""
import sys
from kcv2diffusers import convert, inspect, to_keras
convert(*{files!r}, out={str(tmp_path / "out")!r}, base="none")
to_keras({str(tmp_path / "out")!r}, out={str(tmp_path / "back")!r})
inspect({str(tmp_path / "back")!r})
import json
print(json.dumps(sorted({{name.partition(".")[0] for name in sys.modules}})))
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    modules = set(json.loads(done.stdout))
    assert {"h5py", "numpy"} <= modules
    assert not modules & set(HEAVY)


@pytest.mark.parametrize("arguments", [["--help"], ["convert", "--help"]])
def test_help_needs_no_numpy(arguments: list[str]) -> None:
    """The 0.2 s of the benchmark are for a quiet machine. What takes the time is tested here, and the time of
    a processor, to which other work on the machine adds less.
    """
    code = f"""
import sys
sys.argv = ["kcv2diffusers", *{arguments!r}]
from kcv2diffusers.cli import main
try:
    main()
finally:
    print(sorted(sys.modules.keys() & {{"numpy", "h5py", "rich", "safetensors"}}))
"""
    times = []
    for _ in range(3):
        started = resource.getrusage(resource.RUSAGE_CHILDREN)
        done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=False)
        ended = resource.getrusage(resource.RUSAGE_CHILDREN)
        times.append(ended.ru_utime + ended.ru_stime - started.ru_utime - started.ru_stime)
        assert "Usage" in done.stdout
        assert done.stdout.splitlines()[-1] == "[]"
    assert statistics.median(times) < 1


PLAIN = """
import sys

class Without:
    '''A finder of modules that does not see what a plain `pip install kcv2diffusers` does not bring.'''

    def __init__(self, finder):
        self.finder = finder

    def find_spec(self, name, path=None, target=None):
        hidden = name.partition(".")[0] in {hidden!r}
        return None if hidden else self.finder.find_spec(name, path, target)

sys.meta_path[:] = map(Without, sys.meta_path)
"""
EXTRAS = (
    "PIL",
    "accelerate",
    "diffusers",
    "gradio",
    "huggingface_hub",
    "jax",
    "jinja2",
    "keras",
    "skimage",
    "tensorflow",
)
EXTRAS += ("torch", "transformers")


@pytest.mark.parametrize(
    ("arguments", "package", "extra"),
    [
        (["generate", "--base", "tiny", "--out", "x", "--prompt", "a cat"], "pillow", "keras"),
        (
            [
                "dreambooth",
                "--base",
                "tiny",
                "--instance-images",
                ".",
                "--instance-prompt",
                "a",
                "--out",
                "x",
            ],
            "keras",
            "keras",
        ),
        (["verify", "x", "tiny"], "keras", "verify"),
        (["convert", "tiny", "--out", "x", "--verify"], "keras", "verify"),
        (["convert", "hf://user/repo", "--out", "x"], "huggingface_hub", "hub"),
        (["push", "x", "user/repo"], "huggingface_hub", "hub"),
        (["space", "x", "user/repo", "--out", "y"], "huggingface_hub", "hub"),
        (["rescue", "user", "--to", "./y"], "huggingface_hub", "hub"),
        (["app", "--work", "x"], "gradio", "app"),
        ("load_base('tiny')", "keras", "keras"),
        ("generate('tiny', prompts=['a cat'], out='x')", "pillow", "keras"),
        ("replay('x', ['a cat'], None)", "torch", "diffusers"),
    ],
    ids=str,
)
def test_a_missing_extra_is_two_lines(
    arguments: list[str] | str, package: str, extra: str, tmp_path: Path
) -> None:
    """Commands and functions in an installation without any extra."""
    if isinstance(arguments, str):
        call = f"import kcv2diffusers\ntry:\n    kcv2diffusers.{arguments}\n"
        call += "except kcv2diffusers.Error as error:\n    sys.exit(str(error))\n"
    else:
        call = f"sys.argv = ['kcv2diffusers', *{arguments!r}]\nfrom kcv2diffusers.cli import main\nmain()\n"
    done = subprocess.run(
        [sys.executable, "-c", PLAIN.format(hidden=EXTRAS) + call],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1, done.stderr
    assert len(done.stderr.splitlines()) == 2, done.stderr
    first, second = done.stderr.splitlines()
    assert first.removeprefix("kcv2diffusers: ") == f"{package} is not installed."
    assert second == f"pip install 'kcv2diffusers[{extra}]'" or package in ("torch",)
    assert not list(tmp_path.iterdir())
