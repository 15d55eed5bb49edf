"""`kcv2diffusers verify`: run the levels in order, and give the verdict."""

from __future__ import annotations

import hashlib
import json
import time
from collections.abc import Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, nullcontext
from dataclasses import replace
from importlib.metadata import version
from os import PathLike
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Literal

from kcv2diffusers.diffusion import PIXELS_PER_LATENT
from kcv2diffusers.errors import Error
from kcv2diffusers.maps.parts import family_of, label
from kcv2diffusers.maps.parts import parts as all_parts
from kcv2diffusers.pipeline.scheduler import deviations
from kcv2diffusers.pipeline_files import MODEL_INDEX
from kcv2diffusers.progress import StageProgress, silent_stages
from kcv2diffusers.sources.gather import SourcePath
from kcv2diffusers.sources.locate import locate_all
from kcv2diffusers.verification import weights
from kcv2diffusers.verification.exchange import Arrays, require, run_side
from kcv2diffusers.verification.inputs import BLOCK_SIZE, initial_noise, module_inputs
from kcv2diffusers.verification.parts import adapter
from kcv2diffusers.verification.preset import write_preset
from kcv2diffusers.verification.request import MULTIPLE, PROMPTS, Gelu, Request
from kcv2diffusers.verification.result import Input, Verified
from kcv2diffusers.verification.settings import check_settings
from kcv2diffusers.verification.sides import Side, noise_of, open_sides, scheduler, source_paths
from kcv2diffusers.verification.single_file import as_pipeline
from kcv2diffusers.verification.tolerances import PSNR, PSNR_ATTRIBUTED

_MOST_LATENTS = 256  # upper limit of the sample_size that a pipeline may state, in latents
_STATED = (".json", ".txt", ".safetensors")  # file types of a pipeline that the report lists


def verify(
    pipeline: SourcePath,
    *sources: SourcePath,
    base: SourcePath | Sequence[SourcePath] = (),
    variant: str | None = None,
    level: Literal["weights", "modules", "images"] = "images",
    reference: Literal["builtin", "keras-cv", "keras-hub"] | None = None,
    prompts: Sequence[str] = PROMPTS,
    steps: int = 25,
    guidance: float = 7.5,
    seeds: int = 3,
    size: int | None = None,
    gelu: Gelu | None = None,
    unet_gelu: Gelu = "tanh",
    prediction_type: str | None = None,
    report: SourcePath | None = None,
    progress: StageProgress = silent_stages,
    **parts: SourcePath | None,
) -> Verified:
    """Compare a pipeline with the checkpoints it was made of.

    `pipeline` is a folder, hf://user/repo, or a single file, which diffusers reads. `sources` are the
    checkpoints. `parts` give the source of a single part, such as `unet`. `base` is where the conversion took
    the other parts from. `variant` is the preferred variant of the pipeline's weight files. `level` is the
    last level to check: weights, modules or images. `reference` is the Keras side: our models, or the own
    classes of KerasCV or KerasHub (default: our models, for Stable Diffusion 3 those of KerasHub). Images are
    generated for each of `prompts` with `seeds` seeds, in `steps` steps at the guidance scale `guidance`,
    `size` pixels high and wide (default: the pipeline's own). `gelu` is the activation of an SD2 text encoder
    (default: as the conversion infers it). `unet_gelu` is the GELU of the Keras UNet. `prediction_type` is
    what the UNet predicts (default: as its source states).

    A level above weights runs the Keras side, on the backend of KERAS_BACKEND (default: torch), then the
    diffusers side, each in its own process. Parts with missing or wrong tensors are left out. `report` is a
    folder for report.html and report.json.

    Raises Error with a message for the user if there is nothing to compare, a source cannot be read, or a
    package is missing. A wrong pipeline is a result, not an error.
    """
    if unknown := parts.keys() - all_parts().keys():
        raise TypeError(f"verify() got an unexpected keyword argument {min(unknown)!r}")
    request = Request(
        pipeline=str(pipeline),
        sources=list(map(str, sources)),
        named={part: str(source) for part, source in parts.items() if source is not None},
        base=[str(base)] if isinstance(base, (str, PathLike)) else list(map(str, base)),
        variant=variant,
        gelu=gelu,
        unet_gelu=unet_gelu,
        prediction_type=prediction_type,
        reference=reference,
        level=level,
        prompts=list(prompts),
        steps=steps,
        guidance=guidance,
        seeds=seeds,
        size=size,
    )
    require_packages(request, report)
    path = locate_all(pipeline, pipelines=True, variant=request.variant)[0]
    single = path.is_file() and path.suffix == ".safetensors"
    with as_pipeline(path, request, progress) if single else nullcontext(path) as folder:
        return _verify(replace(request, pipeline=str(folder)), report, progress)


