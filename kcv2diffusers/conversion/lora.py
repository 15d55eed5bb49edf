"""Conversion of LoRA files: the tensor names of diffusers and kohya, and KerasHub's files to diffusers."""

from __future__ import annotations

from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, Literal

from safetensors import safe_open

from kcv2diffusers.errors import Error, no_choice
from kcv2diffusers.progress import Progress, silent
from kcv2diffusers.sources.diffusers_pipeline import read_header
from kcv2diffusers.sources.gather import SourcePath, parts_of
from kcv2diffusers.sources.keras_lora import ENDING as KERAS_ENDING
from kcv2diffusers.sources.keras_lora import SPELLING as KERAS_HUB
from kcv2diffusers.sources.keras_lora import read_keras_lora
from kcv2diffusers.sources.locate import locate_lora
from kcv2diffusers.sources.lora import Lora, read_lora
from kcv2diffusers.sources.lora_names import SPELLINGS
from kcv2diffusers.system.output import check_folder, check_free_file, new_file
from kcv2diffusers.targets.lora import WRITTEN, lora_plan, write_lora
from kcv2diffusers.targets.stream import run_finite

ENDING = ".safetensors"
_SLACK = 1 << 20  # bytes for the header and the folder


@dataclass(frozen=True, kw_only=True)
class ConvertedLora:
    """The result of `convert_lora`, or the plan after a dry run.

    `modules` is the number of modules of each component that the LoRA changes. `ranks` are the ranks that
    occur. Sizes are in bytes.
    """

    out: Path
    source: Path
    source_format: str
    format: str
    modules: dict[str, int]
    ranks: list[int]
    dtypes: list[str]
    bytes_written: int
    dry_run: bool = False

    def text(self) -> str:
        """Return a few human-readable lines."""
        counts = ", ".join(f"{component} {count} modules" for component, count in self.modules.items())
        rank = ", ".join(map(str, self.ranks))
        return (
            f"{'To write: ' if self.dry_run else ''}LoRA in the format of {self.format}, {self.out}\n"
            f"  {self.source} ({self.source_format})\n"
            f"  {counts}; rank {rank}; {', '.join(self.dtypes)}; {self.bytes_written / 1e6:.1f} MB"
            + ("\nNothing was written (--dry-run)." if self.dry_run else "")
        )

    def to_dict(self) -> dict[str, Any]:
        """Return the fields for JSON."""
        return asdict(self) | {"out": str(self.out), "source": str(self.source)}


def convert_lora(
    source: SourcePath,
    *,
    out: SourcePath,
    format: Literal["diffusers", "kohya"] | None = None,
    base: SourcePath | None = None,
    overwrite: bool = False,
    allow_nonfinite: bool = False,
    dry_run: bool = False,
    progress: Progress = silent,
) -> ConvertedLora:
    """Convert the LoRA file `source` (or the one in a pipeline folder) to the tensor names of another format.

    `source` is a path or an hf:// address. `format` is "diffusers", for `load_lora_weights`, or "kohya", for
    ComfyUI and A1111 (default: "kohya" for a source in the format of diffusers, else "diffusers"). The
    factors are copied bit for bit, in their dtypes. A `.lora.h5` file of KerasHub becomes one in the format
    of diffusers. It says only the numbers of its layers: `base` is the model that it was trained on, a
    pipeline or KerasHub weights (default: the released models). A `dry_run` writes nothing. `progress` is
    called with the bytes done and in total. Raises Error with a message for the user; `out` is then
    unchanged.
    """
    target = Path(out)
    if format not in (None, *SPELLINGS):
        raise no_choice("--format", format, SPELLINGS)
    if target.suffix != ENDING:
        raise Error(f"{target}: a LoRA file ends in {ENDING}.\nGive --out {target.name or 'lora'}{ENDING}.")
    check_free_file(target, overwrite=overwrite, replaceable=is_output)
    lora = _read(source, base)
    if lora.path.resolve() == target.resolve():
        raise Error(f"{target}: is read from, and would be replaced.\nChoose another --out.")
    spelling: str = format or ("kohya" if lora.spelling == "diffusers" else "diffusers")
    if lora.spelling == KERAS_HUB and spelling == "kohya":
        raise Error(
            "--format kohya: a LoRA of KerasHub is written in the format of diffusers.\nOmit --format."
        )
    plan = lora_plan(lora, spelling)
    components = [component for component, _ in lora.updates]
    result = ConvertedLora(
        out=target,
        source=lora.path,
        source_format=lora.spelling,
        format=spelling,
        modules={component: components.count(component) for component in dict.fromkeys(components)},
        ranks=sorted({update.rank for update in lora.updates.values()}),
        dtypes=sorted({update.down.dtype.name for update in lora.updates.values()}),
        bytes_written=plan.nbytes,
        dry_run=dry_run,
    )
    if dry_run:
        check_folder(target.absolute().parent, plan.nbytes + _SLACK)
        return result
    with new_file(target, overwrite=overwrite, replaceable=is_output, needed=plan.nbytes + _SLACK) as file:
        run_finite(write_lora(file, plan), progress, allow_nonfinite=allow_nonfinite)
        with safe_open(file, framework="numpy"):  # safetensors itself validates the header
            pass
    return result


def _read(source: SourcePath, base: SourcePath | None) -> Lora:
    if str(source).endswith(KERAS_ENDING):
        models = {} if base is None else parts_of(base)
        return read_keras_lora(
            locate_lora(source), {part: match.require_complete() for part, match in models.items()}
        )
    if base is not None:
        raise Error(f"--base is for KerasHub's {KERAS_ENDING} files; {source} is another file.\nOmit it.")
    return read_lora(source)


def is_output(path: Path) -> bool:
    """Return whether a file is a LoRA that this package wrote and may therefore replace."""
    try:
        return path.is_file() and WRITTEN in read_header(path)[1]
    except Error:
        return False
