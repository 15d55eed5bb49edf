"""README.md and docs/: their code runs, and every command, option and public name is in them."""

from __future__ import annotations

import contextlib
import importlib.util
import io
import json
import os
import re
import shlex
import shutil
import subprocess
import sys
import tomllib
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, NamedTuple

import numpy as np
import pytest
import yaml
from PIL import Image
from support import keras_hub
from support.loras import kohya, save
from typer.main import get_command

import kcv2diffusers
from kcv2diffusers import convert, to_keras
from kcv2diffusers.cli.app import app

ROOT = Path(__file__).parents[1]
DOCS = ROOT / "docs"
PAGES = [ROOT / "README.md", ROOT / "CONTRIBUTING.md", *sorted(DOCS.rglob("*.md"))]
PACKAGE = ROOT / "kcv2diffusers"
SUBJECT = PACKAGE / "tiny" / "subject"
# What a page shows and what the test runs instead, which takes less time.
SHORTER = {
    "--steps 250": "--steps 2",
    "--num-class-images 16": "--num-class-images 2",
    "--sample-prompt": "--sample-steps 2 --sample-prompt",
    "step-000250": "step-000002",
    "steps=250": "steps=2",
    "height=512, width=768, steps=50": "height=64, width=128, steps=2",
    "steps=25": "steps=3",
    "--seed 1": "--seed 1 --steps 2",
    "generate --base tiny": "generate --steps 2 --base tiny",
    "verify tiny-pipeline/": "verify --steps 2 --images-per-prompt 1 tiny-pipeline/",
    "verify dog/ dog-unet.h5 dog-text_encoder.h5 --base sd15/ --report": (
        "verify --steps 2 --images-per-prompt 1 dog/ dog-unet.h5 dog-text_encoder.h5 --base sd15/ --report"
    ),
    # The README's command, which the guide runs in full.
    "verify dog/ dog-unet.h5 dog-text_encoder.h5 --base sd15/  ": (
        "verify --level weights dog/ dog-unet.h5 dog-text_encoder.h5 --base sd15/ "
    ),
    "verify dog/ dreambooth-unet.weights.h5": "verify --level weights dog/ dreambooth-unet.weights.h5",
    "num_inference_steps=28": "num_inference_steps=2, height=64, width=64",
    "kcv2diffusers/tiny/subject": str(SUBJECT),
}
# The page that explains the options of a command. Those of dreambooth are a generated table.
GUIDES = {
    "convert": "guides/convert.md",
    "convert-lora": "guides/lora.md",
    "extract-lora": "guides/lora.md",
    "inspect": "guides/convert.md",
    "to-keras": "guides/to-keras.md",
    "verify": "guides/verify.md",
    "dreambooth": "reference/dreambooth-options.md",
    "generate": "guides/models.md",
    "push": "guides/hub.md",
    "space": "guides/hub.md",
    "rescue": "guides/rescue.md",
    "app": "guides/app.md",
    "study": "guides/study.md",
    "env": "reference/errors.md",
    "maps list": "concepts/weight-maps.md",
    "maps show": "concepts/weight-maps.md",
    "maps check": "concepts/weight-maps.md",
}
# Options of many commands, which are explained where the first of these has its guide.
COMMON = {"--json", "--help"}


class Block(NamedTuple):
    """A code block: its language, its text, the first line's number, and why it is not run ("" if it is)."""

    language: str
    text: str
    line: int
    not_run: str


def blocks(page: Path) -> list[Block]:
    """The code blocks of a page."""
    found, reason, lines = [], "", page.read_text(encoding="utf-8").splitlines()
    numbered = iter(enumerate(lines, start=1))
    for number, line in numbered:
        if comment := re.fullmatch(r"<!-- not run: (.+) -->", line):
            reason = comment[1]
        elif line.startswith("```"):
            code = []
            for _, inside in numbered:
                if inside == "```":
                    break
                code.append(inside)
            found.append(Block(line[3:].split(" ")[0], "\n".join(code), number, reason))
            reason = ""
        elif line and not line.startswith("<!--"):
            assert not reason, f"{page}:{number}: 'not run' stands above no code block"
    return found


def given(page: Path) -> list[str]:
    """The names of the files that a page needs."""
    comments = re.findall(r"<!-- given: (.+) -->", page.read_text(encoding="utf-8"))
    return list(dict.fromkeys(name for comment in comments for name in comment.split()))


