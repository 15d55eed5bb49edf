"""The Train tab: photos, prompts, what it costs; loss and pictures while it runs; stop, resume, export."""

from __future__ import annotations

import os
import shutil
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import gradio as gr

from kcv2diffusers.app import given
from kcv2diffusers.app.fields import (
    HEAVY,
    LIGHT,
    LOOK,
    Updates,
    choice,
    filled,
    follow,
    in_turn,
    log_field,
    picked,
    pictures_field,
    reported,
    stopping,
    token_of,
    visitor,
)
from kcv2diffusers.app.folders import Root, Session
from kcv2diffusers.app.jobs import Job
from kcv2diffusers.app.loss_chart import loss_chart
from kcv2diffusers.app.presets import PRESETS, cost, duration
from kcv2diffusers.app.result_panel import result_panel, verdict_of
from kcv2diffusers.app.training_run import PHOTOS, PIPELINE, Training, progress
from kcv2diffusers.errors import Error
from kcv2diffusers.sources.locate import TINY

TAB = "train"
_ON_THE_HUB, _TINY, _CONVERTED = "A model on the Hub", "The tiny base", "The pipeline of the Convert tab"
BASES = {_ON_THE_HUB: "hub", _TINY: "tiny", _CONVERTED: "converted"}
_MOST_STEPS = 100_000
_NORMAL = 512  # pixels, the resolution of photos shown for a model that is not the tiny base
_TINY_SIDE = 64
_BASE = "base"  # the folder of a base from the Convert tab


