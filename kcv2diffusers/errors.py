"""What can go wrong, and the one or two lines a user reads when it does.

Every refusal in the package is an `Error`; the command line prints its text and exits with code 1.
Anything else that reaches the command line, what the system says about files excepted, is a bug and keeps
its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def plain(text: object, keep: str = "") -> str:
    """The text as one that cannot control a terminal, or look like another line: whatever is not printable is
    spelled out, but for the characters of `keep`. For names, which others may have chosen.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in str(text))


def is_unicode(text: str) -> bool:
    """Whether all of a text is; Python keeps bytes that are not UTF-8 as surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


class Error(Exception):
    """A refusal with a message for the user: what is wrong and what to do about it."""


def no_choice(option: str, given: object, choices: Iterable[str]) -> Error:
    """The refusal of a value that is none of the choices."""
    known = list(choices)
    return Error(f"{option} {given}: choose one of {', '.join(known)}.{meant(given, known)}")


def meant(given: object, choices: Iterable[str]) -> str:
    """A question for the end of a line: the choice that may be meant, if one is near."""
    from difflib import get_close_matches

    near = get_close_matches(str(given).lower(), list(choices), 1)
    return f" Did you mean {near[0]}?" if near else ""


class SourceError(Error):
    """A file that cannot be read as a checkpoint: damaged, hostile, or of a kind nobody writes."""

    def __init__(self, path: str | Path, problem: str, remedy: str = "Copy or download it again.") -> None:
        super().__init__(f"{plain(path)}: {plain(problem)}\n{plain(remedy)}")
        self.path, self.problem, self.remedy = path, problem, remedy

    def __reduce__(self) -> tuple[type[SourceError], tuple[str | Path, str, str]]:
        return type(self), (self.path, self.problem, self.remedy)  # it crosses from process to process


def pipeline_given(source: str | Path) -> SourceError:
    """The refusal of a diffusers pipeline where Keras checkpoints are expected."""
    problem = "a diffusers pipeline, not a Keras checkpoint."
    return SourceError(source, problem, "Give it with --base, or to to-keras.")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """What the system says about `path`, or about a file below it, as a SourceError."""
    try:
        yield
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}."
        raise SourceError(error.filename or path, problem, "Check the path and its permissions.") from error


class PlanError(Error):
    """A checkpoint whose tensors do not fit its table; the text is the grouped report."""


class TargetError(Error):
    """The output cannot be written: it exists, the disk is full, permission is missing."""


_DISTRIBUTIONS = {"PIL": "pillow", "skimage": "scikit-image", "keras_cv": "keras-cv"}
"""What pip calls packages that are imported by another name."""


class MissingExtra(Error):
    """A package is not installed that one of our extras, or Keras' backend, needs."""

    def __init__(self, package: str, extra: str) -> None:
        if package in ("tensorflow", "jax", "torch"):
            remedy = f"Install it, or set KERAS_BACKEND to one that is installed (now: {package})."
        else:
            remedy = f"pip install 'kcv2diffusers[{extra}]'"
        name = _DISTRIBUTIONS.get(package, package)
        super().__init__(f"{name} is not installed.\n{remedy}")
