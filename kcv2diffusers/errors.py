"""Exceptions, with messages of one or two lines for the user.

Every expected failure in the package is an `Error`. The command line prints its text and exits with code 1.
An OSError is reported in the same way. Any other exception that reaches the command line is a bug and keeps
its traceback.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator
from contextlib import contextmanager
from pathlib import Path


def plain(text: object, keep: str = "") -> str:
    """Return the text with every non-printable character escaped, except the characters of `keep`.

    Names from files and servers are untrusted: they must not control the terminal or fake another line.
    """
    return "".join(c if c.isprintable() or c in keep else ascii(c)[1:-1] for c in str(text))


def is_unicode(text: str) -> bool:
    """Return whether a text is valid Unicode. Python represents bytes that are not UTF-8 as surrogates."""
    return not any("\ud800" <= c <= "\udfff" for c in text)


class Error(Exception):
    """An expected failure. The message tells the user what is wrong and what to do about it."""


def one_line(error: Exception) -> str:
    """Return the message of an error as one line: each of its lines is a sentence."""
    lines = [" ".join(line.split()) for line in str(error).splitlines()]
    ended = (line if line[-1] in ".:;,!?" else f"{line}." for line in lines[:-1] if line)
    return " ".join([*ended, *lines[-1:]])


def no_choice(option: str, given: object, choices: Iterable[str]) -> Error:
    """Return the Error for a value that is not one of the choices."""
    known = list(choices)
    return Error(f"{option} {given}: choose one of {', '.join(known)}.{meant(given, known)}")


def meant(given: object, choices: Iterable[str]) -> str:
    """Return " Did you mean X?" for the choice closest to `given`, "" if none is close."""
    from difflib import get_close_matches

    near = get_close_matches(str(given).lower(), list(choices), 1)
    return f" Did you mean {near[0]}?" if near else ""


class SourceError(Error):
    """A file that cannot be read as a checkpoint: damaged, malicious or of an unknown format."""

    def __init__(self, path: str | Path, problem: str, remedy: str = "Copy or download it again.") -> None:
        super().__init__(f"{plain(path)}: {plain(problem)}\n{plain(remedy)}")
        self.path, self.problem, self.remedy = path, problem, remedy

    def __reduce__(self) -> tuple[type[SourceError], tuple[str | Path, str, str]]:
        return type(self), (self.path, self.problem, self.remedy)  # workers send it to the parent process


def pipeline_given(source: str | Path) -> SourceError:
    """Return the error for a diffusers pipeline where Keras checkpoints are expected."""
    problem = "a diffusers pipeline, not a Keras checkpoint."
    return SourceError(source, problem, "Give it with --base, or to to-keras.")


@contextmanager
def reading(path: Path) -> Iterator[None]:
    """Turn an OSError about `path`, or about a file below it, into a SourceError."""
    try:
        yield
    except OSError as error:
        problem = f"cannot be read: {error.strerror or error}."
        raise SourceError(error.filename or path, problem, "Check the path and its permissions.") from error


class PlanError(Error):
    """A checkpoint whose tensors do not match its weight map. The text is the grouped report."""


class TargetError(Error):
    """The output cannot be written: it exists already, the disk is full, or permission is denied."""


_DISTRIBUTIONS = {"PIL": "pillow", "skimage": "scikit-image", "keras_cv": "keras-cv"}
"""Distribution names of packages whose import name differs."""


class MissingExtra(Error):
    """A package that one of our extras or the Keras backend needs is not installed."""

    def __init__(self, package: str, extra: str) -> None:
        if package in ("tensorflow", "jax", "torch"):
            remedy = f"Install it, or set KERAS_BACKEND to one that is installed (now: {package})."
        else:
            remedy = f"pip install 'kcv2diffusers[{extra}]'"
        name = _DISTRIBUTIONS.get(package, package)
        super().__init__(f"{name} is not installed.\n{remedy}")
