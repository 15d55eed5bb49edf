"""The Hub client, and short messages for every error of the Hub and the network. No message has a token."""

from __future__ import annotations

import re
import sys
from collections.abc import Iterator, Mapping
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
    """The Hub does not answer now: no network, server error, rate limit or HF_HUB_OFFLINE.

    `reason` says which. `wait` is the number of seconds that the Hub asks to wait (None: not stated).
    """

    def __init__(self, what: str, reason: str, remedy: str, wait: float | None = None) -> None:
        super().__init__(f"{what}: {reason}.\n{remedy}")
        self.reason, self.wait = reason, wait


class Refused(Error):
    """The token has no right to do this."""


class BadToken(Refused):
    """The Hub does not accept the token, whatever is asked for."""


class NotThere(Error):
    """The repository, or the revision or file in it, does not exist or is not accessible."""


class NoRevision(NotThere):
    """The repository has no such branch, tag or commit."""


def require_hub() -> None:
    """Raise Error if huggingface_hub is not installed."""
    try:
        import huggingface_hub  # noqa: F401
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "hub") from error


def connect(token: str | None = None) -> HfApi:
    """A client of the Hub that sends `token` (default: that of HF_TOKEN or `hf auth login`).

    Raises Error if huggingface_hub is not installed or if the token has characters that no token has.
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
    """The token that a client sends, None if it sends none."""
    return api.token if isinstance(api.token, str) else None


def redact(text: str, token: str | None = None) -> str:
    """Replace `token`, and anything that looks like a token, in `text`."""
    if token:
        text = text.replace(token, "<token>")
    return _TOKEN.sub("<token>", text)


@contextmanager
def asking(what: str, token: str | None = None) -> Iterator[None]:
    """Turn Hub and network errors into `Error`; `what` is the address or repository in the message."""
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
    ) as error:  # not `from error`: the library's message may contain the token
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
            if status in (409, 429) or status >= 500:
                return Unreachable(what, reason, remedy, _retry_after(error.response.headers))
            return {401: BadToken, 403: Refused}.get(status, Error)(f"{what}: {reason}.\n{remedy}")
        case RuntimeError() if isinstance(cause, httpx2.HTTPError):  # an upload
            return _explained(what, cause, token)
        case httpx2.HTTPError() | ConnectionError():
            remedy = "Check the connection and try again; what has been transferred is kept."
            return Unreachable(what, _reason(error), remedy)
    return Error(f"{what}: {_brief(str(error), token)}\nCorrect it and try again.")


def _retry_after(headers: Mapping[str, str]) -> float | None:
    """The seconds of a Retry-After header; None if there is none, or if it holds a date."""
    value = headers.get("Retry-After", "").strip()
    return float(value) if re.fullmatch(r"\d{1,6}", value, re.ASCII) else None


def _brief(text: str, token: str | None) -> str:
    return redact(" ".join(text.split()), token)[:300]


def _reason(error: BaseException) -> str:
    from huggingface_hub import constants

    if constants.is_offline_mode():
        return "HF_HUB_OFFLINE is set"
    return f"{constants.ENDPOINT.split('://')[-1]} cannot be reached ({type(error).__name__})"
