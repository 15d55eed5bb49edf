"""What the tabs share: the fields of a source, the events of the queue, progress and errors of a command."""

from __future__ import annotations

import html
from collections.abc import Callable, Iterator, Sequence
from functools import wraps
from pathlib import Path
from typing import Any

import gradio as gr

from kcv2diffusers.app import given
from kcv2diffusers.app.folders import Root, Session
from kcv2diffusers.app.jobs import Job
from kcv2diffusers.app.own_files import COOKIE
from kcv2diffusers.errors import Error

# Events that wait for their turn (`in_turn`). Events are for the page only, not for programs.
HEAVY = {"concurrency_limit": None, "api_visibility": "private"}
# Beside them, because it takes seconds.
LOOK = {**HEAVY, "concurrency_limit": 1, "concurrency_id": "look"}
# At once, while a command runs.
LIGHT = {"queue": False, "api_visibility": "private"}

UPLOADS = "uploads"
# Files that only their folder explains: TensorFlow checkpoints, sharded weights of Keras.
_IN_FOLDERS = (".index", ".weights.json")
_BESIDE = (".json", ".txt", ".gz")  # not weights themselves

Updates = Iterator[dict[Any, Any]]


def source_fields() -> tuple[Any, Any]:
    """The two fields of a model: an id on the Hub, and files."""
    address = gr.Textbox(
        label="Model on the Hub", placeholder="user/name", info="An id, or tiny for the base that ships.",
        max_lines=1,
    )  # fmt: skip
    files = gr.File(label="Model files", file_count="multiple", height=140)
    return address, files


def pictures_field(label: str, **options: Any) -> Any:
    """A gallery of results; hidden as long as there are none, see `filled`."""
    return gr.Gallery(
        label=label, interactive=False, object_fit="contain", visible=False, elem_classes="pictures",
        **{"height": "auto", "buttons": ["download", "fullscreen"], **options},
    )  # fmt: skip


def filled(values: Sequence[Any] = ()) -> Any:
    """The update of a gallery or of downloads: they are hidden without values."""
    return gr.update(value=[*values] or None, visible=bool(values))


def sources(session: Session, address: str, files: list[str] | None, folder: Path) -> list[str]:
    """The sources of a command that runs in `folder`, from the two fields. Uploads are put there.

    Raises Error if both fields are empty.
    """
    found = given.sources(address or "")
    names = session.take(files, folder / UPLOADS)
    weights = [name for name in names if not name.endswith(_BESIDE)]
    if any(name.endswith(_IN_FOLDERS) for name in names):
        found.append(UPLOADS)
    else:
        found += [f"{UPLOADS}/{name}" for name in weights]
    if not found:
        raise Error("Give a model: an id on the Hub, or files.")
    return found


def log_field() -> Any:
    """The field with the command line and what the command says."""
    return gr.Textbox(
        label="Commands and progress", lines=4, max_lines=40, interactive=False, autoscroll=True,
        elem_classes="log",
    )  # fmt: skip


def follow(job: Job, log: Any, before: Sequence[str] = ()) -> Updates:
    """Updates of the field `log` while a command runs. `before` are the lines of earlier commands."""
    shown = ""
    for _ in job.follow():
        if (text := "\n".join([*before, job.last_lines()])) != shown:
            shown = text
            yield {log: text}
    yield {log: "\n".join([*before, job.last_lines()])}


def picked(choices: dict[str, Any], label: str) -> Any:
    """A field for one of the choices, of which the first is the default."""
    return gr.Dropdown([*choices], label=label, value=next(iter(choices)))


def choice(value: str, choices: dict[str, Any], label: str) -> Any:
    """What a choice stands for. Raises Error for a value that the field does not offer."""
    if value not in choices:
        raise Error(f"{label}: choose one of {', '.join(choices)}.")
    return choices[value]


def reported(handler: Callable[..., Updates]) -> Callable[..., Updates]:
    """The handler, with an Error shown on the page instead of a traceback in the server's log."""

    @wraps(handler)
    def shown(*values: Any) -> Updates:
        try:
            yield from handler(*values)
        except Error as error:
            message = html.escape(str(error)).replace("\n", "<br>")
            raise gr.Error(message, duration=None, print_exception=False) from None

    return shown


def in_turn(root: Root, tab: str, log: Any, handler: Callable[..., Updates]) -> Callable[..., Updates]:
    """The handler as work of the line: `log` shows how many are before it. Errors are `reported`.

    Its first argument is Gradio's request.
    """

    @wraps(handler)
    def waiting(request: gr.Request, *values: Any) -> Updates:
        session = visitor(root, request)
        with root.line.join(session, tab) as turn:
            for before in root.line.wait(turn):
                waits = "1 command is" if before == 1 else f"{before} commands are"
                yield {log: f"Waiting: {waits} before this one. Stop takes it out of the queue."}
            if turn.stopped:
                yield {log: "Stopped while it waited. It was not begun."}
                return
            with session.working(turn):
                yield from handler(request, *values)

    return reported(waiting)


def stopping(root: Root, tab: str) -> Callable[[gr.Request], None]:
    """The handler of a tab's Stop."""

    def stopped(request: gr.Request) -> None:
        visitor(root, request).stop(tab)

    return stopped


def visitor(root: Root, request: gr.Request) -> Session:
    """Whose request it is."""
    return root.session(request.session_hash, request.cookies.get(COOKIE))


def token_of(request: Any, oauth: Any, typed: str | None) -> str | None:
    """The visitor's token: of their login on a Space, or typed in. None: the computer's own, if it is local.

    Raises Error for characters that no token has.
    """
    token = oauth.token if oauth is not None else (typed or "").strip()
    if token and not (token.isascii() and token.isprintable() and " " not in token and len(token) < 1000):
        raise Error("The access token holds a space or a sign that no token has.")
    return token or None
