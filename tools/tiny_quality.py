"""How good the tiny base is: do its pictures show what their prompts asked for?

The judge is a small convolutional classifier of thing, colour and ground, trained on drawn pictures (noised
and blurred, so that it goes by shape and colour and not by crisp edges) and never on generated ones. It is
itself measured on drawn pictures of combinations it has not seen: below 99 % its verdicts would mean little.
"""

from __future__ import annotations

import dataclasses
import itertools
from collections.abc import Sequence

import numpy as np
import tiny_pictures
import torch
from tiny_pictures import Concept
from torch import nn
from torch.nn import functional

COLOURS = tuple(tiny_pictures.COLOURS)


@dataclasses.dataclass(frozen=True)
class Score:
    """Shares of pictures, 0..1, in which the judge sees the right thing, colour (where named) and ground."""

    thing: float
    colour: float
    ground: float
    per_thing: dict[str, float]

    def __str__(self) -> str:
        worst = sorted(self.per_thing.items(), key=lambda item: item[1])[:4]
        return (
            f"thing {self.thing:.1%}, colour {self.colour:.1%}, ground {self.ground:.1%}; "
            f"hardest: {', '.join(f'{name} {share:.0%}' for name, share in worst)}"
        )


class Judge(nn.Module):
    """(batch, 64, 64, 3) pictures in -1..1 to one row of logits: `things`, then colours, then grounds."""

    def __init__(self, things: Sequence[str] = tiny_pictures.OBJECTS) -> None:
        super().__init__()
        self.things = tuple(things)
        self.sizes = (len(things), len(COLOURS), len(tiny_pictures.GROUNDS))
        widths = (3, 16, 32, 64, 96)
        layers: list[nn.Module] = []
        for before, after in itertools.pairwise(widths):
            layers += [nn.Conv2d(before, after, 3, stride=2, padding=1), nn.BatchNorm2d(after), nn.ReLU()]
        self.layers = nn.Sequential(*layers, nn.Flatten(), nn.Linear(96 * 16, sum(self.sizes)))

    def forward(self, images: torch.Tensor) -> tuple[torch.Tensor, ...]:
        logits: torch.Tensor = self.layers(images.permute(0, 3, 1, 2))
        return logits.split(self.sizes, dim=1)


def train_judge(
    things: Sequence[str] = tiny_pictures.OBJECTS, steps: int = 1500, batch: int = 64, seed: int = 0
) -> Judge:
    """A judge of `things` trained on freshly drawn pictures; about a minute on two cores."""
    torch.manual_seed(seed)
    judge = Judge(things)
    optimizer = torch.optim.AdamW(judge.parameters(), lr=2e-3)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 4e-3, steps)
    rng = np.random.default_rng((seed, 99))
    for _ in range(steps):
        concepts = [tiny_pictures.sample_concept(rng, things=things) for _ in range(batch)]
        images = _degrade(torch.from_numpy(np.stack([tiny_pictures.draw(c, rng) for c in concepts])))
        loss = sum(
            functional.cross_entropy(logits, labels, ignore_index=-1)
            for logits, labels in zip(judge(images), _labels(judge, concepts), strict=True)
        )
        optimizer.zero_grad()
        torch.as_tensor(loss).backward()
        optimizer.step()
        schedule.step()
    return judge.eval()


def _degrade(images: torch.Tensor) -> torch.Tensor:
    """uint8 pictures to -1..1; half of them blurred, all of them with noise of random strength."""
    clean = images.float().permute(0, 3, 1, 2) / 127.5 - 1
    blurred = functional.avg_pool2d(clean, 3, stride=1, padding=1, count_include_pad=False)
    chosen = torch.where(torch.rand(len(clean), 1, 1, 1) < 0.5, clean, blurred)
    return (chosen + torch.randn_like(chosen) * torch.rand(len(clean), 1, 1, 1) * 0.15).permute(0, 2, 3, 1)


def _labels(judge: Judge, concepts: Sequence[Concept]) -> tuple[torch.Tensor, ...]:
    """Class numbers; a natural colour has none (-1)."""
    rows = [
        (
            judge.things.index(c.thing),
            COLOURS.index(c.colour) if c.colour else -1,
            tiny_pictures.GROUNDS.index(c.ground),
        )
        for c in concepts
    ]
    return tuple(torch.tensor(rows).unbind(1))


@torch.no_grad()
def score(judge: Judge, images: np.ndarray, concepts: Sequence[Concept]) -> Score:
    """Judge uint8 pictures (n, 64, 64, 3) against what they should show."""
    logits = judge(torch.from_numpy(images).float() / 127.5 - 1)
    labels = _labels(judge, concepts)
    right = [(row.argmax(1) == label).float() for row, label in zip(logits, labels, strict=True)]
    named = labels[1] >= 0
    per_thing = {
        name: float(right[0][labels[0] == index].mean())
        for index, name in enumerate(judge.things)
        if bool((labels[0] == index).any())
    }
    return Score(float(right[0].mean()), float(right[1][named].mean()), float(right[2].mean()), per_thing)


def prompts_to_judge(seed: int = 5, each: int = 4, unseen: int = 24) -> list[Concept]:
    """`each` random combinations of every thing, then `unseen` of those never trained on."""
    rng = np.random.default_rng(seed)
    concepts: list[Concept] = []
    for thing in tiny_pictures.OBJECTS:
        while sum(c.thing == thing for c in concepts) < each:
            concept = tiny_pictures.sample_concept(rng)
            if concept.thing == thing:
                concepts.append(concept)
    return concepts + [tiny_pictures.sample_concept(rng, unseen=True) for _ in range(unseen)]
