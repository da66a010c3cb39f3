"""Plots as inline SVG. They need no script, no font and no other file.

`element` makes every element. It escapes attributes and texts, so that no text of a dataset becomes markup.
Colours are CSS classes (`c-complexity`, `c-s0`, ...), which the page defines for light and for dark mode. All
plots are 460 units wide: text of 12 units has 12 pixels in a half-page column and 9 on a phone.
"""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Iterable, Sequence
from typing import NamedTuple

import numpy as np
from markupsafe import Markup, escape

WIDTH = 460
MAX_POINTS = 8_000  # of one kind in one plot, about 100 kB of path; the caption says if not all are drawn


def element(name: str, *children: object, **attributes: object) -> Markup:
    """An element with escaped attributes and children. Children of type Markup are not escaped.

    Underscores in attribute names become hyphens, and a trailing one is dropped. Attributes with None are
    left out.

    element("text", "a<b", x=3, class_="tick")  ->  <text x="3" class="tick">a&lt;b</text>
    """
    pairs = [(k.rstrip("_").replace("_", "-"), v) for k, v in attributes.items() if v is not None]
    inside = Markup("").join(escape(_shorter(child)) for child in children)
    opening = Markup("").join(Markup(' {}="{}"').format(Markup(k), _shorter(v)) for k, v in pairs)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), opening, inside)


def _shorter(value: object) -> object:
    return f"{value:.2f}".rstrip("0").rstrip(".") if isinstance(value, float) else value


def ticks(low: float, high: float, count: int = 5) -> list[float]:
    """Round numbers within [low, high], at most `count` + 1: steps of 1, 2 or 5 times a power of ten."""
    raw = (high - low) / count
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * (1 - 1e-9))
    first, last = math.ceil(low / step - 1e-9), math.floor(high / step + 1e-9)
    return [i * step for i in range(first, last + 1)]


def span(values: Iterable[float], padding: float = 0.05) -> tuple[float, float]:
    """The smallest and the largest value, with padding on both sides, also if they are equal."""
    finite = [v for v in values if math.isfinite(v)]
    low, high = min(finite), max(finite)
    margin = (high - low) * padding or abs(high) * 0.1 or 1.0
    return low - margin, high + margin


@dataclasses.dataclass(frozen=True)
class Panel:
    """A pair of axes: data coordinates to SVG units, grid, ticks and labels."""

    x_range: tuple[float, float]
    y_range: tuple[float, float]
    x_label: str
    y_label: str
    height: int = 300
    left: int = 54
    right: int = 14
    top: int = 30
    bottom: int = 46

    def x(self, value: float) -> float:
        """The distance of a value from the left, in units."""
        low, high = self.x_range
        return self.left + (value - low) / (high - low) * (WIDTH - self.left - self.right)

    def y(self, value: float) -> float:
        """The distance of a value from the top, in units."""
        low, high = self.y_range
        return (
            self.height - self.bottom - (value - low) / (high - low) * (self.height - self.top - self.bottom)
        )

    def draw(self, title: str, *layers: Markup) -> Markup:
        """The whole figure: the axes, and the layers on top of them, in order."""
        baseline, marks = self.height - self.bottom, []
        for value, label in _labelled(ticks(*self.x_range)):
            marks.append(
                element("text", label, x=self.x(value), y=baseline + 18, class_="tick", text_anchor="middle")
            )
        for value, label in _labelled(ticks(*self.y_range, count=4)):
            y = self.y(value)
            marks.append(element("line", x1=self.left, x2=WIDTH - self.right, y1=y, y2=y, class_="grid"))
            marks.append(element("text", label, x=self.left - 8, y=y + 4, class_="tick", text_anchor="end"))
        marks.append(
            element("line", x1=self.left, x2=WIDTH - self.right, y1=baseline, y2=baseline, class_="axis")
        )
        middle = (self.left + WIDTH - self.right) / 2
        marks.append(
            element("text", self.x_label, x=middle, y=self.height - 8, class_="label", text_anchor="middle")
        )
        marks.append(element("text", self.y_label, x=2, y=14, class_="label"))
        return _figure(title, self.height, *marks, *layers)

    def vertical(self, value: float, colour: str, label: str | None = None) -> Markup:
        """A dashed line at an x value, with its label at the top, on the side with more space."""
        x = self.x(value)
        line = element("line", x1=x, x2=x, y1=self.top, y2=self.height - self.bottom, class_=f"rule {colour}")
        right = x > WIDTH * 0.6
        place = {"x": x - 6 if right else x + 6, "text_anchor": "end" if right else "start"}
        text = (
            element("text", label, y=self.top + 10, class_=f"note {colour}", **place) if label else Markup("")
        )
        return line + text

    def horizontal(self, value: float, colour: str, label: str | None = None) -> Markup:
        """A dashed line at a y value, with its label above its right end."""
        y, end = self.y(value), WIDTH - self.right
        line = element("line", x1=self.left, x2=end, y1=y, y2=y, class_=f"rule {colour}")
        place = {"x": end - 2, "y": y - 6, "text_anchor": "end"}
        return line + (element("text", label, class_=f"note {colour}", **place) if label else Markup(""))


