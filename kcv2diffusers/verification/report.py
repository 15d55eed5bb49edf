from pathlib import Path
from kcv2diffusers.verification.result import Verified


def write(target: Path, folder: Path | None, result: Verified) -> None: ...
