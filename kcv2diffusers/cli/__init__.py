"""The command line: it parses options and prints results, and has no logic of its own.

Each group of commands has its own module.
"""

from kcv2diffusers.cli.app import app, main
from kcv2diffusers.cli.command import Command
from kcv2diffusers.cli.conversion import convert, convert_lora, extract_lora, inspect, maps_app, to_keras
from kcv2diffusers.cli.env import env
from kcv2diffusers.cli.hub import push, space
from kcv2diffusers.cli.page import app as app_page
from kcv2diffusers.cli.rescue import rescue
from kcv2diffusers.cli.study import study
from kcv2diffusers.cli.training import dreambooth, generate
from kcv2diffusers.cli.verification import verify

__all__ = ["main"]

for command in (
    convert,
    convert_lora,
    extract_lora,
    inspect,
    to_keras,
    verify,
    dreambooth,
    generate,
    push,
    space,
    rescue,
    app_page,
    study,
    env,
):
    app.command(command.__name__.replace("_", "-"), cls=Command)(command)
app.add_typer(maps_app, name="maps")
