"""Lines over steps as inline SVG, in the colours of the page. 360 units wide: a phone shows its letters in their size."""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

from .html import Html, text

WIDTH, HEIGHT = 360, 220
LEFT, RIGHT, TOP, BOTTOM = 36, 350, 8, 186  # of the plot itself; ticks and the name of the x axis are around it


@dataclass(frozen=True)
class Line:
    """y by x under a name; style: a class of the page's, "second" with a dot at each point."""

    name: str
    points: Mapping[int, float]
    style: str = "main"


def line_chart(caption: str, x_name: str, lines: Sequence[Line]) -> Html:
    """The lines on common axes, from the least value to the greatest, and which is which below."""
    xs = _span([x for line in lines for x in line.points])
    ys = _span([y for line in lines for y in line.points.values()])

    def across(x: float) -> float:
        return LEFT + (RIGHT - LEFT) * (x - xs[0]) / (xs[1] - xs[0])

    def up(y: float) -> float:
        return BOTTOM - (BOTTOM - TOP) * (y - ys[0]) / (ys[1] - ys[0])

    drawn = [
        f'<line x1="{LEFT}" x2="{RIGHT}" y1="{up(y):.1f}" y2="{up(y):.1f}"/>'
        f'<text x="{LEFT - 4}" y="{up(y) + 4:.1f}" text-anchor="end">{y:g}</text>'
        for y in _ticks(*ys)
    ]
    drawn += [f'<text x="{across(x):.1f}" y="{BOTTOM + 14}" text-anchor="middle">{x:g}</text>' for x in _ticks(*xs)]
    drawn.append(f'<text x="{(LEFT + RIGHT) / 2}" y="{HEIGHT - 6}" text-anchor="middle">{text(x_name)}</text>')
    for line in lines:
        places = [(f"{across(x):.1f}", f"{up(y):.1f}") for x, y in line.points.items()]
        drawn.append(f'<polyline class="{line.style}" points="{" ".join(map(",".join, places))}"/>')
        if line.style == "second":
            drawn += [f'<circle cx="{x}" cy="{y}" r="3"/>' for x, y in places]
    keys = ", ".join(f'<span class="key {line.style}">■</span> {text(line.name)}' for line in lines)
    svg = f'<svg viewBox="0 0 {WIDTH} {HEIGHT}" role="img" aria-label="{text(caption)}">' + "\n".join(drawn) + "</svg>"
    return Html(f"<figure>\n<figcaption>{text(caption)}: {keys}</figcaption>\n{svg}\n</figure>")


def _span(values: Sequence[float]) -> tuple[float, float]:
    """(least, greatest), with room around a single value."""
    low, high = min(values), max(values)
    return (low, high) if high > low else (low - 0.5, high + 0.5)


def _ticks(low: float, high: float) -> list[float]:
    """At most five multiples of 1, 2 or 5 times a power of ten, from low to high."""
    unit = 10.0 ** math.floor(math.log10((high - low) / 4))
    step = unit * next(times for times in (1, 2, 5, 10) if high - low <= 4 * unit * times)
    return [i * step for i in range(math.ceil(low / step), math.floor(high / step) + 1)]
