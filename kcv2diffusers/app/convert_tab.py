"""The Convert tab: what was recognised, the conversion, and the pictures of both sides with the verdict."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from kcv2diffusers.app import given, pictures, recognised
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
    pictures_field,
    source_fields,
    sources,
    stopping,
    token_of,
    visitor,
)
from kcv2diffusers.app.folders import Root, Session
from kcv2diffusers.app.result_panel import result_panel, verdict_of
from kcv2diffusers.errors import Error
from kcv2diffusers.json_text import write_json
from kcv2diffusers.pipeline_files import VERIFICATION_FILE

# What the choices stand for: options of `convert`, the level of `verify`.
DTYPES = {"as stored": [], **{name: ["--dtype", name] for name in ("float32", "float16", "bfloat16")}}
PREDICTIONS = {
    "that of the model": [], **{name: ["--prediction-type", name] for name in ("epsilon", "v_prediction")}
}  # fmt: skip
GELUS: dict[str, list[str]] = {"exact": [], "tanh (trained with keras-cv 0.6.4 or newer)": ["--gelu", "tanh"]}
LEVELS = {
    "Pictures of both sides": "images",
    "Each network on the same input": "modules",
    "Weights only": "weights",
    "Nothing": "",
}
PROMPT = "a photograph of a fox in the snow"
_FEW_STEPS, _MOST_STEPS = 10, 100
TAB = "convert"
_PIPELINE, _REPORT = "pipeline", "report"


def inspect(session: Session, words: Sequence[str], folder: Path, log: Any, token: str | None) -> Updates:
    """Run `inspect`; what it found is in `session.kept["inspected"]`. A file it cannot read is an Error."""
    session.kept["inspected"] = []
    job = session.run(["inspect", *words, "--json"], folder, token=token)
    yield from follow(job, log)
    found = job.printed()
    if not found:
        job.result()
        raise Error("Nothing was recognised.")
    session.kept["inspected"] = found


def convert_tab(root: Root, access_token: Any) -> None:
    """Build the tab, with its events."""
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            address, files = source_fields()
            base = gr.Textbox(
                label="Base of the missing parts", placeholder="user/name",
                info="An id on the Hub, or tiny. Empty: the default base of the version.", max_lines=1,
            )  # fmt: skip
            with gr.Accordion("Options", open=False):
                dtype = picked(DTYPES, "Dtype of the weights")
                prediction = picked(PREDICTIONS, "Prediction type")
                gelu = picked(GELUS, "GELU of an SD2 text encoder")
                sibling = gr.Checkbox(label="Text encoder from the repository beside (name-text-encoder)")
                ema = gr.Checkbox(label="Averaged UNet of a single file (EMA)")
            with gr.Accordion("Verification", open=False):
                level = picked(LEVELS, "Compare at the end")
                prompt = gr.Textbox(label="Prompt of the pictures", value=PROMPT)
                steps = gr.Slider(1, _MOST_STEPS, _FEW_STEPS, step=1, label="Denoising steps")
            with gr.Row():
                look = gr.Button("Inspect", min_width=90)
                start = gr.Button("Convert", variant="primary", min_width=90)
                stop = gr.Button("Stop", variant="stop", min_width=90)
        with gr.Column(min_width=320):
            parts = gr.Textbox(label="Recognised", interactive=False, lines=4, max_lines=12)
            missing = gr.Textbox(label="Missing parts", interactive=False, lines=1, max_lines=4)
            log = log_field()
            verdict = gr.Textbox(label="Verdict", interactive=False, lines=2, max_lines=10)
            gallery = pictures_field("Keras, diffusers, and their difference", columns=3)
            panel = result_panel(root, TAB, "converted", access_token)

    def described(session: Session, named: str | None) -> dict[Any, Any]:
        found = session.kept["inspected"]
        return {parts: recognised.summary(found), missing: recognised.needs(found, named)}

    def inspected(
        request: gr.Request, oauth: gr.OAuthToken | None, access: str, address: str, files: Any, base: str
    ) -> Updates:
        session = visitor(root, request)
        named = given.source(base, "Base") if base.strip() else None
        token = token_of(request, oauth, access)
        folder = session.place("inspect")
        yield from inspect(session, sources(session, address, files, folder), folder, log, token)
        yield described(session, named)

    def converted(
        request: gr.Request, oauth: gr.OAuthToken | None, access: str, address: str, files: Any, base: str,
        dtype: str, prediction: str, gelu: str, sibling: bool, ema: bool, level: str, prompt: str,
        steps: float,
    ) -> Updates:  # fmt: skip
        session = visitor(root, request)
        named = given.source(base, "Base") if base.strip() else None
        token = token_of(request, oauth, access)
        options = [
            *choice(dtype, DTYPES, "Dtype"),
            *choice(prediction, PREDICTIONS, "Prediction type"),
            *choice(gelu, GELUS, "GELU"),
        ]
        read = [*(["--with-sibling"] if sibling else []), *(["--ema"] if ema else [])]
        compared = choice(level, LEVELS, "Compare at the end")
        drawn = given.prompt(prompt, "Prompt") or PROMPT
        count = given.whole(steps, "Denoising steps", 1, _MOST_STEPS)
        folder = session.place("convert")
        words = sources(session, address, files, folder)
        yield {**panel.nothing(), verdict: "", gallery: filled()}
        yield from inspect(session, words, folder, log, token)
        yield described(session, named)
        origin = named or recognised.base_of(session.kept["inspected"])
        based = ["--base", origin] if origin else []
        job = session.run(
            ["convert", *words, *based, *options, *read, "--out", _PIPELINE, "--json"], folder, token=token
        )
        yield from follow(job, log)
        job.result()
        if compared:
            told = [job.last_lines()]
            verifying = [
                "verify", _PIPELINE, *words, *based, *options[2:], "--level", compared,
                f"--prompt={drawn}", "--steps", str(count), "--images-per-prompt", "1",
                "--report", _REPORT, "--json",
            ]  # fmt: skip
            job = session.run(verifying, folder, token=token)
            yield from follow(job, log, told)
            yield _compared(session, job.printed() or job.result(), folder, verdict, gallery)
        yield panel.show(session, folder / _PIPELINE)

    shown = [parts, missing, log]
    given_fields = [access_token, address, files, base]
    options = [dtype, prediction, gelu, sibling, ema, level, prompt, steps]
    everything = [*shown, verdict, gallery, *panel.outputs]
    gr.on(look.click, in_turn(root, TAB, log, inspected), given_fields, shown, **HEAVY)
    gr.on(start.click, in_turn(root, TAB, log, converted), [*given_fields, *options], everything, **HEAVY)
    gr.on(stop.click, stopping(root, TAB), None, None, **LIGHT)


def _compared(session: Session, found: Any, folder: Path, verdict: Any, gallery: Any) -> dict[Any, Any]:
    """The updates with the verdict of a verification and its pictures; its figures go into the model card."""
    write_json(folder / _PIPELINE / VERIFICATION_FILE, found)
    drawn = pictures.of_report(folder / _REPORT / "report.html", folder / "pictures")
    shown = [(session.hand_out(path), caption) for path, caption in drawn]
    return {verdict: verdict_of(folder / _PIPELINE), gallery: filled(shown)}
