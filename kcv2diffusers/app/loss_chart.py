"""The loss of a training as an SVG picture: in the colours of the page, without a script."""

from __future__ import annotations

from collections.abc import Sequence

_WIDTH, _HEIGHT = 600, 220
_LEFT, _BOTTOM, _TOP = 56, 28, 12  # pixels of the margins
_POINTS = 300  # at most; each is the mean of as many steps as need be


def loss_chart(losses: Sequence[tuple[int, float]]) -> str:
    """An SVG element with one line; "" before there are two points. `losses` are steps and losses."""
    points = _means(losses)
    if len(points) < 2:
        return ""
    first, last = points[0][0], points[-1][0]
    most = max(loss for _, loss in points) or 1.0

    def across(step: float) -> float:
        return _LEFT + (step - first) / (last - first) * (_WIDTH - _LEFT - 8)

    def down(loss: float) -> float:
        return _TOP + (1 - loss / most) * (_HEIGHT - _TOP - _BOTTOM)

    line = " ".join(f"{across(step):.1f},{down(loss):.1f}" for step, loss in points)
    grid = "".join(
        f'<path d="M{_LEFT} {down(loss):.1f}H{_WIDTH}" stroke="currentColor" opacity=".2"/>'
        f'<text x="{_LEFT - 6}" y="{down(loss) + 4:.1f}" text-anchor="end">{loss:.2g}</text>'
        for loss in (0.0, most / 2, most)
    )
    ends = "".join(
        f'<text x="{across(step):.1f}" y="{_HEIGHT - 8}" text-anchor="{anchor}">{step:.0f}</text>'
        for step, anchor in ((first, "start"), (last, "end"))
    )
    words = f"Loss from step {first:.0f} to {last:.0f}, now {points[-1][1]:.4f}"
    return (
        f'<svg viewBox="0 0 {_WIDTH} {_HEIGHT}" role="img" aria-label="{words}" font-size="12" '
        f'fill="currentColor">{grid}{ends}<polyline points="{line}" fill="none" stroke="#f97316" '
        'stroke-width="2" stroke-linejoin="round"/></svg>'
    )


def _means(losses: Sequence[tuple[int, float]]) -> list[tuple[float, float]]:
    """Steps and losses, averaged over groups of equal length."""
    size = -(-len(losses) // _POINTS) or 1
    groups = [losses[at : at + size] for at in range(0, len(losses), size)]
    return [(sum(s for s, _ in g) / len(g), sum(v for _, v in g) / len(g)) for g in groups]
