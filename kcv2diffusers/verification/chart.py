"""A line chart over steps on a logarithmic scale, as coordinates for an inline SVG."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

WIDTH, HEIGHT = 640, 300
LEFT, RIGHT, TOP, BOTTOM = 56, 12, 12, 36  # margins in pixels
_LEAST = 1e-8  # lower end of the scale: below it float32 latents are equal
_MOST = 1e2


@dataclass(frozen=True)
class Chart:
    """The points "x,y x,y" of each line by name, and ticks as pairs of a coordinate and a label."""

    lines: dict[str, str]
    x_ticks: list[tuple[float, str]]
    y_ticks: list[tuple[float, str]]
    width: int = WIDTH
    height: int = HEIGHT
    left: int = LEFT
    right: int = WIDTH - RIGHT
    top: int = TOP
    bottom: int = HEIGHT - BOTTOM


def log_chart(lines: Mapping[str, Sequence[float]]) -> Chart:
    """A chart of `lines`, each with one value per step; the scale spans whole powers of ten."""
    values = [min(max(v, _LEAST), _MOST) for line in lines.values() for v in line]
    low = math.floor(math.log10(min(values)))
    high = max(low + 1, math.ceil(math.log10(max(values))))
    steps = max(len(line) for line in lines.values())

    def x(step: int) -> float:
        return round(LEFT + (WIDTH - LEFT - RIGHT) * (step / (steps - 1) if steps > 1 else 0.5), 1)

    def y(value: float) -> float:
        at = (math.log10(min(max(value, _LEAST), _MOST)) - low) / (high - low)
        return round(HEIGHT - BOTTOM - (HEIGHT - TOP - BOTTOM) * at, 1)

    return Chart(
        {name: " ".join(f"{x(n)},{y(v)}" for n, v in enumerate(line)) for name, line in lines.items()},
        [(x(n), str(n + 1)) for n in sorted({0, steps // 2, steps - 1})],
        [(y(10.0**power), f"1e{power}") for power in range(low, high + 1)],
    )
