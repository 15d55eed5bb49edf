"""The end of a conversion or a training: downloads, and publishing with the visitor's own login."""

from __future__ import annotations

import json
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from kcv2diffusers.app import given
from kcv2diffusers.app.fields import HEAVY, Updates, filled, follow, in_turn, log_field, token_of, visitor
from kcv2diffusers.app.folders import Root, Session
from kcv2diffusers.errors import Error
from kcv2diffusers.pipeline import record
from kcv2diffusers.pipeline_files import CONVERSION_FILE, KOHYA_LORA_FILE, LORA_FILE, VERIFICATION_FILE
from kcv2diffusers.progress import silent
from kcv2diffusers.publish.card_facts import figures

SINGLE_FILE = "model.safetensors"
_HIDDEN = gr.update(value="", visible=False)
_LORAS = (LORA_FILE, KOHYA_LORA_FILE)


@dataclass(frozen=True)
class Panel:
    """The fields of a result. `name` is the entry of `Session.kept` that holds the pipeline's folder."""

    name: str
    root: Root
    box: Any
    files: Any
    pushed: Any

    def nothing(self) -> dict[Any, Any]:
        """The updates that hide an earlier result."""
        return {self.box: gr.update(visible=False), self.files: filled(), self.pushed: _HIDDEN}

    def show(self, session: Session, pipeline: Path) -> dict[Any, Any]:
        """The updates that offer a pipeline folder, with its LoRA files."""
        session.kept[self.name] = pipeline
        session.kept[f"{self.name} files"] = [
            session.hand_out(pipeline / name) for name in _LORAS if (pipeline / name).exists()
        ]
        return {
            self.box: gr.update(visible=True),
            self.files: filled(session.kept[f"{self.name} files"]),
            self.pushed: _HIDDEN,
        }

    @property
    def outputs(self) -> list[Any]:
        """The fields that `nothing` and `show` update."""
        return [self.box, self.files, self.pushed]


def result_panel(root: Root, tab: str, name: str, access_token: Any) -> Panel:
    """Build the panel of a tab, hidden, with its events."""
    with gr.Column(visible=False) as box:
        gr.Markdown("### Result")
        with gr.Row():
            pack = gr.Button("Pack the pipeline as .zip")
            single = gr.Button("Make a single file for ComfyUI and A1111")
        files = gr.File(label="Downloads", file_count="multiple", interactive=False, visible=False)
        with gr.Row():
            repository = gr.Textbox(
                label="Publish as", placeholder="user/name", info="Of your account.", max_lines=1
            )
            license = gr.Textbox(
                label="License", placeholder="that of the base", info="As the Hub names it.", max_lines=1
            )
        private = gr.Checkbox(label="Private repository")
        push = gr.Button("Publish on the Hub")
        pushed = gr.Textbox(label="Published", interactive=False, lines=2, visible=False)
        log = log_field()
    panel = Panel(name, root, box, files, pushed)
    given_fields = [access_token, repository, license, private]
    outputs = [files, log]
    gr.on(pack.click, in_turn(root, tab, log, _packing(panel, log)), None, outputs, **HEAVY)
    gr.on(single.click, in_turn(root, tab, log, _single(panel, log)), None, outputs, **HEAVY)
    gr.on(push.click, in_turn(root, tab, log, _pushing(panel, log)), given_fields, [pushed, log], **HEAVY)
    return panel


def verdict_of(pipeline: Path) -> str:
    """The verdict of the verification whose figures a pipeline folder holds, and those figures."""
    record = pipeline / VERIFICATION_FILE
    reason = json.loads(record.read_text(encoding="utf-8"))["reason"]
    return "\n".join([reason.capitalize(), *(f"{what}: {figure}" for what, figure in figures(record)[1:])])


def _pipeline(panel: Panel, session: Session) -> Path:
    folder = session.kept.get(panel.name)
    if folder is None or not folder.is_dir():
        raise Error("There is no pipeline yet.")
    return Path(folder)


def _add(panel: Panel, session: Session, path: Path, name: str) -> list[str]:
    """The downloads, with one more; it replaces one of the same name."""
    handed = [each for each in session.kept[f"{panel.name} files"] if Path(each).name != name]
    session.kept[f"{panel.name} files"] = [*handed, session.hand_out(path, name)]
    return list(session.kept[f"{panel.name} files"])


def _packing(panel: Panel, log: Any) -> Any:
    def pack(request: gr.Request) -> Updates:
        session = visitor(panel.root, request)
        pipeline = _pipeline(panel, session)
        yield {log: "Packing ..."}
        packed = session.place(f"{panel.name}-packed") / "pipeline.zip"
        pack_pipeline(pipeline, packed)
        yield {panel.files: filled(_add(panel, session, packed, packed.name)), log: f"Packed: {packed.name}"}

    return pack


def pack_pipeline(pipeline: Path, packed: Path) -> None:
    """Write a pipeline folder as an archive, without the paths of the server that its records hold."""
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_STORED) as archive:
        for path in sorted(pipeline.rglob("*")):
            name = path.relative_to(pipeline).as_posix()
            if path.is_file() and not path.is_symlink() and name not in (VERIFICATION_FILE, CONVERSION_FILE):
                archive.write(path, name)
        if published := record.published(pipeline, silent):
            archive.writestr(CONVERSION_FILE, json.dumps(published, indent=2, sort_keys=True) + "\n")


def _single(panel: Panel, log: Any) -> Any:
    def single(request: gr.Request) -> Updates:
        session = visitor(panel.root, request)
        pipeline = _pipeline(panel, session)
        words = ["convert", pipeline.name, "--out", SINGLE_FILE, "--overwrite", "--json"]
        job = session.run(words, pipeline.parent)
        yield from follow(job, log)
        job.result()
        yield {panel.files: filled(_add(panel, session, pipeline.parent / SINGLE_FILE, SINGLE_FILE))}

    return single


def _pushing(panel: Panel, log: Any) -> Any:
    def push(
        request: gr.Request,
        oauth: gr.OAuthToken | None,
        access_token: str,
        repository: str,
        license: str,
        private: bool,
    ) -> Updates:
        session = visitor(panel.root, request)
        pipeline = _pipeline(panel, session)
        token = token_of(request, oauth, access_token)
        if token is None and not panel.root.settings.local:
            raise Error("Publishing needs your login. Sign in, or give an access token.")
        words = ["push", pipeline.name, given.repository(repository), "--json"]
        if text := given.prompt(license or "", "License"):
            words.append(f"--license={text}")
        if private:
            words.append("--private")
        job = session.run(words, pipeline.parent, token=token)
        yield from follow(job, log)
        done = job.result()
        told = f"{done['url']}\nCommit {done['commit']}, {len(done['changed'])} files changed"
        yield {panel.pushed: gr.update(value=told, visible=True)}

    return push
