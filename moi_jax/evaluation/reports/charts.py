"""Charts of scores as inline SVG, in the page's own text and rule colours."""

import math
from collections.abc import Sequence

from markupsafe import Markup, escape

from moi_jax.reports.page import PALETTE

# A score and its interval, all from 0 to 100; None where there is no score.
Bar = tuple[float, tuple[float, float] | None] | None

BAR_HEIGHT, GAP, LEFT, WIDTH = 15, 14, 96, 520  # sizes of the bar chart, in units of the SVG
RADIUS, MIDDLE = 130, (260, 160)  # sizes of the radar chart


def color(index: int) -> str:
    return PALETTE[index % len(PALETTE)]


def bars(tasks: Sequence[str], scores: Sequence[Sequence[Bar]]) -> Markup:
    """A group of horizontal bars for each task: one bar per checkpoint, whiskers for intervals.

    Args:
      scores: for each task, the bars of the checkpoints.
    """
    scale = (WIDTH - LEFT - 50) / 100
    height = sum(BAR_HEIGHT * len(group) + GAP for group in scores) + 20
    parts = []
    for tick in (0, 25, 50, 75, 100):
        x = LEFT + tick * scale
        parts.append(_line(x, 0, x, height - 18, "var(--rule)", 0.7))
        parts.append(_text(x, height - 4, str(tick), "middle"))
    top = GAP / 2
    for task, group in zip(tasks, scores, strict=True):
        parts.append(_text(LEFT - 8, top + BAR_HEIGHT * len(group) / 2 + 4, task, "end"))
        for index, bar in enumerate(group):
            y = top + BAR_HEIGHT * index
            if bar:
                parts.append(_bar(bar, y, scale, color(index)))
        top += BAR_HEIGHT * len(group) + GAP
    return _svg(WIDTH, height, parts, "Scores with 95 % intervals")


def _bar(bar: tuple[float, tuple[float, float] | None], y: float, scale: float, fill: str) -> str:
    score, interval = bar
    width = max(score, 0) * scale
    size = f'width="{width:.1f}" height="{BAR_HEIGHT - 2}"'
    parts = [f'<rect x="{LEFT}" y="{y + 1:.1f}" {size} fill="{fill}"/>']
    end = LEFT + width
    if interval:
        low, high = (LEFT + side * scale for side in interval)
        middle = y + BAR_HEIGHT / 2
        parts.append(_line(low, middle, high, middle, "currentColor", 1.2))
        parts += [_line(x, middle - 3, x, middle + 3, "currentColor", 1.2) for x in (low, high)]
        end = max(end, high)
    parts.append(_text(end + 5, y + BAR_HEIGHT - 4, f"{score:.1f}", "start"))
    return "".join(parts)


def radar(tasks: Sequence[str], scores: Sequence[Sequence[float]]) -> Markup:
    """A radar chart: a spoke for each of three or more tasks, a closed line for each checkpoint.

    Args:
      scores: for each checkpoint, the scores of the tasks.
    """

    def point(spoke: int, score: float) -> tuple[float, float]:
        angle = 2 * math.pi * spoke / len(tasks) - math.pi / 2
        length = RADIUS * score / 100
        return MIDDLE[0] + length * math.cos(angle), MIDDLE[1] + length * math.sin(angle)

    def ring(values: Sequence[float]) -> str:
        points = (point(spoke, value) for spoke, value in enumerate(values))
        return " ".join(f"{x:.1f},{y:.1f}" for x, y in points)

    parts = [
        f'<polygon points="{ring([level] * len(tasks))}" fill="none" stroke="var(--rule)"/>'
        for level in (25, 50, 75, 100)
    ]
    for spoke, task in enumerate(tasks):
        parts.append(_line(*MIDDLE, *point(spoke, 100), "var(--rule)", 0.7))
        x, y = point(spoke, 110)
        side = "middle" if abs(x - MIDDLE[0]) < 5 else "start" if x > MIDDLE[0] else "end"
        parts.append(_text(x, y + 4, task, side))
    for index, values in enumerate(scores):
        look = f'stroke="{color(index)}" stroke-width="2" fill="{color(index)}"'
        parts.append(f'<polygon points="{ring(values)}" {look} fill-opacity="0.12"/>')
    return _svg(WIDTH, 2 * MIDDLE[1], parts, "Scores of the tasks as a radar")


def _line(x1: float, y1: float, x2: float, y2: float, stroke: str, width: float) -> str:
    ends = f'x1="{x1:.1f}" y1="{y1:.1f}" x2="{x2:.1f}" y2="{y2:.1f}"'
    return f'<line {ends} stroke="{stroke}" stroke-width="{width}"/>'


def _text(x: float, y: float, text: str, anchor: str) -> str:
    look = 'fill="currentColor" font-size="11"'
    return f'<text x="{x:.1f}" y="{y:.1f}" text-anchor="{anchor}" {look}>{escape(text)}</text>'


def _svg(width: float, height: float, parts: Sequence[str], label: str) -> Markup:
    box = f'viewBox="0 0 {width} {height:.0f}" role="img" aria-label="{label}"'
    return Markup(f"<svg {box}>{''.join(parts)}</svg>")
