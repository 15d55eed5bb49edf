"""The connection to the Hub, and everything it can refuse in a line or two. No message holds a token."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING

from kcv2diffusers.errors import Error, MissingExtra
from kcv2diffusers.system.interruption import ends_at_once

if TYPE_CHECKING:
    from huggingface_hub import HfApi

_TOKEN = re.compile(r"hf_\w+|(?<=Bearer )[^\s'\"]+")
NOT_LOGGED_IN = "Log in with `hf auth login`, set HF_TOKEN, or give --token."
_AGAIN = "Try again later; what has been transferred is kept."
_BY_STATUS = {
    401: ("the Hub does not accept this token", NOT_LOGGED_IN),
    403: ("your token has no right to do this", "Use a token with write access, and a name of your own."),
    404: ("there is no such repository, or it is private", f"Check the name. {NOT_LOGGED_IN}"),
    409: ("somebody else changes the repository at this moment", _AGAIN),
    413: ("the Hub finds a file too large", "Convert with --dtype float16."),
    429: ("the Hub's rate limit is reached", _AGAIN),
}
_REFUSED = ("the Hub refuses it", "Change what it names, and try again.")
_BROKEN = ("the Hub has an internal error", _AGAIN)


class Unreachable(Error):
    """The Hub cannot be asked: no network, it is down, or HF_HUB_OFFLINE is set; `reason` says which."""

    def __init__(self, what: str, reason: str, remedy: str) -> None:
        super().__init__(f"{what}: {reason}.\n{remedy}")
        self.reason = reason


class NotThere(Error):
    """The repository, or the revision or file in it, does not exist (or nobody may see it)."""


class NoRevision(NotThere):
    """The repository has no such branch, tag or commit."""


def require_hub() -> None:
    """Raise Error if huggingface_hub is not installed."""
    try:
        import huggingface_hub  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "hub") from error


def connect(token: str | None = None) -> HfApi:
    """The library's client, with `token` or the one of HF_TOKEN or `hf auth login`. Raises Error if
    huggingface_hub is not installed or the token cannot be one.
    """
    require_hub()
    import huggingface_hub
    from huggingface_hub.utils import logging
    from huggingface_hub.utils.tqdm import disable_progress_bars

    from kcv2diffusers.environment import own_version

    logging.set_verbosity_error()  # type: ignore[no-untyped-call]
    if not sys.stderr.isatty():
        disable_progress_bars()
    token = token or huggingface_hub.get_token()
    if token is not None and not re.fullmatch("[!-~]+", token):
        raise Error(f"The token holds a space or a sign that no token has.\n{NOT_LOGGED_IN}")
    return huggingface_hub.HfApi(token=token, library_name="kcv2diffusers", library_version=own_version())


def token_of(api: HfApi) -> str | None:
    """The token that a client sends."""
    return api.token if isinstance(api.token, str) else None


def redact(text: str, token: str | None = None) -> str:
    """The text without anything that is, or looks like, a token."""
    if token:
        text = text.replace(token, "<token>")
    return _TOKEN.sub("<token>", text)


@contextmanager
def asking(what: str, token: str | None = None) -> Iterator[None]:
    """Every refusal of the Hub or of the way to it as an Error about `what` (an address, a repository)."""
    import httpx2
    from huggingface_hub import errors

    try:
        with ends_at_once("what has been transferred is kept"):
            yield
    except Error:
        raise
    except (
        httpx2.HTTPError,
        errors.EntryNotFoundError,
        errors.RevisionResolutionError,
        ConnectionError,
        ValueError,
        RuntimeError,
    ) as error:  # not `from error`: what the library says of a request may hold the token
        raise _explained(what, error, token) from None


def _explained(what: str, error: BaseException, token: str | None) -> Error:
    import httpx2
    from huggingface_hub import errors

    cause = error.__cause__
    match error:
        case errors.OfflineModeIsEnabled():
            return Unreachable(what, "HF_HUB_OFFLINE is set", "Unset it to go online.")
        case errors.GatedRepoError():
            remedy = "Open the repository's page, accept its conditions, and log in: `hf auth login`."
            return NotThere(f"{what}: access has to be asked for.\n{remedy}")
        case errors.RepositoryNotFoundError():
            problem, remedy = _BY_STATUS[404]
            return NotThere(f"{what}: {problem}.\n{remedy}")
        case errors.RevisionNotFoundError():
            return NoRevision(f"{what}: there is no such revision.\nCheck the branch, tag or commit.")
        case errors.LocalEntryNotFoundError() | errors.RevisionResolutionError():
            if isinstance(cause, errors.HfHubHTTPError):
                return _explained(what, cause, token)
            return Unreachable(
                what, f"not in the cache as a whole, and {_reason(cause or error)}", "Go online."
            )
        case errors.EntryNotFoundError():
            return NotThere(f"{what}: there is no such file.\nCheck the path.")
        case errors.HfHubHTTPError():
            status = error.response.status_code
            problem, remedy = _BY_STATUS.get(status, _BROKEN if status >= 500 else _REFUSED)
            said = _brief(error.server_message or "", token)
            reason = f"{problem} ({status}{', ' + said if said else ''})"
            if status == 429 or status >= 500:
                return Unreachable(what, reason, remedy)
            return Error(f"{what}: {reason}.\n{remedy}")
        case RuntimeError() if isinstance(cause, httpx2.HTTPError):  # of an upload
            return _explained(what, cause, token)
        case httpx2.HTTPError() | ConnectionError():
            remedy = "Check the connection and try again; what has been transferred is kept."
            return Unreachable(what, _reason(error), remedy)
    return Error(f"{what}: {_brief(str(error), token)}\nCorrect it and try again.")


def _brief(text: str, token: str | None) -> str:
    return redact(" ".join(text.split()), token)[:300]


def _reason(error: BaseException) -> str:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return f"{constants.ENDPOINT.split('://')[-1]} cannot be reached ({type(error).__name__})"
