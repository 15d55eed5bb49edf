"""A single file as a pipeline folder, as diffusers' own `from_single_file` reads it.

What is compared with the sources is then what diffusers finds in the file, not what our reader does.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from tempfile import TemporaryDirectory

from kcv2diffusers.conversion.to_diffusers import convert
from kcv2diffusers.json_text import write_json
from kcv2diffusers.maps.parts import family_of
from kcv2diffusers.pipeline.configs import model_index
from kcv2diffusers.pipeline_files import MODEL_INDEX
from kcv2diffusers.progress import StageProgress
from kcv2diffusers.sources.gather import gather
from kcv2diffusers.verification.exchange import require, run_side
from kcv2diffusers.verification.request import Request


@contextmanager
def as_pipeline(file: Path, request: Request, progress: StageProgress) -> Iterator[Path]:
    """A temporary pipeline folder of a single file, named like the file.

    The folder has the file's parts as diffusers reads them, in the dtypes that the file stores. The sources
    and the base of `request` supply the tokenizer, the base also the parts that the file lacks. The folder
    takes twice the size of the file while it is written. Raises Error if diffusers cannot read the file,
    MissingExtra if it is not installed.
    """
    require("torch", "diffusers", "transformers")
    held = gather([file], {})
    family = family_of(held)
    whole = all(part in held for part in family.parts)
    homes = [*request.base, *request.sources, *request.named.values()]
    base = homes if whole or request.base else "none"
    with TemporaryDirectory(prefix="kcv2diffusers-verify-") as work:
        folder = Path(work, file.name)
        convert(file, out=folder, format="pipeline", base=base)
        complete = (folder / MODEL_INDEX).is_file()
        if not complete:  # diffusers does not start without it
            write_json(folder / MODEL_INDEX, model_index(family, None, held))
        Request(pipeline=str(file)).save(Path(work))
        run_side("single_file_side", "diffusers", Path(work), progress)
        if not complete:
            (folder / MODEL_INDEX).unlink()
        yield folder
