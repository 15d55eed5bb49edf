"""Run the two sides in separate processes: start, progress, and the arrays between them.

They run one after the other in a folder that holds the request, so only one framework with one set of models
is in memory at a time. A side prints its progress as marked lines. Any failure of a side raises an error
here.
"""

from __future__ import annotations

import json
import os
import subprocess
import sys
from collections.abc import Callable
from importlib.util import find_spec
from pathlib import Path
from typing import Any, NoReturn

import numpy as np

from kcv2diffusers.diffusion import Array
from kcv2diffusers.errors import Error, MissingExtra
from kcv2diffusers.progress import StageProgress
from kcv2diffusers.system.garbage import collect_seldom
from kcv2diffusers.system.processes import start_module
from kcv2diffusers.verification.request import Request

_MARK = "\x1e"  # prefix of our own lines; libraries print other lines
_LOG = 2000  # characters of a crashed side's stderr that are shown


class Arrays:
    """Named arrays in a folder, each a .npy file that is read on demand."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        folder.mkdir(exist_ok=True)

    def _path(self, *name: str | int) -> Path:
        return self.folder / ("__".join(map(str, name)) + ".npy")

    def save(self, values: Any, *name: str | int) -> None:
        """Write an array; the words of `name` form the file name."""
        np.save(self._path(*name), np.asarray(values))

    def load(self, *name: str | int) -> Array:
        """Read the array of that name. Pickled data is never loaded."""
        values: Array = np.load(self._path(*name), allow_pickle=False)
        return values

    def __contains__(self, name: tuple[str | int, ...]) -> bool:
        return self._path(*name).is_file()


def run_side(name: str, title: str, folder: Path, progress: StageProgress, backend: str = "torch") -> None:
    """Run module `name` of this package on `folder` and wait for it.

    `backend` is the Keras backend unless KERAS_BACKEND is set. Raises the side's Error, Error if the system
    killed the process, and RuntimeError with its stderr if it crashed.
    """
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "TF_CPP_MIN_LOG_LEVEL": "3"}
    environment.setdefault("KERAS_BACKEND", backend)
    # On the CPU: a GPU rounds the inputs of float32 convolutions to 10 mantissa bits (TF32), ten times the
    # tolerance, and a training process may still hold its memory.
    environment |= {"CUDA_VISIBLE_DEVICES": "", "JAX_PLATFORMS": "cpu", "KERAS_TORCH_DEVICE": "cpu"}
    log = folder / f"{name}.log"
    with log.open("wb") as errors:
        child = start_module(
            f"kcv2diffusers.verification.{name}",
            str(folder),
            stdout=subprocess.PIPE,
            stderr=errors,
            env=environment,
            encoding="utf-8",
            errors="replace",
        )
        refusal = None
        try:
            assert child.stdout is not None
            for line in child.stdout:
                if not line.startswith(_MARK):
                    continue
                told = json.loads(line[1:])
                if "error" in told:
                    refusal = str(told["error"])
                else:
                    progress(*told["progress"])
            code = child.wait()
        finally:
            child.kill()
            child.wait()
    if refusal is not None:
        raise Error(refusal)
    if code == -9:  # SIGKILL, which Windows does not have
        raise Error(
            f"The process of the {title} was killed, most likely for lack of memory.\n"
            "Free some memory, or give a smaller --image-size."
        )
    if code:
        raise RuntimeError(f"the {title} ended with {code}:\n{log.read_text(errors='replace')[-_LOG:]}")


def side_main(run: Callable[[Path, Request, StageProgress], None]) -> NoReturn:
    """The entry point of a side's process: call `run` on the folder in its arguments."""
    folder = Path(sys.argv[1])
    collect_seldom()

    def tell(**data: Any) -> None:
        print(_MARK + json.dumps(data), flush=True)

    try:
        run(folder, Request.load(folder), lambda *words: tell(progress=words))
    except ModuleNotFoundError as error:
        tell(error=str(MissingExtra(str(error.name), "verify")))
    except Error as error:
        tell(error=str(error))
    except BrokenPipeError:  # the parent process has ended
        os._exit(1)
    sys.exit(0)


def require(*packages: str) -> None:
    """Raise MissingExtra for a package that is not installed, before any long work starts."""
    for package in packages:
        if find_spec(package) is None:
            raise MissingExtra(package, "verify")
