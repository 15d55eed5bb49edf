"""What DreamBooth teaches the tiny base, over three seeds: the subject, and what becomes of everything else.

    python tools/study.py [FOLDER]

Fine-tunes the base on the tiger that ships beside it, with and without prior preservation and as LoRA, with
the command and the defaults of docs/guides/dreambooth.md. A classifier that saw only drawn pictures, of the
tiger too, then says what pictures of the result show. Leaves that page's table in .cache/study.md and its
pictures in kcv2diffusers/tiny/dreambooth.png. Runs that are in FOLDER already are not repeated.
"""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

os.environ.setdefault("KERAS_BACKEND", "torch")

import numpy as np
import torch
from tiny_pictures import GROUNDS, OBJECTS, SUBJECT, Concept, prompt
from tiny_quality import train_judge

from kcv2diffusers.models.base import load_base
from kcv2diffusers.pictures import grid

ROOT = Path(__file__).parent.parent
SEEDS = range(3)
COMMON = [
    "--base", "tiny", "--instance-images", ROOT / "kcv2diffusers" / "tiny" / "subject", "--instance-prompt",
    "a sks cat", "--batch-size", "4", "--steps", "250", "--guidance-scale", "5", "--train-text-encoder",
]  # fmt: skip
PRIOR = ["--class-prompt", "a cat", "--num-class-images", "16"]
FULL = ["--learning-rate", "2e-4"]
LORA = ["--learning-rate", "5e-3", "--lora-rank", "8"]
SETTINGS = {
    "with prior preservation": [*FULL, *PRIOR],
    "without": [*FULL],
    "LoRA, with prior preservation": [*LORA, *PRIOR],
}
(TIGER,) = SUBJECT
OTHERS = [thing for thing in OBJECTS if thing != "cat"]


def concepts(thing: str) -> list[Concept]:
    return [Concept(thing, "", ground) for ground in GROUNDS]


def tuned(folder: Path, setting: str, seed: int) -> Path:
    """The pipeline of a run, made if it is not there."""
    name = f"{list(SETTINGS).index(setting)}-{seed}"
    pipeline = folder / f"{name}-pipeline"
    if not pipeline.exists():
        out = ["--out", folder / name, "--export", pipeline, "--seed", str(seed)]
        classes = ["--class-images", folder / "class"] if "--class-prompt" in SETTINGS[setting] else []
        resume = ["--resume"] if (folder / name / "checkpoints").exists() else []
        command = [*COMMON, *SETTINGS[setting], *out, *classes, *resume]
        subprocess.run([sys.executable, "-m", "kcv2diffusers", "dreambooth", *map(str, command)], check=True)
    return pipeline


def main(folder: Path) -> None:
    folder.mkdir(parents=True, exist_ok=True)
    judge = train_judge((*OBJECTS, TIGER))
    asked = {
        "a sks cat": [(prompt(c).replace("cat", "sks cat"), TIGER) for c in concepts("cat")],
        "a cat": [(prompt(c), "cat") for c in concepts("cat")],
        "other things": [(prompt(c), t) for t in OTHERS for c in concepts(t)[::6]],
    }

    def shares(base: str | Path, seed: int) -> tuple[dict[str, float], np.ndarray]:
        """How probable the judge finds what was asked for, on average; and the pictures."""
        prompts = [pair for pairs in asked.values() for pair in pairs]
        drawn = folder / f"{Path(base).name}-{seed}.npy"
        if not drawn.exists():
            noise = np.random.default_rng(seed).standard_normal((len(prompts), 8, 8, 4), dtype="float32")
            sampler = load_base(base).sampler()
            texts = [text for text, _ in prompts]
            np.save(drawn, sampler.decode(sampler.sample(texts, noise, steps=25, guidance_scale=5)))
        images = np.load(drawn)
        with torch.no_grad():
            probable = judge(torch.from_numpy(images).float() / 127.5 - 1)[0].softmax(1)
        right = np.array([probable[i, judge.things.index(thing)] for i, (_, thing) in enumerate(prompts)])
        parts = np.split(right, np.cumsum([len(pairs) for pairs in asked.values()])[:-1])
        return dict(zip(asked, (float(part.mean()) for part in parts), strict=True)), images

    lines = [f"| | {' | '.join(f'`{n}`' if n[:2] == 'a ' else n for n in asked)} |", "|---|" + "--:|" * 3]
    shown, captions = [], []
    count = len(asked["a sks cat"])
    for setting in ("before", *SETTINGS):
        found = []
        for seed in SEEDS:
            values, images = shares("tiny" if setting == "before" else tuned(folder, setting, seed), seed)
            found.append(values)
            print(setting, seed, {name: f"{value:.0%}" for name, value in values.items()}, flush=True)
            if seed == SEEDS[0]:
                for start, name in ((0, "a sks cat"), (count, "a cat")):
                    shown += list(images[start : start + count : 2])
                    captions += [name] * len(range(0, count, 2))
        cells = [[values[name] for values in found] for name in asked]
        lines.append(
            f"| {setting} | "
            + " | ".join(f"{np.mean(c):.0%} ({min(c):.0%} to {max(c):.0%})" for c in cells)
            + " |"
        )
    (ROOT / ".cache" / "study.md").write_text("\n".join(lines) + "\n")
    print("\n".join(lines))
    columns = 2 * len(range(0, count, 2))
    grid(np.stack(shown), columns, captions).save(ROOT / "kcv2diffusers" / "tiny" / "dreambooth.png")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if len(sys.argv) > 1 else ROOT / ".cache" / "study")
