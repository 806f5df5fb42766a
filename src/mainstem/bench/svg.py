"""Inline SVG: elements with escaped text, scales, ticks, axes and markers; colours come from the page's CSS."""

from __future__ import annotations

import math
import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field
from typing import Any

from markupsafe import Markup, escape

CHARACTER = 6.3  # mean width of a character of a label, in pixels
LINE = 14.0  # height of a label
SHAPES = ("circle", "square", "up", "diamond", "down", "hexagon")

Format = Callable[[float], str]


def tag(name: str, *children: Any, **attributes: Any) -> Markup:
    """An element. Children and attributes are escaped; `_` in an attribute's name stands for `-`."""
    given = {k.strip("_").replace("_", "-"): v for k, v in attributes.items() if v is not None}
    text = Markup("").join(
        Markup(' {}="{}"').format(Markup(k), _number(v) if isinstance(v, float) else v) for k, v in given.items()
    )
    inner = Markup("").join(escape(child) for child in children if child is not None)
    return Markup("<{0}{1}>{2}</{0}>").format(Markup(name), text, inner)


def _number(value: float) -> str:
    return f"{value:.1f}".removesuffix(".0")


@dataclass(frozen=True)
class Scale:
    """From data to pixels, linear or logarithmic."""

    low: float
    high: float
    start: float
    end: float
    log: bool = False

    def __call__(self, value: float) -> float:
        low, high, at = (math.log(max(v, 1e-300)) if self.log else v for v in (self.low, self.high, value))
        return self.start + (self.end - self.start) * (at - low) / (high - low)

    def ticks(self, most: int) -> list[float]:
        """Round numbers inside the domain, about `most` of them at most."""
        if self.log:
            return _log_ticks(self.low, self.high, most)
        found = _linear_ticks(self.low, self.high, most)
        return found if len(found) > 1 else _linear_ticks(self.low, self.high, 2 * most)


def spread(values: Iterable[float], margin: float = 0.06, log: bool = False) -> tuple[float, float]:
    """A domain that holds `values` with some room; never empty."""
    found = [v for v in values if math.isfinite(v) and (v > 0 or not log)]
    if not found:
        return (1.0, 10.0) if log else (0.0, 1.0)
    low, high = min(found), max(found)
    if log:
        room = max((high / low) ** margin, 1.25)
        return low / room, high * room
    room = (high - low) * margin or abs(high) * 0.1 or 1.0
    return low - room, high + room


def _linear_ticks(low: float, high: float, most: int) -> list[float]:
    raw = (high - low) / max(most, 1)
    power = 10.0 ** math.floor(math.log10(raw))
    step = next(s * power for s in (1, 2, 5, 10) if s * power >= raw * 0.999)
    first = math.ceil(low / step - 1e-9)
    return [round(i * step, 12) for i in range(first, math.floor(high / step + 1e-9) + 1)]


def tick_labels(scale: Scale, values: Sequence[float], written: Format) -> list[str]:
    """The ticks' labels: with the decimals that their step needs, or as values are `written` on a log axis."""
    if scale.log or len(values) < 2:
        return [_trim(written(value)) for value in values]
    decimals = max(0, -math.floor(math.log10(values[1] - values[0]) + 1e-9))
    return [f"{value:.{decimals}f}".replace("-", "−") for value in values]


def _trim(label: str) -> str:
    """`10 ms` from `10.0 ms`: a number without the zeros that say nothing."""
    return re.sub(r"(\d)\.(\d*?)0+(?!\d)", lambda found: found[1] + ("." + found[2] if found[2] else ""), label)


def left_of(scale: Scale, written: Format, most: int) -> float:
    """Where an axis starts, so that its tick labels have room."""
    labels = tick_labels(scale, scale.ticks(most), written)
    return 10 + CHARACTER * max(map(len, labels), default=3)