def _verify(request: Request, report: SourcePath | None, progress: StageProgress) -> Verified:
    """Verify a pipeline folder."""
    seconds: dict[str, float] = {}
    with _timed(seconds, "weights"):
        sides = open_sides(request)
        request = _with_reference(request, sides)
        compared = weights.compare(sides, _megabytes(progress))
        wanted = scheduler(request, sides)
        settings = check_settings(Path(request.pipeline), sides, source_paths(request), wanted)
    result = Verified(
        request=request,
        sources={part: str(side.source.source.path) for part, side in sides.items() if side.given},
        weights=compared,
        settings=settings,
        versions={name: version(name) for name in ("kcv2diffusers", "numpy", "safetensors")},
        seconds=seconds,
    )
    if request.reaches("modules"):
        with TemporaryDirectory(prefix="kcv2diffusers-verify-") as work:
            _run_sides(Path(work), request, sides, result, progress)
            if report is not None:
                _write_report(Path(report), Path(work), result, sides, progress)
    elif report is not None:
        _write_report(Path(report), None, result, sides, progress)
    return result


def require_packages(request: Request, report: SourcePath | None) -> None:
    """Raise Error if a required package is not installed, or if the report would replace a file."""
    if request.reaches("modules"):
        require("keras", "torch", "diffusers", "transformers")
    if request.reaches("images"):
        require("skimage")
    if report is not None:
        require("jinja2", "PIL")
        if Path(report).exists() and not Path(report).is_dir():
            raise Error(f"{report}: is a file.\nGive --report a folder.")
    if request.reaches("modules") and request.reference in _CLASSES:
        packages, refusal = _CLASSES[request.reference]
        try:
            require(*packages)
        except Error:
            raise Error(refusal) from None


# The packages that the own classes of a Keras library need, and what is said without them.
_CLASSES = {
    "keras-cv": (
        ("tensorflow", "keras_cv"),
        "--reference keras-cv runs KerasCV's own classes, which need TensorFlow.\n"
        "pip install tensorflow keras-cv, or use --reference builtin.",
    ),
    "keras-hub": (
        ("keras_hub", "tensorflow_text"),
        "KerasHub, whose own classes are run, is not installed.\n"
        "pip install 'kcv2diffusers[keras-hub]', or use --level weights.",
    ),
}
_SIDES = {"builtin": "keras_side", "keras-cv": "keras_side", "keras-hub": "keras_hub_side"}
"""The module of the Keras side."""


def _with_reference(request: Request, sides: Mapping[str, Side]) -> Request:
    """The request with its Keras side. Raises Error if it cannot be run on these parts."""
    family = family_of(sides)
    reference = request.reference or family.references[0]
    if reference not in family.references:
        raise Error(
            f"--reference {reference}: not for {family.label}.\n"
            f"Use --reference {' or '.join(family.references)}."
        )
    request = replace(request, reference=reference)
    require_packages(request, None)
    if reference == "keras-hub" and request.reaches("modules"):
        lacking = [part for part in family.parts if part not in sides and part not in family.optional]
        if lacking:
            raise Error(
                f"{request.pipeline}: has no {label(lacking[0])}; KerasHub's models need a whole pipeline.\n"
                "Use --level weights."
            )
    _check_reference(request, sides)
    _check_size(request, sides)
    return request