def _figure(title: str, height: int, *content: Markup) -> Markup:
    box = f"0 0 {WIDTH} {height}"
    return element("svg", element("title", title), *content, viewBox=box, role="img", aria_label=title)


def _labelled(values: list[float]) -> list[tuple[float, str]]:
    step = abs(values[1] - values[0]) if len(values) > 1 else abs(values[0]) if values else 1.0
    digits = max(0, -math.floor(math.log10(step) + 1e-9)) if step else 0
    return [(v, f"{v:,.{digits}f}".replace("-", "\N{MINUS SIGN}")) for v in values]


def thinned(n: int) -> slice:
    """The slice that keeps at most MAX_POINTS of n, evenly spaced."""
    return slice(None, None, max(1, math.ceil(n / MAX_POINTS)))


class Points(NamedTuple):
    """A scatter plot's points: two finite float arrays [n], and the boolean mask [n] of those in colour."""

    x: np.ndarray
    y: np.ndarray
    chosen: np.ndarray


def scatter(
    title: str,
    points: Points,
    labels: tuple[str, str],
    lines: tuple[float | None, float | None],
    colour: str,
    *,
    diagonal: bool = False,
    height: int = 460,
) -> Markup:
    """A scatter plot with the chosen points in colour, on top of the others.

    Args:
      title: the text for screen readers.
      points: the values of the two axes, and which points are chosen.
      labels: of the two axes.
      lines: thresholds on the two axes; None for no line.
      colour: CSS class of lines and chosen points.
      diagonal: whether to draw the line on which both values are equal.
      height: in units.
    """
    x, y, chosen = points
    xs, ys = (
        [*x.tolist(), *(v for v in lines[:1] if v is not None)],
        [*y.tolist(), *(v for v in lines[1:] if v is not None)],
    )
    panel = Panel(span(xs), span(ys), *labels, height=height)
    layers = []
    low, high = max(panel.x_range[0], panel.y_range[0]), min(panel.x_range[1], panel.y_range[1])
    if diagonal and low < high:
        ends = {"x1": panel.x(low), "y1": panel.y(low), "x2": panel.x(high), "y2": panel.y(high)}
        layers.append(element("line", class_="rule quiet", **ends))
    for mask, style in ((~chosen, "dots quiet"), (chosen, f"dots {colour}")):
        keep = thinned(int(mask.sum()))
        path = "".join(
            f"M{panel.x(a):.1f} {panel.y(b):.1f}h0" for a, b in zip(x[mask][keep], y[mask][keep], strict=True)
        )
        layers.append(element("path", d=path, class_=style))
    if lines[0] is not None:
        layers.append(panel.vertical(lines[0], colour, f"{lines[0]:.3g}"))
    if lines[1] is not None:
        layers.append(panel.horizontal(lines[1], colour, f"{lines[1]:.3g}"))
    return panel.draw(title, *layers)


def histogram(
    title: str, values: np.ndarray, chosen: np.ndarray, threshold: float | None, label: str, colour: str
) -> Markup:
    """A histogram of a finite float array [n], with the counts of the mask `chosen` [n] in colour below.

    There are about sqrt(n) bins. The threshold is an edge, so that no bar contains both sides of it.
    """
    edges = _edges(values, threshold)
    total, _ = np.histogram(values, edges)
    marked, _ = np.histogram(values[chosen], edges)
    panel = Panel((edges[0], edges[-1]), (0.0, float(total.max()) * 1.12), label, "samples", height=260)
    bars = []
    for left, right, part, whole in zip(edges[:-1], edges[1:], marked.tolist(), total.tolist(), strict=True):
        for low, high, style in ((0, part, colour), (part, whole, "quiet")):
            if high > low:
                x, width = panel.x(left), max(panel.x(right) - panel.x(left) - 1, 0.5)
                box = {"x": x, "y": panel.y(high), "width": width, "height": panel.y(low) - panel.y(high)}
                bars.append(element("rect", class_=f"bar {style}", **box))
    if threshold is not None:
        bars.append(panel.vertical(threshold, colour, f"threshold {threshold:.3g}"))
    return panel.draw(title, *bars)


def _edges(values: np.ndarray, threshold: float | None) -> np.ndarray:
    low, high = float(values.min()), float(values.max())
    if threshold is not None:
        low, high = min(low, threshold), max(high, threshold)
    if low == high:
        low, high = span([low])
    width = (high - low) / min(48, max(8, round(math.sqrt(values.size))))
    start = low if threshold is None else threshold - math.ceil((threshold - low) / width) * width
    return start + width * np.arange(math.floor((high - start) / width) + 2)