def train_tab(root: Root, access_token: Any) -> None:
    """Build the tab, with its events."""
    first = next(iter(PRESETS))
    with gr.Row(equal_height=False):
        with gr.Column(min_width=320):
            base = picked(BASES, "Base to train")
            address = gr.Textbox(label="Base on the Hub", placeholder="user/name", max_lines=1)
            photos = gr.File(
                label="Photos of the subject", file_count="multiple", height=200,
                file_types=["image", ".heic", ".txt", ".jsonl"],
            )  # fmt: skip
            seen = pictures_field("Photos as they are trained", columns=4, height=240, buttons=["fullscreen"])
            about = gr.Textbox(
                label="About the photos", interactive=False, lines=1, max_lines=12, visible=False
            )
            instance = gr.Textbox(
                label="Prompt of the photos", placeholder="a photo of sks dog",
                info="With a rare word that becomes the name of the subject.",
            )  # fmt: skip
            kind = gr.Textbox(
                label="Prompt of the class", placeholder="a photo of a dog",
                info="Without that word. With it, other dogs stay dogs; pictures of them are drawn first.",
            )  # fmt: skip
            preset = gr.Dropdown([*PRESETS], label="What to train", value=first)
            steps = gr.Number(PRESETS[first].options["steps"], precision=0, minimum=1, label="Steps")
            costs = gr.Textbox(
                cost(PRESETS[first], "", PRESETS[first].options["steps"], None), label="What it takes",
                interactive=False, lines=4,
            )  # fmt: skip
            samples = gr.Textbox(
                label="Prompts of pictures on the way", lines=2, placeholder="a photo of sks dog in the snow",
                info="One a line.",
            )  # fmt: skip
            with gr.Accordion("More options", open=False):
                gr.Markdown("0 or empty: as the choice above says.", elem_classes="inside")
                rate = gr.Number(0, label="Learning rate")
                batch = gr.Number(0, precision=0, label="Photos in a step")
                resolution = gr.Number(0, precision=0, label="Resolution in pixels, a multiple of 64")
                classes = gr.Number(0, precision=0, label="Pictures of the class")
                sample_steps = gr.Slider(1, 100, 25, step=1, label="Denoising steps of pictures")
                seed = gr.Number(0, precision=0, label="Random seed")
            with gr.Row():
                start = gr.Button("Train", variant="primary", min_width=90)
                stop = gr.Button("Stop", variant="stop", min_width=90)
                resume = gr.Button("Resume", min_width=90)
                export = gr.Button("Export", min_width=90)
            verifies = gr.Checkbox(
                label="Verify after export",
                info="Compares the pipeline with the checkpoint as verify does, and draws with both.",
            )
        with gr.Column(min_width=320):
            state = gr.Textbox(
                "Not begun", label="State of the training", interactive=False, lines=1, max_lines=3
            )
            chart = gr.HTML(
                label="Loss", show_label=True, container=True, elem_classes="chart", visible=False
            )
            drawn = pictures_field("Pictures on the way", columns=2)
            log = log_field()
            verdict = gr.Textbox(label="Verdict", interactive=False, lines=2, max_lines=10, visible=False)
            panel = result_panel(root, TAB, "trained", access_token)

    def looked(request: gr.Request, files: Any, kind_of_base: str) -> Updates:
        if not files:
            yield {seen: filled(), about: gr.update(value="", visible=False)}
            return
        session = visitor(root, request)
        folder = session.place("photos")
        session.take(files, folder / PHOTOS)
        side = _TINY_SIDE if choice(kind_of_base, BASES, "Base") == "tiny" else _NORMAL
        job = session.run([PHOTOS, "shown", str(side)], folder, module="kcv2diffusers.app.photos")
        list(job.follow())
        found = job.result()
        pictures = [(session.hand_out(folder / each["file"]), each["caption"]) for each in found["photos"]]
        skipped = [f"Not used: {', '.join(found['skipped'])}."] if found["skipped"] else []
        lines = [f"{found['count']} photos.", *skipped, *(each["caption"] for each in found["photos"])]
        yield {seen: filled(pictures), about: gr.update(value="\n".join(lines), visible=True)}

    def priced(kind_of_base: str, preset: str, steps: float) -> str:
        count = int(steps) if isinstance(steps, (int, float)) and 1 <= steps <= _MOST_STEPS else 1
        source = TINY if choice(kind_of_base, BASES, "Base") == "tiny" else ""
        found = choice(preset, PRESETS, "What to train")
        return cost(found, source, count, root.rates.get((source, preset)))

    def chosen(kind_of_base: str, preset: str) -> tuple[int, str]:
        count = choice(preset, PRESETS, "What to train").options["steps"]
        return count, priced(kind_of_base, preset, count)

    def offered(kind_of_base: str, preset: str) -> tuple[Any, str, bool]:
        """No address without the Hub; with the tiny base its preset, and a verification, which is cheap."""
        kind = choice(kind_of_base, BASES, "Base")
        suited = "Tiny base" if kind == "tiny" else first if preset == "Tiny base" else preset
        return gr.update(visible=kind == "hub"), suited, kind == "tiny"

    def trained(
        request: gr.Request, oauth: gr.OAuthToken | None, access: str, kind_of_base: str, address: str,
        photos: Any, instance: str, kind: str, preset: str, steps: float, samples: str, rate: float,
        batch: float, resolution: float, classes: float, sample_steps: float, seed: float,
    ) -> Updates:  # fmt: skip
        session = visitor(root, request)
        token = token_of(request, oauth, access)
        chosen_base = choice(kind_of_base, BASES, "Base")
        named = given.source(address, "Base on the Hub") if chosen_base == "hub" else TINY
        options: dict[str, Any] = {
            **choice(preset, PRESETS, "What to train").options,
            "instance_images": PHOTOS,
            "instance_prompt": _needed(instance, "Prompt of the photos"),
            "class_prompt": given.prompt(kind, "Prompt of the class"),
            "sample_prompt": _prompts(samples),
            "sample_steps": given.whole(sample_steps, "Denoising steps of pictures", 1, 100),
            "seed": given.whole(seed or 0, "Random seed", 0, 2**31 - 1),
        }
        for name, value, label, most in (
            ("batch_size", batch, "Photos in a step", 64),
            ("resolution", resolution, "Resolution", 2048),
            ("num_class_images", classes, "Pictures of the class", 1000),
        ):
            if value:
                options[name] = given.whole(value, label, 1, most)
        if rate:
            options["learning_rate"] = given.number(rate, "Learning rate", 0, 1000)
        if not photos:
            raise Error("Give photos of the subject.")
        count = given.whole(steps, "Steps", 1, _MOST_STEPS)
        folder = session.place("train")
        session.take(photos, folder / PHOTOS)
        if chosen_base == "converted":
            named = _linked(session, folder / _BASE)
        training = Training(folder, {"base": [named], **options}, count)
        del training.options["steps"]
        session.kept["training"] = (training, token, (named if named == TINY else "", preset))
        yield {**nothing(), chart: _charted([]), drawn: filled(), state: "Starting"}
        yield from run(session, training.words())

    def resumed(request: gr.Request, steps: float) -> Updates:
        session = visitor(root, request)
        training = _training(session)
        training.steps = max(given.whole(steps, "Steps", 1, _MOST_STEPS), training.step)
        yield {**nothing(), state: f"Going on after step {training.step}"}
        yield from run(session, training.words(resume=True))

    def nothing() -> dict[Any, Any]:
        return {**panel.nothing(), verdict: gr.update(visible=False)}

    def run(session: Session, words: list[str]) -> Updates:
        training, token, key = session.kept["training"]
        job = session.run(words, training.folder, token=token)
        handed: dict[Path, str] = {}
        for update in follow(job, log):
            yield update | live(session, training, job, handed)
        if (said := _last(job)) is not None:
            root.rates[key] = said.rate
        yield {chart: _charted(training.losses())}
        if job.code and not (job.stopped and training.step):
            yield {state: "Ended with an error"}
            job.result()
        done = "Finished" if not job.code else job.stopped.rstrip(".")
        left = "" if not job.code else " Resume goes on."
        yield {state: f"{done} after step {training.step}.{left} Export makes a pipeline of it."}

    def live(session: Session, training: Training, job: Job, handed: dict[Path, str]) -> dict[Any, Any]:
        update: dict[Any, Any] = {}
        if (said := _last(job)) is not None:
            left = duration((said.steps - said.step) / said.rate) if said.rate else "?"
            update[state] = (
                f"Step {said.step} of {said.steps}, loss {said.loss:.4f}, {said.rate:.2f} steps/s, "
                f"{left} left"
            )
            update[chart] = _charted(training.losses(job.lines()))
        fresh = [path for path, _ in training.samples() if path not in handed]
        if fresh:
            handed |= {path: session.hand_out(path) for path in fresh}
            update[drawn] = filled([(handed[path], step) for path, step in training.samples()])
        return update

    def exported(request: gr.Request, verifies: bool) -> Updates:
        session = visitor(root, request)
        training = _training(session)
        if not training.step:
            raise Error("There is no checkpoint yet.")
        shutil.rmtree(training.folder / PIPELINE, ignore_errors=True)
        yield nothing()
        words = training.words(steps=training.step, resume=True, export=True, verify=verifies)
        job = session.run(words, training.folder, token=session.kept["training"][1])
        yield from follow(job, log)
        pipeline = training.folder / PIPELINE
        done = job.printed()
        if job.stopped or not done:
            job.result()
        told = {verdict: gr.update(visible=True, value=verdict_of(pipeline))} if "verified" in done else {}
        yield panel.show(session, pipeline) | told

    settings = [
        access_token, base, address, photos, instance, kind, preset, steps, samples, rate, batch, resolution,
        classes, sample_steps, seed,
    ]  # fmt: skip
    shown = [state, chart, drawn, log, verdict, *panel.outputs]
    gr.on([photos.change, base.change], reported(looked), [photos, base], [seen, about], **LOOK)
    gr.on(base.change, offered, [base, preset], [address, preset, verifies], **LIGHT)
    gr.on(preset.change, chosen, [base, preset], [steps, costs], **LIGHT)
    gr.on(steps.change, priced, [base, preset, steps], costs, **LIGHT)
    gr.on(start.click, in_turn(root, TAB, log, trained), settings, shown, **HEAVY)
    gr.on(resume.click, in_turn(root, TAB, log, resumed), steps, shown, **HEAVY)
    gr.on(export.click, in_turn(root, TAB, log, exported), verifies, [log, verdict, *panel.outputs], **HEAVY)
    gr.on(stop.click, stopping(root, TAB), None, None, **LIGHT)


def _charted(losses: Sequence[tuple[int, float]]) -> Any:
    """The update of the chart, which is hidden before there is a line."""
    picture = loss_chart(losses)
    return gr.update(value=picture, visible=bool(picture))


def _training(session: Session) -> Training:
    found = session.kept.get("training")
    if found is None:
        raise Error("There is no training yet.")
    training: Training = found[0]
    return training


def _needed(text: str, label: str) -> str:
    found = given.prompt(text, label)
    if not found:
        raise Error(f"{label}: write one.")
    return found


def _prompts(text: str) -> list[str]:
    found = [given.prompt(line, "Prompts of pictures") for line in (text or "").splitlines() if line.strip()]
    if len(found) > 8:
        raise Error("Prompts of pictures: give at most 8.")
    return found


def _linked(session: Session, folder: Path) -> str:
    """The pipeline of the Convert tab as a base, kept even if another conversion replaces it there."""
    pipeline = session.kept.get("converted")
    if pipeline is None or not Path(pipeline).is_dir():
        raise Error("There is no pipeline on the Convert tab yet.")
    shutil.copytree(pipeline, folder, copy_function=os.link)
    return folder.name


def _last(job: Job) -> Any:
    return next((found for line in reversed(job.lines()) if (found := progress(line))), None)
