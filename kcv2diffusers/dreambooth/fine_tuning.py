"""DreamBooth from Python: the `kcv2diffusers dreambooth` command up to the exported pipeline."""

from __future__ import annotations

from collections.abc import Callable
from os import PathLike, fspath
from typing import TYPE_CHECKING, Any

from kcv2diffusers.backend import choose_backend
from kcv2diffusers.dreambooth.config import Config, make_config
from kcv2diffusers.errors import MissingExtra
from kcv2diffusers.progress import StageProgress, silent_stages

if TYPE_CHECKING:
    from kcv2diffusers.dreambooth.train import Result


def fine_tune(*, progress: StageProgress = silent_stages, **options: Any) -> Result:
    """Fine-tune on photos of a subject, and export the result.

    `options` are those of the command, with underscores instead of dashes. `instance_images`,
    `instance_prompt`, `base` and `out` are required; docs/reference/dreambooth-options.md lists all.
    `progress` is called with the stage, the number of items done, the total and a short text. Raises Error
    with a message for the user; files saved before the error are kept.
    """
    given = {name: fspath(v) if isinstance(v, PathLike) else v for name, v in options.items()}
    if isinstance(given.get("base"), str):
        given["base"] = [given["base"]]
    config = make_config(given)
    return trainer(config)(config, progress)


def trainer(config: Config, say: Callable[[str], None] = lambda line: None) -> Callable[..., Result]:
    """The training function, on the backend that `config` asks for.

    `say` is passed to `choose_backend`. Raises Error if that backend or Keras is not installed.
    """
    choose_backend(say, config.backend)
    try:
        from kcv2diffusers.dreambooth.train import train
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "keras") from error
    return train
