"""Train the judge with which `kcv2diffusers study` measures the tiny base, and say how good it is.

    python tools/tiny_judge.py

It is the classifier of tools/tiny_quality.py, of the tiger too, with the batch normalisation folded into the
convolutions, in float16. Writes kcv2diffusers/study/judge.safetensors in about a minute on two cores. On
drawn pictures that it has not seen, and on those of the tiny base, it must be right in 99 of 100.
"""

from __future__ import annotations

from pathlib import Path

import numpy as np
import torch
from safetensors.numpy import save_file
from tiny_pictures import OBJECTS, SUBJECT, draw, sample_concept
from tiny_quality import Judge, train_judge

from kcv2diffusers.study.judge import FILE, load_judge

THINGS = (*OBJECTS, *SUBJECT)


def folded(judge: Judge) -> dict[str, np.ndarray]:
    """The weights by the names that kcv2diffusers.study.judge has; of the outputs only the things."""
    layers, found = [*judge.layers], dict[str, torch.Tensor]()
    for number, at in enumerate(range(0, len(layers) - 2, 3)):
        conv, norm = layers[at], layers[at + 1]
        scale = norm.weight / torch.sqrt(norm.running_var + norm.eps)
        found[f"conv{number}.weight"] = conv.weight * scale[:, None, None, None]
        found[f"conv{number}.bias"] = (conv.bias - norm.running_mean) * scale + norm.bias
    dense, count = layers[-1], len(judge.things)
    found["dense.weight"], found["dense.bias"] = dense.weight[:count], dense.bias[:count]
    return {name: value.detach().numpy().astype("float16") for name, value in found.items()}


def main(file: Path = FILE) -> None:
    judge = train_judge(THINGS)
    weights = folded(judge)
    rng = np.random.default_rng(7)
    concepts = [sample_concept(rng, unseen=n % 2 == 0, things=THINGS) for n in range(1000)]
    images = np.stack([draw(concept, rng) for concept in concepts])
    save_file(weights, file, {"things": " ".join(THINGS)})
    probable = load_judge(file).probabilities(images)
    with torch.no_grad():
        before = judge(torch.from_numpy(images).float() / 127.5 - 1)[0].softmax(1).numpy()
    right = np.mean([THINGS[row.argmax()] == c.thing for row, c in zip(probable, concepts, strict=True)])
    print(f"right on {right:.1%} of {len(concepts)} drawn pictures; {file.stat().st_size / 1000:.0f} kB")
    print(f"largest difference of a probability to the network before: {abs(probable - before).max():.1e}")
    assert right >= 0.99


if __name__ == "__main__":
    main()