def _check_reference(request: Request, sides: Mapping[str, Side]) -> None:
    """Raise Error if KerasCV's classes cannot be models of these sizes, or its sampler of this schedule."""
    if (
        request.reaches("images")
        and request.reference == "keras-cv"
        and (stated := deviations(*noise_of(request, sides)))
    ):
        entries = ", ".join(f"{name} {value}" for name, value in stated.items())
        raise Error(
            f"{request.pipeline}: {entries}, which KerasCV's sampler does not support.\n"
            "Use --reference builtin."
        )
    unusual = [side.name for side in sides.values() if not side.source.known]
    if request.reaches("modules") and request.reference == "keras-cv" and unusual:
        raise Error(
            f"{request.pipeline}: has a {unusual[0]} of unusual widths; KerasCV's classes have none.\n"
            "Use --reference builtin."
        )


def _run_sides(
    folder: Path, request: Request, sides: Mapping[str, Side], result: Verified, progress: StageProgress
) -> None:
    """Run the levels above weights, in `folder`."""
    from kcv2diffusers.verification import modules

    size = _size(request, sides)
    sound = {part: side for part, side in sides.items() if part not in result.weights.broken}
    left_out = [label(part) for part in result.weights.broken]
    if left_out:
        result.notes.append(f"Not run, tensors are missing or wrong: {', '.join(sorted(left_out))}.")
    draw = request.reaches("images") and _can_draw(request, sides, result)
    if not draw and request.reaches("images"):
        request = Request(**{**vars(request), "level": "modules"})
    # KerasHub's models are of one size.
    inputs = module_inputs(sound, size if request.reference == "keras-hub" else max(size, BLOCK_SIZE))
    arrays = Arrays(folder / "inputs")
    for part, given in inputs.items():
        for name, values in given.items():
            arrays.save(values, part, name)
    if draw:
        for seed in range(request.seeds):
            arrays.save(initial_noise(size, seed, _latents(sides)), "noise", seed)
    wanted = {part: list(given) for part, given in inputs.items()}
    request.save(folder)
    (folder / "plan.json").write_text(json.dumps({"modules": wanted, "draw": draw, "size": size}))
    result.modules = []
    if not wanted and not draw:
        return
    # The diffusers side needs PyTorch, so it is installed.
    backend = "tensorflow" if request.reference == "keras-cv" else "torch"
    if request.reference == "keras-hub":
        write_preset(folder / "preset", Path(request.pipeline), sides, size)
    for side, module in (("keras", _SIDES[request.reference or ""]), ("diffusers", "diffusers_side")):
        Arrays(folder / side)
        with _timed(result.seconds, f"{side} side"):
            title = "Keras side" if side == "keras" else "diffusers side"
            run_side(module, title, folder, progress, backend)
    told = json.loads((folder / "diffusers" / "results.json").read_text())
    result.versions |= json.loads((folder / "keras" / "versions.json").read_text()) | told["versions"]
    result.modules = modules.measure(folder, sides, wanted)
    if any(side.given and side.source.dtypes != [side.stored.name] for side in sound.values()):
        result.notes.append("The Keras side has the weights rounded as the pipeline stores them.")
    if draw:
        from kcv2diffusers.verification import images

        exact = "unet" in sides and sides["unet"].unet_gelu(request) == "exact"
        found = images.measure(folder, request, family_of(sides).library, exact=exact)
        assert result.images is None
        result.images = found
        own = [side.name for side in sides.values() if not side.given]
        if own:
            result.notes.append(f"For the pictures both sides have the pipeline's own {', '.join(own)}.")


