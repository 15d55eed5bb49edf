"""Files for the browser they were made for: a cookie tells one browser from another.

Gradio gives a file to everyone who has its address. Addresses cannot be guessed, but they may be passed on.
A browser that keeps no cookies, such as one that shows a Space inside another page, relies on that alone.
"""

from __future__ import annotations

import secrets
from typing import Any
from urllib.parse import unquote

from starlette.requests import HTTPConnection

from kcv2diffusers.app.folders import Root

COOKIE = "kcv2diffusers"


class OwnFiles:
    """A layer around the server, for ASGI. It answers 404 to a browser that asks for another's file."""

    def __init__(self, app: Any, root: Root) -> None:
        self._app, self._root = app, root

    async def __call__(self, scope: Any, receive: Any, send: Any) -> None:
        """Answer a request, or let the server do it."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        browser = HTTPConnection(scope).cookies.get(COOKIE)
        if not self._root.may_read(unquote(scope["path"]), browser):
            await send({"type": "http.response.start", "status": 404, "headers": []})
            await send({"type": "http.response.body", "body": b""})
            return

        async def sent(message: Any) -> None:
            if browser is None and message["type"] == "http.response.start":
                words = f"{COOKIE}={secrets.token_hex(16)}; Path=/; HttpOnly; SameSite=Lax"
                message = {**message, "headers": [*message["headers"], (b"set-cookie", words.encode())]}
            await send(message)

        await self._app(scope, receive, sent if scope["path"] == "/" else send)
