"""The command line in forks of one process, which has imported the frameworks and built the models of a base.

    python forks.py

A line of the standard input is a request, [base, argument, ...] in JSON; its answer is [exit code, standard
output, standard error] of `kcv2diffusers argument ...`. A fork takes the models that were built, each once,
and loads their weights itself.
"""

from __future__ import annotations

import gc
import json
import os
import sys
import traceback
from collections.abc import Callable
from tempfile import TemporaryFile
from typing import IO, Any

import diffusers  # noqa: F401
import transformers  # noqa: F401

from kcv2diffusers import cli
from kcv2diffusers.dreambooth import train  # noqa: F401
from kcv2diffusers.dreambooth.config import Config
from kcv2diffusers.dreambooth.devices import best_precision
from kcv2diffusers.models import base as loading
from kcv2diffusers.system.garbage import collect_seldom

NAMES = ("build_unet", "build_text_encoder", "build_decoder", "build_image_encoder")
BUILDERS = {name: getattr(loading, name) for name in NAMES}
built: dict[str, Any] = {}


def prepare(base: str) -> None:
    """Build what a run on this base with the usual options asks for first."""
    made: dict[str, Any] = {}

    def noted(build: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            return made.setdefault(f"{build.__name__}{arguments}", build(*arguments))

        return call

    def taken(build: Callable[..., Any]) -> Callable[..., Any]:
        def call(*arguments: Any) -> Any:
            key = f"{build.__name__}{arguments}"
            return built.pop(key) if key in built else build(*arguments)

        return call

    for name, build in BUILDERS.items():
        setattr(loading, name, noted(build))
    usual = Config()
    loading.load_base(base, gelu=usual.unet_gelu, moments=True, dtype=best_precision())
    for name, build in BUILDERS.items():
        setattr(loading, name, taken(build))
    built.update(made)


def run(arguments: list[str], out: IO[str], err: IO[str]) -> None:
    """What the process of a command does, in a fork; it does not return."""
    code = 1
    try:
        os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
        os.dup2(out.fileno(), 1)
        os.dup2(err.fileno(), 2)
        sys.argv = ["kcv2diffusers", *arguments]
        cli.main()
    except SystemExit as stop:
        code = int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def main() -> None:
    answers = os.fdopen(os.dup(1), "w")
    os.dup2(2, 1)
    prepared = set()
    collect_seldom()
    for line in sys.stdin:
        base, *arguments = json.loads(line)
        if base not in prepared:
            prepare(base)
            prepared.add(base)
        gc.freeze()
        with TemporaryFile("w+") as out, TemporaryFile("w+") as err:
            child = os.fork()
            if not child:
                run(arguments, out, err)
            code = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
            out.seek(0)
            err.seek(0)
            print(json.dumps([code, out.read(), err.read()]), file=answers, flush=True)


if __name__ == "__main__":
    main()
