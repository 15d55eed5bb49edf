"""The README's first screen, as it stands; its installation is what `make venv` does."""

from __future__ import annotations

import re
import shlex
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

README = (Path(__file__).parents[1] / "README.md").read_text()


@pytest.mark.slow
def test_first_screen(tmp_path: Path) -> None:
    first = README.partition("Your own checkpoints:")[0]
    (command,) = re.findall(r"^    kcv2diffusers (.+)$", first, re.M)
    (snippet,) = re.findall(r"```python\n(.+?)```", first, re.S)
    for arguments in (["-m", "kcv2diffusers", *shlex.split(command)], ["-c", snippet]):
        done = subprocess.run(
            [sys.executable, *arguments], cwd=tmp_path, capture_output=True, text=True, check=False
        )
        assert done.returncode == 0, done.stderr
    picture = np.asarray(Image.open(tmp_path / "fox.png").convert("RGB"))
    assert picture.shape == (64, 64, 3) and picture.std() > 20
