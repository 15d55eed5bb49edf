"""The notebooks run from top to bottom on the tiny base, with fewer and shorter runs than they show."""

from __future__ import annotations

import ast
import os
from importlib import import_module
from pathlib import Path

import nbformat
import pytest
from nbclient import NotebookClient
from support.waiting import LONG

pytestmark = pytest.mark.slow

FOLDER = Path(__file__).parent.parent / "notebooks"
SHORTER = {
    "convert": {"STEPS, GUIDANCE_SCALE = 25, 5.0": "STEPS, GUIDANCE_SCALE = 3, 5.0"},
    "dreambooth": {"TRAINING_STEPS = 250": "TRAINING_STEPS = 3", "num_class_images=16": "num_class_images=2"},
    "settings": {
        "LEARNING_RATES = [1e-4, 5e-4, 2e-3]": "LEARNING_RATES = [1e-4, 5e-4]",
        "TRAINING_STEPS, EVERY = 200, 50": "TRAINING_STEPS, EVERY = 2, 1",
        "num_class_images=16": "num_class_images=2",
        "GUIDANCE_SCALES = LEARNING_RATES[1], [1.0, 2.5, 5.0, 7.5]": "GUIDANCE_SCALES = 5e-4, [5.0]",
        "steps=25": "steps=2",
    },
}


def test_every_notebook_is_run_and_linked() -> None:
    assert {path.stem for path in FOLDER.glob("*.ipynb")} == set(SHORTER)
    readme = (FOLDER.parent / "README.md").read_text(encoding="utf-8")
    assert all(f"(notebooks/{name}.ipynb)" in readme for name in SHORTER)


@pytest.mark.parametrize("name", SHORTER)
def test_notebook(name: str, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    path = FOLDER / f"{name}.ipynb"
    text = path.read_text(encoding="utf-8")
    for shown, shorter in SHORTER[name].items():
        assert shown in text
        text = text.replace(shown, shorter)
    monkeypatch.setattr(os, "environ", {**os.environ, "KERAS_BACKEND": "torch", "OMP_NUM_THREADS": "1"})
    notebook = nbformat.reads(text, as_version=4)
    NotebookClient(notebook, timeout=LONG, resources={"metadata": {"path": str(tmp_path)}}).execute()
    pictures = [
        output
        for cell in notebook.cells
        if cell.cell_type == "code"
        for output in cell.outputs
        if "image/png" in output.get("data", {})
    ]
    assert len(pictures) == {"convert": 1, "dreambooth": 4, "settings": 2}[name]


@pytest.mark.parametrize("name", SHORTER)
def test_it_uses_public_names(name: str) -> None:
    """Those of an `__all__`."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    code = "\n".join(cell.source for cell in notebook.cells if cell.cell_type == "code")
    imported = [node for node in ast.walk(ast.parse(code)) if isinstance(node, ast.ImportFrom)]
    ours = [node for node in imported if (node.module or "").startswith("kcv2diffusers")]
    assert ours
    for node in ours:
        assert {alias.name for alias in node.names} <= set(import_module(str(node.module)).__all__)


@pytest.mark.parametrize("name", SHORTER)
def test_its_shown_outputs_are_of_a_whole_run(name: str) -> None:
    """As it is in the repository: every code cell has been run, in order, without an error."""
    notebook = nbformat.read(FOLDER / f"{name}.ipynb", as_version=4)
    cells = [cell for cell in notebook.cells if cell.cell_type == "code"]
    assert [cell.execution_count for cell in cells] == list(range(1, len(cells) + 1))
    assert not [o for cell in cells for o in cell.outputs if o.output_type == "error"]
