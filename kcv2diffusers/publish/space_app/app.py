"""A demo of a text-to-image pipeline: prompt in, image out. `demo.json` names the model.

`kcv2diffusers space` copies this file into the folder of a Space. `python app.py` runs it locally.
"""

import json
import os
import random
from pathlib import Path

import gradio as gr
import torch
from diffusers import DiffusionPipeline

DEMO = json.loads(Path(__file__).with_name("demo.json").read_text(encoding="utf-8"))
MODEL = os.environ.get("MODEL", DEMO["model"])  # for a test: another repository, or a folder
CUDA = torch.cuda.is_available()
MOST = 2**31 - 1

pipeline = DiffusionPipeline.from_pretrained(
    MODEL,
    variant=DEMO["variant"],
    torch_dtype=torch.float16 if CUDA else torch.float32,
    **dict.fromkeys(DEMO["absent"]),
).to("cuda" if CUDA else "cpu")


def draw(prompt, negative_prompt, steps, guidance_scale, seed, progress=gr.Progress()):  # noqa: B008  (how Gradio finds it)
    """The picture of a prompt, and the seed that draws it again; a negative seed stands for any."""
    if not prompt.strip():
        raise gr.Error("Write what to draw first.", print_exception=False)
    seed = random.randint(0, MOST) if seed is None or seed < 0 else int(seed)

    def step_end(_, step, __, values):
        progress((step + 1, int(steps)), unit="steps")
        return values

    image = pipeline(
        prompt,
        negative_prompt=negative_prompt,
        num_inference_steps=int(steps),
        guidance_scale=guidance_scale,
        generator=torch.Generator().manual_seed(seed),
        callback_on_step_end=step_end,
    ).images[0]
    return image, f"Seed {seed}"


with gr.Blocks(title=DEMO["title"]) as app:
    gr.Markdown(f"# {DEMO['title']}\n\n{DEMO['about']}")
    with gr.Row():
        with gr.Column():
            prompt = gr.Textbox(label="Prompt", value=DEMO["prompts"][0], lines=2)
            negative_prompt = gr.Textbox(label="Negative prompt", placeholder="What to keep out")
            button = gr.Button("Draw", variant="primary")
            with gr.Accordion("Steps, guidance and seed", open=False):
                steps = gr.Slider(1, 100, DEMO["steps"], step=1, label="Steps")
                guidance_scale = gr.Slider(1, 20, DEMO["guidance_scale"], label="Guidance scale")
                seed = gr.Number(-1, precision=0, label="Seed (-1: any)")
            gr.Examples([[prompt] for prompt in DEMO["prompts"]], [prompt])
        with gr.Column():
            picture = gr.Image(label="Picture", format="png", height=512)
            drawn = gr.Markdown()
    settings = [prompt, negative_prompt, steps, guidance_scale, seed]
    gr.on([button.click, prompt.submit], draw, settings, [picture, drawn], concurrency_limit=1)

if __name__ == "__main__":
    app.launch()
