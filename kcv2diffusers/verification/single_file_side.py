"""Read a single file by diffusers' own `from_single_file`, and write its weights into a pipeline folder.

python -m kcv2diffusers.verification.single_file_side FOLDER
"""

from __future__ import annotations

from pathlib import Path
from typing import Any

import diffusers
import torch
from safetensors import safe_open

from kcv2diffusers.errors import Error
from kcv2diffusers.maps.parts import family_of
from kcv2diffusers.maps.tables import tables_of
from kcv2diffusers.pipeline_files import SCHEDULER_FILE, TOKENIZER
from kcv2diffusers.progress import StageProgress
from kcv2diffusers.sources.gather import gather
from kcv2diffusers.verification.exchange import side_main
from kcv2diffusers.verification.request import Request


def run(folder: Path, request: Request, progress: StageProgress) -> None:
    """Replace the weights of the pipeline in FOLDER, named like the file, by those that diffusers reads.

    Only weights of parts in the file are replaced; their dtypes stay. Raises Error if diffusers cannot read
    the file.
    """
    file = Path(request.pipeline)
    pipeline = folder / file.name
    held = gather([file], {})
    family = family_of(held)
    mine = [table for table in tables_of(family) if set(held) & set(table.parts)]
    others = {table.folder for table in tables_of(family)} - {table.folder for table in mine}
    others |= {name for name in (TOKENIZER, SCHEDULER_FILE.parent.name) if not (pipeline / name).is_dir()}
    stock: Any = getattr(diffusers, family.index["_class_name"])
    progress("Reading by diffusers", 0, len(mine), "")
    try:
        pipe = stock.from_single_file(
            str(file),
            config=str(pipeline),
            local_files_only=True,
            torch_dtype=torch.float32,
            **dict.fromkeys([*others, "safety_checker", "feature_extractor", "image_encoder"]),
        )
    except (OSError, ValueError, RuntimeError, KeyError) as error:
        raise Error(f"{file}: diffusers cannot read it: {error}") from error
    for done, table in enumerate(mine, 1):
        with safe_open(pipeline / table.folder / table.weights, framework="pt") as opened:
            dtype = opened.get_tensor(next(iter(opened.keys()))).dtype
        getattr(pipe, table.folder).to(dtype).save_pretrained(pipeline / table.folder)
        progress("Reading by diffusers", done, len(mine), "")


if __name__ == "__main__":
    side_main(run)
