"""The page: its tabs and its look."""

from __future__ import annotations

from typing import Any

import gradio as gr

from kcv2diffusers.app.convert_tab import convert_tab
from kcv2diffusers.app.folders import Root
from kcv2diffusers.app.inspect_tab import inspect_tab
from kcv2diffusers.app.lora_tab import lora_tab
from kcv2diffusers.app.train_tab import train_tab

_TITLE = "kcv2diffusers"
_ABOUT = (
    "Convert KerasCV and KerasHub Stable Diffusion checkpoints to diffusers, compare both sides, "
    "train on your photos, publish."
)
_KEPT = 3600  # seconds that Gradio keeps a file beyond the time limit of a command
# Gradio's word "Error" over a field would hide what the command has said. The reason stands in the corner.
# Gradio leaves the list of a dropdown open, over other fields, when the Tab key leaves it.
CSS = """
[data-testid=status-tracker]:has(> .error) { display: none; }
.block:not(:focus-within) .options:has(> [role=listbox]) { display: none; }
.log textarea { font-family: ui-monospace, monospace; font-size: .8rem; }
.chart { padding-top: 2.2rem !important; }
.gradio-container {
    --block-info-text-color: var(--neutral-600); --input-placeholder-color: var(--neutral-500);
    --color-accent: var(--primary-700); --checkbox-border-color: var(--neutral-500);
    --button-primary-background-fill: var(--primary-700);
    --button-primary-background-fill-hover: var(--primary-800);
    --button-cancel-background-fill: #b91c1c; --button-cancel-background-fill-hover: #991b1b;
}
.dark .gradio-container, .dark.gradio-container {
    --block-info-text-color: var(--neutral-300); --input-placeholder-color: var(--neutral-400);
    --color-accent: var(--primary-500); --checkbox-border-color: var(--neutral-400);
}
.pictures .grid-wrap { min-height: 0 !important; padding-top: 1.8rem; }
.pictures .grid-container { grid-template-columns: repeat(var(--grid-cols), minmax(0, 1fr)) !important; }
@media (max-width: 640px) { .chart svg { font-size: 22px; } }
.inside { padding: .5rem 1rem 0; }
"""


def build(root: Root, *, on_a_space: bool) -> Any:
    """The page, as Gradio's Blocks."""
    age = int(root.settings.seconds) + _KEPT
    with gr.Blocks(title=_TITLE, delete_cache=(600, age), analytics_enabled=False) as page:
        gr.Markdown(f"# {_TITLE}\n\n{_ABOUT}")
        with gr.Accordion("Login to the Hugging Face Hub", open=False):
            if on_a_space:
                gr.LoginButton()
            own = " Empty: the login of this computer." if root.settings.local else ""
            access_token = gr.Textbox(
                label="Access token", type="password", max_lines=1, visible=not on_a_space,
                info=f"For private models and to publish. It is not stored.{own}",
            )  # fmt: skip
        with gr.Tab("Convert"):
            convert_tab(root, access_token)
        if root.settings.trains:
            with gr.Tab("Train"):
                train_tab(root, access_token)
        with gr.Tab("LoRA"):
            lora_tab(root, access_token)
        with gr.Tab("Inspect"):
            inspect_tab(root, access_token)

        def left(request: gr.Request) -> None:
            root.close(request.session_hash)

        page.unload(left)
    return page