@pytest.fixture(scope="module")
def world(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str], Path]:
    """The files that pages name, made of the tiny base when a page asks for them."""
    folder = tmp_path_factory.mktemp("world")
    pipeline = convert("tiny", out=folder / "pipeline").out
    lora = save(kohya(pipeline), folder / "dog-lora.safetensors")
    tuned = convert("tiny", out=folder / "tuned", lora=lora).out
    keras = to_keras(tuned, out=folder / "keras", format="h5").out
    made = {
        "sd15/": lambda: pipeline,
        "pipeline/": lambda: pipeline,
        "dog/": lambda: convert(keras, out=folder / "dog", dtype="float32").out,
        "checkpoints/": lambda: keras,
        "dog-unet.h5": lambda: keras / "unet.h5",
        "dog-text_encoder.h5": lambda: keras / "text_encoder.h5",
        "photos/": lambda: SUBJECT,
        "sd3/": lambda: convert(keras_hub.models() / "sd35l" / "task", out=folder / "sd3").out,
        "dreambooth-unet.weights.h5": lambda: shutil.copy(
            keras_hub.models() / "sd35l" / "diffuser.weights.h5", folder / "dreambooth-unet.weights.h5"
        ),
        "preset/": lambda: keras_hub.models() / "sd35l" / "task",
        "adapter.lora.h5": lambda: keras_hub.models() / "sd35l" / "adapter.lora.h5",
        "dog-lora.safetensors": lambda: lora,
    }
    kept: dict[str, Path] = {}

    def find(name: str) -> Path:
        if name not in kept:
            kept[name] = made[name]()
        return kept[name]

    return find


