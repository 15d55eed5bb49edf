"""The LoRA tab: a LoRA file in the format of the other programs."""

from __future__ import annotations

from typing import Any

import gradio as gr

from kcv2diffusers.app.fields import (
    HEAVY,
    LIGHT,
    Updates,
    choice,
    filled,
    follow,
    in_turn,
    log_field,
    picked,
    sources,
    stopping,
    token_of,
    visitor,
)
from kcv2diffusers.app.folders import Root
from kcv2diffusers.errors import Error

TAB = "lora"
NEEDED = "Give one LoRA: an id on the Hub, or a file."
FORMATS = {"kohya, for ComfyUI and A1111": "kohya", "diffusers, for load_lora_weights": "diffusers"}


def lora_tab(root: Root, access_token: Any) -> None:
    """Build the tab, with its events."""
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            address = gr.Textbox(label="LoRA on the Hub", placeholder="user/name", max_lines=1)
            files = gr.File(label="LoRA file", file_types=[".safetensors"], height=140)
            form = picked(FORMATS, "Format to write")
            with gr.Row():
                start = gr.Button("Convert LoRA", variant="primary", min_width=90)
                stop = gr.Button("Stop", variant="stop", min_width=90)
        with gr.Column(min_width=320):
            written = gr.File(label="Converted LoRA", file_count="multiple", interactive=False, visible=False)
            log = log_field()

    def converted(
        request: gr.Request, oauth: gr.OAuthToken | None, access: str, address: str, files: Any, form: str
    ) -> Updates:
        session = visitor(root, request)
        token = token_of(request, oauth, access)
        wanted = choice(form, FORMATS, "Format")
        folder = session.place("lora")
        if not (address or "").strip() and not files:
            raise Error(NEEDED)
        found = sources(session, address, [files] if files else [], folder)
        if len(found) != 1 or found[0].startswith("tiny"):
            raise Error(NEEDED)
        name = f"{wanted}.safetensors"
        yield {written: filled()}
        job = session.run(
            ["convert-lora", found[0], "--format", wanted, "--out", name, "--json"], folder, token=token
        )
        yield from follow(job, log)
        job.result()
        yield {written: filled([session.hand_out(folder / name)])}

    given_fields = [access_token, address, files, form]
    gr.on(start.click, in_turn(root, TAB, log, converted), given_fields, [written, log], **HEAVY)
    gr.on(stop.click, stopping(root, TAB), None, None, **LIGHT)
