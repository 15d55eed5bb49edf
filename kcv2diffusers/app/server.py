"""The server of the page: its limits, its temporary folder, its end."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path

from kcv2diffusers.app.folders import Settings, rooted
from kcv2diffusers.errors import Error, MissingExtra

_LOOPBACK = ("127.0.0.1", "localhost", "::1")
_WAITING = 20  # events in Gradio's queue, of those that are no work of the line


def serve(
    *,
    host: str = "127.0.0.1",
    port: int | None = None,
    work: Path | None = None,
    most_gigabytes: float = 8.0,
    minutes: float = 120.0,
    trains: bool = True,
    say: Callable[[str], None] = print,
) -> None:
    """Serve the page until the process is stopped.

    `work` is the folder for temporary files. No file may be larger than `most_gigabytes`, no command takes
    more than `minutes`. `say` is called with the address. Raises Error if Gradio is not
    installed or the port is taken.
    """
    os.environ["GRADIO_ANALYTICS_ENABLED"] = "False"  # no request to another server
    try:
        import gradio
    except ModuleNotFoundError as error:
        raise MissingExtra(str(error.name), "app") from error
    from starlette.middleware import Middleware

    from kcv2diffusers.app.own_files import OwnFiles
    from kcv2diffusers.app.page import CSS, build
    from kcv2diffusers.hub.client import require_hub

    require_hub()
    os.umask(0o077)
    on_a_space = bool(os.environ.get("SPACE_ID"))
    settings = Settings(
        local=host in _LOOPBACK and not on_a_space,
        most_bytes=int(most_gigabytes * 2**30),
        seconds=60 * minutes,
        trains=trains,
    )
    with rooted(work, settings) as root:
        os.environ["GRADIO_TEMP_DIR"] = str(root.cache)
        page = build(root, on_a_space=on_a_space)
        try:
            _, address, _ = page.queue(max_size=_WAITING, api_open=False).launch(
                server_name=host,
                server_port=port,
                share=False,
                quiet=True,
                prevent_thread_lock=True,
                show_error=False,
                footer_links=[],
                max_file_size=settings.most_bytes,
                ssr_mode=False,
                enable_monitoring=False,
                app_kwargs={"middleware": [Middleware(OwnFiles, root=root)]},
                theme=gradio.themes.Default(
                    font=["system-ui", "sans-serif"], font_mono=["ui-monospace", "monospace"]
                ),
                css=CSS,
            )
            say(address)
            page.block_thread()
        except OSError as error:
            raise Error(f"{host}:{port}: {error}\nChoose another --port, or another --host.") from None
        finally:
            page.close()