@pytest.fixture
def place(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """An empty folder to work in."""
    monkeypatch.chdir(tmp_path)
    return tmp_path


def run_command(line: str) -> None:
    """Run a line of a shell: a command of the package in this process, anything else refused."""
    words = shlex.split(line, comments=True)
    while words and re.fullmatch(r"[A-Z_]+=\w*", words[0]):
        assert words.pop(0) == "KERAS_BACKEND=torch"
    if not words:
        return
    assert words[0] == "kcv2diffusers", f"{line}: only commands of the package are run"
    printed = io.StringIO()
    try:
        with contextlib.redirect_stdout(printed):
            code = get_command(app).main(words[1:], "kcv2diffusers", standalone_mode=False)
    except SystemExit as error:
        code = error.code
    assert code in (0, None), f"{line}: {printed.getvalue()}"


def shorter(text: str) -> str:
    for shown, run in SHORTER.items():
        text = text.replace(shown, run)
    return text


RUN = [page for page in PAGES if any(b.language in ("sh", "python") and not b.not_run for b in blocks(page))]


@pytest.mark.slow
@pytest.mark.parametrize("page", RUN, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_runs(page: Path, place: Path, world: Callable[[str], Path]) -> None:
    """All blocks of a page in their order, in one folder and one namespace."""
    for name in given(page):
        source, target = world(name), place / name.rstrip("/")
        if source.is_dir():
            shutil.copytree(source, target)
        else:
            shutil.copy(source, target)
            # What the weights of the tiny base do not tell, as for any model of unusual widths.
            if (beside := source.parent / "kcv2diffusers.json").exists():
                shutil.copy(beside, place)
    names: dict[str, Any] = {"__name__": "__main__"}
    for block in blocks(page):
        if block.not_run:
            continue
        if block.language == "sh":
            for line in shorter(block.text.replace("\\\n", " ")).splitlines():
                run_command(line)
        elif block.language == "python":
            code = "\n" * block.line + shorter(block.text)
            exec(compile(code, str(page), "exec"), names)
    if page.name in ("README.md", "quickstart.md"):
        picture = np.asarray(Image.open(place / "fox.png").convert("RGB"))
        assert picture.shape == (64, 64, 3) and picture.std() > 20


@pytest.mark.parametrize("page", PAGES, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_code_blocks_have_a_language(page: Path) -> None:
    for block in blocks(page):
        assert block.language in ("sh", "python", "toml", "json", "yaml", "text"), f"{page}:{block.line}"
        if block.language == "toml":
            assert tomllib.loads(block.text)
        elif block.language == "json":
            assert json.loads(block.text)
        elif block.language == "python":
            compile(block.text, str(page), "exec")
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    assert not re.search(r"\n\n {4}(kcv2diffusers|python|pip|make) ", text), "an indented block is not run"


def test_every_shortening_is_used() -> None:
    text = "\n".join(b.text for page in RUN for b in blocks(page) if not b.not_run)
    assert [shown for shown in SHORTER if shown not in text] == []


def test_toml_of_a_run_is_accepted(tmp_path: Path) -> None:
    from kcv2diffusers.dreambooth.config import read_options

    found = [
        b for page in PAGES for b in blocks(page) if b.language == "toml" and "instance_prompt" in b.text
    ]
    assert found
    for block in found:
        file = tmp_path / "run.toml"
        file.write_text(block.text)
        values = read_options(file)
        assert values.get("instance_prompt") or values["subjects"]


def test_rooms_are_those_of_the_contract() -> None:
    """Every room stands in the table of the architecture, in the order that import-linter checks."""
    contract = tomllib.loads((ROOT / "pyproject.toml").read_text())["tool"]["importlinter"]["contracts"][0]
    layers = [{name.strip() for name in layer.split("|")} for layer in reversed(contract["layers"])]
    page = (DOCS / "develop" / "architecture.md").read_text(encoding="utf-8")
    table = page.partition("| room |")[2].partition("\n\n")[0]
    rows = [set(re.findall(r"`(\w+)`", row.split("|")[1])) for row in table.splitlines()[2:]]
    assert [*rows, {"__main__"}] == layers


def commands() -> Iterator[tuple[str, Any]]:
    """Every command by its words, without groups."""

    def walk(command: Any, words: str) -> Iterator[tuple[str, Any]]:
        inner = getattr(command, "commands", None)
        if inner is None:
            yield words, command
        for name, child in (inner or {}).items():
            yield from walk(child, f"{words} {name}".strip())

    yield from walk(get_command(app), "")


COMMANDS = dict(commands())


def test_every_command_has_a_guide() -> None:
    assert GUIDES.keys() == COMMANDS.keys()


@pytest.mark.parametrize("name", COMMANDS)
def test_every_option_is_documented(name: str) -> None:
    reference = (DOCS / "reference" / "cli.md").read_text(encoding="utf-8")
    section = reference.partition(f"## kcv2diffusers {name}\n")[2].partition("\n## ")[0]
    assert section
    guide = (DOCS / GUIDES[name]).read_text(encoding="utf-8")
    assert re.search(rf"kcv2diffusers {name}\b", guide), f"{GUIDES[name]} does not name {name}"
    for param in COMMANDS[name].params:
        if param.param_type_name != "option":
            continue
        option = max(param.opts, key=len)
        assert re.search(rf"`[^`\n]*{option}\b", section), f"{option} in reference/cli.md"
        if option not in COMMON:
            assert re.search(rf"(?<![\w-]){option}(?![\w-])", guide), f"{option} in {GUIDES[name]}"


PUBLIC = {
    "kcv2diffusers": [
        "Converted",
        "ConvertedLora",
        "Error",
        "ExtractedLora",
        "Inspected",
        "Pushed",
        "ToKeras",
        "Verified",
        "convert",
        "convert_lora",
        "extract_lora",
        "fine_tune",
        "generate",
        "inspect",
        "load_base",
        "locate",
        "push",
        "replay",
        "space",
        "to_keras",
        "verify",
    ],
    "kcv2diffusers.models": [
        "LATENT_SCALE",
        "SD1",
        "SD2",
        "ModelConfig",
        "TextEncoderConfig",
        "UNetConfig",
        "VAEConfig",
        "build_decoder",
        "build_image_encoder",
        "build_text_encoder",
        "build_unet",
        "rematerialise",
    ],
}


@pytest.mark.parametrize("module", PUBLIC)
def test_the_public_face(module: str) -> None:
    """Names that others may import: to take one away breaks their code. All are there and documented."""
    found = importlib.import_module(module)
    assert found.__all__ == PUBLIC[module]
    reference = (DOCS / "reference" / "python.md").read_text(encoding="utf-8")
    for name in found.__all__:
        value = getattr(found, name)
        if callable(value):
            assert value.__doc__, f"{name} has no docstring"
        assert re.search(rf"^::: kcv2diffusers[.\w]*\.{name}$", reference, re.M), (
            f"{name} in reference/python.md"
        )


def test_an_unknown_name_is_refused() -> None:
    with pytest.raises(AttributeError, match="no attribute 'nothing'"):
        _ = kcv2diffusers.nothing


def test_generated_parts_are_current() -> None:
    done = subprocess.run(
        [sys.executable, ROOT / "tools" / "docs.py", "--check"], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stdout + done.stderr


def import_tool() -> Any:
    """tools/docs.py."""
    spec = importlib.util.spec_from_file_location("docs_tool", ROOT / "tools" / "docs.py")
    assert spec is not None and spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def test_an_outdated_page_is_found(tmp_path: Path) -> None:
    """The generator of a copy of the repository, in which one default and one table have changed."""
    for name in ("README.md", "docs", "tools", "benchmarks", "weight_maps"):
        source = ROOT / name
        (shutil.copytree if source.is_dir() else shutil.copy)(source, tmp_path / name)
    shutil.copytree(PACKAGE, tmp_path / PACKAGE.name, ignore=shutil.ignore_patterns("*.h5", "__pycache__"))
    options = tmp_path / PACKAGE.name / "dreambooth" / "config.py"
    options.write_text(options.read_text().replace("_option(400,", "_option(401,"))
    speed = tmp_path / "benchmarks" / "results" / "speed.md"
    speed.write_text(speed.read_text().replace("| 1.00 |", "| 1.01 |"))
    done = subprocess.run(
        [sys.executable, tmp_path / "tools" / "docs.py", "--check"],
        cwd=tmp_path,
        env={**os.environ, "PYTHONPATH": ""},
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 1 and "python tools/docs.py" in done.stderr
    changed = set(re.findall(r"^--- (\S+)", done.stdout, re.M))
    assert changed == {"docs/reference/cli.md", "docs/reference/dreambooth-options.md", "docs/benchmarks.md"}


LINKED = [*PAGES, ROOT / "CHANGELOG.md", ROOT / "SECURITY.md"]


@pytest.mark.parametrize("page", LINKED, ids=lambda page: page.relative_to(ROOT).as_posix())
def test_links_lead_to_files(page: Path) -> None:
    """Relative links, which a reader of the repository follows; those of the site are mkdocs' to check."""
    text = re.sub(r"^```.*?^```$", "", page.read_text(encoding="utf-8"), flags=re.M | re.S)
    for target in re.findall(r"\]\(([^)\s]+)\)", text):
        if re.match(r"https?:|#", target):
            continue
        assert not target.startswith("/") and (page.parent / target.partition("#")[0]).exists(), target


def test_readme_is_short_and_leads_to_everything() -> None:
    text = (ROOT / "README.md").read_text(encoding="utf-8")
    assert len(text.splitlines()) <= 120
    shown = "\n".join(block.text for block in blocks(ROOT / "README.md"))
    assert all(
        re.search(rf"^{command}( |$)", shown, re.M) for command in ("pip install .", "make demo", "make test")
    )
    assert all(f"({path})" in text for path in ("LICENSE", "CONTRIBUTING.md", "CHANGELOG.md", "SECURITY.md"))
    (picture,) = re.findall(r"!\[[^]]+\]\(([^)]+)\)", text)
    assert (ROOT / picture).stat().st_size < 150_000


def test_what_lint_runs_is_run_before_a_commit() -> None:
    """.pre-commit-config.yaml and `make lint`."""
    makefile = (ROOT / "Makefile").read_text(encoding="utf-8")
    recipe = re.search(r"^lint:.*\n((?:\t.+\n)+)", makefile, re.M)
    assert recipe
    hooks = yaml.safe_load((ROOT / ".pre-commit-config.yaml").read_text())["repos"][0]["hooks"]
    assert [hook["entry"] for hook in hooks] == [
        line.strip().replace("$(BIN)", ".venv/bin") for line in recipe[1].splitlines()
    ]


def test_containers_of_the_documentation_are_those_of_the_readers() -> None:
    """What readers call a container stands in their code."""
    names = [name for names, _, _ in import_tool().CONTAINERS for name in names]
    code = "\n".join(path.read_text(encoding="utf-8") for path in (PACKAGE / "sources").glob("*.py"))
    assert [name for name in names if f'"{name}"' not in code] == []