@dataclasses.dataclass(frozen=True)
class Line:
    """One line of a plot: finite points, the CSS class of its colour, and a point to mark."""

    name: str
    x: Sequence[float]
    y: Sequence[float]
    colour: str
    mark: tuple[float, float] | None = None


def lines(
    title: str, series: Sequence[Line], labels: tuple[str, str], from_zero: bool = False, height: int = 300
) -> Markup:
    """Lines over common axes. A line of few points also shows each point as a dot."""
    drawn = [s for s in series if len(s.x)]
    x_range = span([v for s in drawn for v in s.x], 0.02)
    low, high = span([v for s in drawn for v in s.y])
    panel = Panel(x_range, (0.0 if from_zero else low, high), *labels, height=height)
    layers = []
    for s in drawn:
        keep = thinned(len(s.x))
        points = [(panel.x(a), panel.y(b)) for a, b in zip(s.x[keep], s.y[keep], strict=True)]
        path = "M" + "L".join(f"{a:.1f} {b:.1f}" for a, b in points)
        layers.append(element("path", element("title", s.name), d=path, class_=f"line {s.colour}"))
        if len(points) <= 24:
            spots = "".join(f"M{a:.1f} {b:.1f}h0" for a, b in points)
            layers.append(element("path", d=spots, class_=f"dots {s.colour}"))
        if s.mark:
            layers.append(
                element(
                    "circle", cx=panel.x(s.mark[0]), cy=panel.y(s.mark[1]), r=7, class_=f"ring {s.colour}"
                )
            )
    return panel.draw(title, *layers)


def dot_plot(
    title: str, rows: Sequence[tuple[str, float]], label: str, reference: int = 0, digits: int = 3
) -> Markup:
    """One value per row, joined to the value of the row `reference`, with its number next to it.

    The axis does not start at zero, since the position shows the value, not a length. The reference is an
    open dot.
    """
    low, high = span([value for _, value in rows], 0.12)
    step, left = 34, 84
    height = step * len(rows) + 60
    panel = Panel((low, high), (0.0, 1.0), label, "", height=height, left=left, right=58, top=8)
    marks = []
    for value, text in _labelled(ticks(low, high, 4)):
        x = panel.x(value)
        marks.append(element("line", x1=x, x2=x, y1=8, y2=height - 46, class_="grid"))
        marks.append(element("text", text, x=x, y=height - 28, class_="tick", text_anchor="middle"))
    marks.append(
        element("text", label, x=(left + WIDTH - 58) / 2, y=height - 8, class_="label", text_anchor="middle")
    )
    base = panel.x(rows[reference][1])
    for i, (name, value) in enumerate(rows):
        y, x = 8 + step * (i + 0.5), panel.x(value)
        marks.append(element("text", name, x=left - 12, y=y + 4, class_="name", text_anchor="end"))
        marks.append(element("line", x1=base, x2=x, y1=y, y2=y, class_="stem"))
        marks.append(element("circle", cx=x, cy=y, r=6, class_="spot first" if i == reference else "spot"))
        marks.append(element("text", f"{value:.{digits}f}", x=max(x, base) + 12, y=y + 4, class_="value"))
    return _figure(title, height, *marks)


@dataclasses.dataclass(frozen=True)
class Bar:
    """One horizontal bar of several parts: each has a count and the CSS class of its colour."""

    name: str
    parts: tuple[tuple[int, str], ...]
    note: str


def bars(title: str, rows: Sequence[Bar]) -> Markup:
    """Horizontal bars on one scale from zero, with the name to the left and the note to the right."""
    step, left, right = 30, 150, 84
    longest = max((sum(n for n, _ in row.parts) for row in rows), default=0) or 1
    marks = []
    for i, row in enumerate(rows):
        y, x = step * i + 4.0, float(left)
        marks.append(element("text", row.name, x=left - 12, y=y + 15, class_="name", text_anchor="end"))
        for n, colour in row.parts:
            width = n / longest * (WIDTH - left - right)
            marks.append(element("rect", x=x, y=y, width=width, height=21, class_=f"bar {colour}"))
            x += width
        marks.append(element("text", row.note, x=x + 8, y=y + 15, class_="value"))
    return _figure(title, step * len(rows) + 6, *marks)


def strip(title: str, parts: Sequence[tuple[str, float, str]]) -> Markup:
    """One bar of full width with (name, size, CSS class) parts. The page stretches it and adds a legend."""
    total, x, marks = sum(size for _, size, _ in parts) or 1.0, 0.0, []
    for name, size, colour in parts:
        width = size / total * 1000
        part = element(
            "rect", element("title", name), x=x, y=0, width=width, height=10, class_=f"bar {colour}"
        )
        marks.append(part)
        x += width
    frame = {"viewBox": "0 0 1000 10", "preserveAspectRatio": "none", "role": "img", "class_": "strip"}
    return element("svg", element("title", title), *marks, aria_label=title, **frame)