def _can_draw(request: Request, sides: Mapping[str, Side], result: Verified) -> bool:
    """Whether the pipeline can generate images with Keras' timesteps.

    If it cannot, the reason is recorded as a failure. Raises Error if images cannot be compared at all.
    """
    from kcv2diffusers.verification.images import Images

    folder = Path(request.pipeline)
    problem = None
    family = family_of(sides)
    if any(adapter(part) is None for part in family.parts):
        raise Error(f"{folder}: pictures of {family.label} cannot be compared here.\nUse --level weights.")
    required = [part for part in family.parts if part not in family.optional]
    if not (folder / MODEL_INDEX).is_file() or any(part not in sides for part in required):
        raise Error(f"{folder}: not a whole pipeline, which pictures need.\nUse --level modules.")
    if result.weights.broken:
        problem = "not drawn, for tensors that are missing or wrong"
    else:
        classes = [s for s in result.settings if s.startswith("model_index.json") or "_class_name" in s]
        problem = f"not drawn, {classes[0]}" if classes else None
    if problem:
        result.images = Images([], PSNR, PSNR_ATTRIBUTED, [f"pictures: {problem}"])
    return problem is None


def _check_size(request: Request, sides: Mapping[str, Side]) -> None:
    """Raise Error if the table of positions is too small for the requested size."""
    largest = _largest(sides)
    if request.reaches("modules") and largest is not None and (request.size or 0) > largest:
        raise Error(
            f"--image-size {request.size}: the table of positions ends at {largest} pixels.\n"
            f"Give at most {largest}."
        )


def _size(request: Request, sides: Mapping[str, Side]) -> int:
    """Height and width in pixels: as requested, else the pipeline's own within its table of positions."""
    if request.size is not None:
        return request.size
    drawing = sides.get(family_of(sides).scheduler_part or "")
    stated = drawing.component.config.get("sample_size") if drawing else None
    multiple = MULTIPLE[request.reference or "builtin"]
    usual = family_of(sides).image_size
    size = PIXELS_PER_LATENT * stated if type(stated) is int and 0 < stated <= _MOST_LATENTS else usual
    largest = _largest(sides)
    if largest is not None:
        size = min(size, largest)
    return max(multiple, size // multiple * multiple)


def _largest(sides: Mapping[str, Side]) -> int | None:
    """The largest height and width in pixels by the table of positions; None without such a table."""
    drawing = sides.get(family_of(sides).scheduler_part or "")
    dims = drawing.source.dims if drawing else {}
    return PIXELS_PER_LATENT * dims["positions"] * dims["patch"] if "positions" in dims else None


def _latents(sides: Mapping[str, Side]) -> int:
    """The number of channels of latents."""
    return sides[family_of(sides).scheduler_part or ""].source.dims["latent"]


def _megabytes(progress: StageProgress) -> weights.Advance:
    told = 0

    def advance(done: int, total: int) -> None:
        nonlocal told
        if done // 10**6 > told:
            told = done // 10**6
            progress("Comparing weights (MB)", told, total // 10**6, "")

    return advance


@contextmanager
def _timed(seconds: dict[str, float], name: str) -> Iterator[None]:
    started = time.monotonic()
    yield
    seconds[name] = round(time.monotonic() - started, 2)


def _write_report(
    target: Path, folder: Path | None, result: Verified, sides: Mapping[str, Side], progress: StageProgress
) -> None:
    from kcv2diffusers.verification.report import write

    sources = {side.source.source.path for side in sides.values() if side.given}
    pipeline = [p for p in sorted(Path(result.request.pipeline).rglob("*")) if p.suffix in _STATED]
    result.inputs = _hashes([*sorted(sources), *pipeline], progress)
    result.report = target / "report.html"
    write(target, folder, result)


def _hashes(paths: Sequence[Path], progress: StageProgress) -> list[Input]:
    """Size and SHA-256 of each file; for a folder (a SavedModel), of each file in it."""
    files: list[Path] = []
    for path in paths:
        if path.is_file():
            files.append(path)
        elif path.is_dir():
            files += [inner for inner in sorted(path.rglob("*")) if inner.is_file()]
        else:  # the prefix of a TensorFlow checkpoint
            files += sorted(path.parent.glob(path.name + ".*"))
    found = []
    with ThreadPoolExecutor() as pool:  # hashing releases the GIL
        for done, (path, digest) in enumerate(zip(files, pool.map(_sha256, files), strict=True), 1):
            progress("Hashing files", done, len(files), "")
            found.append(Input(path, path.stat().st_size, digest))
    return found


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