def _log_ticks(low: float, high: float, most: int) -> list[float]:
    decades = range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)
    found: list[float] = []
    for steps in ((1,), (1, 3), (1, 2, 5), (1, 1.5, 2, 3, 5, 7), tuple(range(1, 10))):
        ticks = [s * 10.0**d for d in decades for s in steps if low <= s * 10.0**d <= high]
        if len(ticks) > most and len(found) > 1:
            break
        found = ticks
        if len(found) >= 3:
            break
    every = max(1, math.ceil(len(found) / max(most, 1)))
    return found[::every]


@dataclass
class Frame:
    """The box of a chart: its scales, axes and what is drawn in it."""

    width: float
    height: float
    x: Scale
    y: Scale
    title: str
    description: str
    content: list[Markup] = field(default_factory=list)

    def svg(self, kind: str) -> Markup:
        return tag(
            "svg",
            tag("title", self.title),
            tag("desc", self.description),
            *self.content,
            viewBox=f"0 0 {_number(self.width)} {_number(self.height)}",
            role="img",
            aria_label=f"{self.title}. {self.description}",
            class_=f"chart {kind}".strip(),
        )

    def axes(self, x_label: str, x_format: Format, y_format: Format, ticks: tuple[int, int]) -> None:
        left, right, bottom = self.x.start, self.x.end, self.y.start
        values = self.y.ticks(ticks[1])
        for value, label in zip(values, tick_labels(self.y, values, y_format), strict=True):
            at = self.y(value)
            self.content += [
                tag("line", x1=left, x2=right, y1=at, y2=at, class_="grid"),
                tag("text", label, x=left - 8, y=at + 4, class_="tick end"),
            ]
        room = -math.inf
        values = self.x.ticks(ticks[0])
        for value, label in zip(values, tick_labels(self.x, values, x_format), strict=True):
            at = self.x(value)
            half = len(label) * CHARACTER / 2
            self.content.append(tag("line", x1=at, x2=at, y1=bottom, y2=bottom + 4, class_="axis"))
            if at - half > room:
                self.content.append(tag("text", label, x=at, y=bottom + 18, class_="tick middle"))
                room = at + half + 6
        self.content += [
            tag("line", x1=left, x2=right, y1=bottom, y2=bottom, class_="axis"),
            tag("text", x_label, x=right, y=bottom + 36, class_="label end"),
        ]


def marker(colour: int, x: float, y: float, size: float) -> Markup:
    """The shape that stands for an arm beside its colour."""
    shape = SHAPES[colour % len(SHAPES)]
    if shape == "circle":
        return tag("circle", cx=x, cy=y, r=size, class_="mark")
    sides, turn, grow = {
        "square": (4, 45, 1.25),
        "up": (3, 90, 1.35),
        "diamond": (4, 0, 1.35),
        "down": (3, 270, 1.35),
        "hexagon": (6, 0, 1.15),
    }[shape]
    angles = [math.radians(turn + 360 * i / sides) for i in range(sides)]
    corners = [(x + size * grow * math.cos(t), y - size * grow * math.sin(t)) for t in angles]
    return tag("path", d=path(corners) + "Z", class_="mark")


def key(colour: int) -> Markup:
    """An arm's marker for use in text."""
    mark = marker(colour, 6, 6, 4.4)
    return tag("svg", mark, viewBox="0 0 12 12", class_="key", aria_hidden="true", style=f"--c:var(--k{colour})")


def name(text: str) -> Markup:
    """An arm's name as text that breaks before a `+` and nowhere else if it can."""
    head, *rest = text.split("+")
    pieces = [head, *("+" + piece for piece in rest)]
    return Markup("").join(tag("span", piece, class_="piece") for piece in pieces)


def path(points: Iterable[tuple[float, float]]) -> str:
    """The path through `points`."""
    return "".join(f"{'L' if i else 'M'}{_number(x)} {_number(y)}" for i, (x, y) in enumerate(points))


def short(text: str, most: int = 30) -> str:
    """`text`, its middle left out where it is longer than `most`."""
    if len(text) <= most:
        return text
    head = most // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"
