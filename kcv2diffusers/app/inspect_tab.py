"""The Inspect tab: what files hold, in the words of `inspect`."""

from __future__ import annotations

from typing import Any

import gradio as gr

from kcv2diffusers.app import recognised
from kcv2diffusers.app.fields import (
    HEAVY,
    LIGHT,
    Updates,
    follow,
    in_turn,
    log_field,
    source_fields,
    sources,
    stopping,
    token_of,
    visitor,
)
from kcv2diffusers.app.folders import Root
from kcv2diffusers.errors import Error

TAB = "inspect"


def inspect_tab(root: Root, access_token: Any) -> None:
    """Build the tab, with its events."""
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            address, files = source_fields()
            with gr.Row():
                look = gr.Button("Inspect", variant="primary", min_width=90)
                stop = gr.Button("Stop", variant="stop", min_width=90)
        with gr.Column(min_width=320):
            parts = gr.Textbox(label="Parts", interactive=False, lines=4, max_lines=12)
            details = gr.Textbox(label="Details", interactive=False, lines=6, max_lines=30)
            log = log_field()

    def inspected(
        request: gr.Request, oauth: gr.OAuthToken | None, access: str, address: str, files: Any
    ) -> Updates:
        session = visitor(root, request)
        token = token_of(request, oauth, access)
        folder = session.place("inspect")
        words = sources(session, address, files, folder)
        job = session.run(["inspect", *words, "--json"], folder, token=token)
        yield from follow(job, log)
        found = job.printed() or job.result()
        if not found:
            raise Error("Nothing was recognised.")
        refused = [f"{job.reason()}\n"] if job.code else []
        told = [*refused, *map(recognised.details, found)]
        yield {parts: recognised.summary(found), details: "\n\n".join(told)}

    given_fields = [access_token, address, files]
    gr.on(look.click, in_turn(root, TAB, log, inspected), given_fields, [parts, details, log], **HEAVY)
    gr.on(stop.click, stopping(root, TAB), None, None, **LIGHT)
