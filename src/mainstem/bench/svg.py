"""The charts of a report, drawn as inline SVG: escaped text, colours from the page's CSS, hover by <title> and CSS."""

from __future__ import annotations

import itertools
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


def _left(scale: Scale, written: Format, most: int) -> float:
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


@dataclass(frozen=True)
class Series:
    """One arm's curve: x and mean, with bounds (None without an interval), in data units."""

    name: str
    colour: int
    x: Sequence[float]
    mean: Sequence[float]
    low: Sequence[float] | None = None
    high: Sequence[float] | None = None
    quiet: bool = False  # in the background, without a label


@dataclass(frozen=True)
class Point:
    """One arm in a scatter chart."""

    name: str
    colour: int
    x: float
    y: float
    low: float | None = None
    high: float | None = None
    note: str = ""


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


def curves(
    series: Sequence[Series],
    *,
    width: float,
    height: float,
    title: str,
    x_label: str,
    x_format: Format,
    y_format: Format,
    y_domain: tuple[float, float],
    log: bool = False,
    labels: bool = True,
    name: str = "c",
    kind: str = "",
) -> Markup:
    """Mean lines with bands. `labels` puts each name at its line's end; `name` keeps ids on a page apart;
    `kind` is a CSS class."""
    shown = [s for s in series if len(s.x)]
    gutter = min(max((len(short(s.name)) for s in shown if not s.quiet), default=0) * CHARACTER + 32, 0.36 * width)
    left = _left(Scale(*y_domain, 0, 1, log), y_format, int(height / 55))
    ends = [v for s in shown for v in (s.x[0], s.x[-1])] or [0.0, 1.0]
    last = max(ends) if max(ends) > min(ends) else min(ends) + 1
    x = Scale(min(ends), last, left, width - (gutter if labels else 8))
    y = Scale(*y_domain, height - 42, 10, log)
    listed = ", ".join(f"{s.name}: {y_format(s.mean[-1])}" for s in shown if not s.quiet)
    frame = Frame(width, height, x, y, title, f"At the end: {listed}" if listed else "No finished run")
    frame.axes(x_label, x_format, y_format, (max(2, int(width / 110)), max(2, int(height / 55))))
    clip = tag("rect", x=left, y=4.0, width=x.end - left + 6, height=y.start - 4)
    frame.content.append(tag("defs", tag("clipPath", clip, id=f"{name}-clip")))
    for s in sorted(shown, key=lambda s: not s.quiet):
        frame.content.append(_curve(s, x, y, x_format, y_format, f"{name}-clip"))
    if labels:
        loud = [s for s in shown if not s.quiet]
        heights = [min(max(y(s.mean[-1]), y.end), y.start) for s in loud]
        for s, at, end in zip(loud, apart(heights, y.end, y.start), heights, strict=True):
            frame.content.append(_end_label(s, x.end, end, at, gutter))
    return frame.svg(kind)


def _curve(s: Series, x: Scale, y: Scale, x_format: Format, y_format: Format, clip: str) -> Markup:
    points = list(zip(map(x, s.x), map(y, s.mean), strict=True))
    band = None
    if s.low is not None and s.high is not None:
        edge = [*zip(s.x, s.high, strict=True), *reversed(list(zip(s.x, s.low, strict=True)))]
        band = tag("path", d=path((x(a), y(b)) for a, b in edge) + "Z", class_="band")
    line = tag("path", d=path(points), class_="line")
    if s.quiet:
        return tag("g", line, class_="series quiet", clip_path=f"url(#{clip})")
    dots = []
    for i, (a, b) in enumerate(points):
        bounds = f" ({y_format(s.low[i])} to {y_format(s.high[i])})" if s.low and s.high else ""
        told = f"{s.name}, at {x_format(s.x[i])}: {y_format(s.mean[i])}{bounds}"
        dots.append(tag("circle", tag("title", told), cx=a, cy=b, r=5, class_="spot"))
    reach = tag("path", tag("title", s.name), d=path(points), class_="reach")
    return tag(
        "g", band, line, reach, *dots, class_="series", clip_path=f"url(#{clip})", style=f"--c:var(--k{s.colour})"
    )


def _end_label(s: Series, x: float, end: float, at: float, gutter: float) -> Markup:
    fits = max(6, int((gutter - 26) / CHARACTER))
    return tag(
        "g",
        tag("title", s.name),
        tag("path", d=path([(x + 2, end), (x + 10, at)]), class_="leader"),
        marker(s.colour, x + 14, at, 3.6),
        tag("text", short(s.name, fits), x=x + 21, y=at + 4, class_="name"),
        style=f"--c:var(--k{s.colour})",
    )


def scatter(
    points: Sequence[Point],
    *,
    width: float,
    height: float,
    title: str,
    x_label: str,
    x_format: Format,
    y_format: Format,
    higher_is_better: bool,
    kind: str = "",
) -> Markup:
    """Quality against cost on a log axis, each point named, with its interval; a line joins those that none beats."""
    low, high = spread([v for p in points for v in (p.y, p.low, p.high) if v is not None], 0.1)
    left = _left(Scale(low, high, 0, 1), y_format, int(height / 55))
    x = Scale(*spread([p.x for p in points], 0.12, log=True), left, width - 12, log=True)
    y = Scale(low, high, height - 42, 12)
    frame = Frame(width, height, x, y, title, "; ".join(f"{p.name}: {x_format(p.x)}, {y_format(p.y)}" for p in points))
    frame.axes(x_label, x_format, y_format, (max(2, int(width / 90)), max(2, int(height / 55))))
    front = frontier(points, higher_is_better)
    taken = [(x(p.x) - 7, y(p.y) - 7, x(p.x) + 7, y(p.y) + 7) for p in points]
    if len(front) > 1:
        steps = [(x(p.x), y(p.y)) for p in front]
        corners = [corner for a, b in itertools.pairwise(steps) for corner in (a, (b[0], a[1]))] + steps[-1:]
        frame.content.append(tag("path", d=path(corners), class_="front"))
        for (x1, y1), (x2, y2) in itertools.pairwise(corners):
            taken.append((min(x1, x2) - 2, min(y1, y2) - 2, max(x1, x2) + 2, max(y1, y2) + 2))
    box = (left, y.end, x.end, y.start)
    for p in sorted(points, key=lambda p: p.x):
        a, b = x(p.x), y(p.y)
        whisker = None
        if p.low is not None and p.high is not None:
            whisker = tag("line", x1=a, x2=a, y1=y(p.low), y2=y(p.high), class_="whisker")
        label = short(p.name, 30 if width > 500 else 20)
        at = place(a, b, len(label) * CHARACTER, box, taken)
        before = at[0] + len(label) * CHARACTER < a  # anchored on the point's side, whatever the font's width
        edge, anchor = (at[0] + len(label) * CHARACTER, "name end") if before else (at[0], "name")
        text = tag("text", label, x=edge, y=at[1] + LINE - 3.5, class_=anchor)
        told = tag("title", f"{p.name}: {x_format(p.x)}, {y_format(p.y)}{p.note}")
        leader = _leader(a, b, at, len(label) * CHARACTER)
        frame.content.append(
            tag(
                "g",
                told,
                whisker,
                leader,
                marker(p.colour, a, b, 4.6),
                text,
                class_="point",
                style=f"--c:var(--k{p.colour})",
            )
        )
    return frame.svg(kind)


def _leader(a: float, b: float, at: tuple[float, float], width: float) -> Markup | None:
    """A line from a point to its label, where the label had to move away."""
    x = min(max(a, at[0]), at[0] + width)
    y = min(max(b, at[1]), at[1] + LINE)
    far = math.hypot(x - a, y - b) > 14
    return tag("path", d=path([(a, b), (x, y)]), class_="leader") if far else None


def frontier(points: Sequence[Point], higher_is_better: bool) -> list[Point]:
    """The points that no cheaper one equals or beats, from the cheapest."""
    sign = 1 if higher_is_better else -1
    best, front = -math.inf, []
    for point in sorted(points, key=lambda p: (p.x, -sign * p.y)):
        if sign * point.y > best:
            best = sign * point.y
            front.append(point)
    return front


def place(
    x: float, y: float, width: float, box: tuple[float, float, float, float], taken: list[Any]
) -> tuple[float, float]:
    """A label's top left corner near (x, y), inside `box` where it can be, off what is taken; it takes its place."""
    best, least = (x, y), math.inf
    for distance in (0.0, 12.0, 26.0, 42.0, 60.0):
        for a, b in ((9, -LINE / 2), (-width - 9, -LINE / 2), (-width / 2, -LINE - 8 - distance),
                     (-width / 2, 8 + distance), (9, -LINE - distance), (-width - 9, -LINE - distance),
                     (9, distance), (-width - 9, distance)):  # fmt: skip
            at = (x + a, y + b, x + a + width, y + b + LINE)
            outside = max(0.0, box[0] - at[0], at[2] - box[2]) + max(0.0, box[1] - at[1], at[3] - box[3])
            cost = sum(_overlap(at, other) for other in taken) + 400 * outside + distance
            if cost < least:
                best, least = (at[0], at[1]), cost
    taken.append((best[0], best[1], best[0] + width, best[1] + LINE))
    return best


def _overlap(a: Sequence[float], b: Sequence[float]) -> float:
    return max(0.0, min(a[2], b[2]) - max(a[0], b[0])) * max(0.0, min(a[3], b[3]) - max(a[1], b[1]))


def interval_strip(
    mean: float, low: float | None, high: float | None, domain: tuple[float, float], told: str, kind: str
) -> Markup:
    """A difference and its interval on an axis that all rows share, with a line at zero."""
    x = Scale(*domain, 6, 134)
    bar = None
    if low is not None and high is not None:
        bar = tag("line", x1=x(low), x2=x(high), y1=11.0, y2=11.0, class_="bar")
    return tag(
        "svg",
        tag("title", told),
        tag("line", x1=x(0), x2=x(0), y1=0.0, y2=22.0, class_="zero"),
        bar,
        tag("circle", cx=x(mean), cy=11.0, r=3.4),
        viewBox="0 0 140 22", class_=f"strip {kind}", role="img", aria_label=told,
    )  # fmt: skip


def trials(
    points: Sequence[tuple[float, float | None, str, bool]],
    *,
    title: str,
    x_domain: tuple[float, float],
    y_domain: tuple[float, float],
    x_format: Format,
    y_format: Format,
) -> Markup:
    """Tuning trials of one arm, `(setting, value or None, told, best)`: the best ringed, failures as crosses below."""
    width, height = 190.0, 124.0
    left = _left(Scale(*y_domain, 0, 1), y_format, 3)
    log = x_domain[0] > 0 and x_domain[1] / x_domain[0] > 5
    x, y = Scale(*x_domain, left + 6, width - 12, log), Scale(*y_domain, height - 38, 8)
    frame = Frame(width, height, x, y, title, "; ".join(told for _, _, told, _ in points))
    frame.axes("", x_format, y_format, (3, 3))
    line = sorted((x(a), y(b)) for a, b, _, _ in points if b is not None)
    frame.content.append(tag("path", d=path(line), class_="trace"))
    for setting, value, told, best in points:
        a, b = x(setting), y.start - 6 if value is None else y(value)
        if value is None:
            cross = path([(a - 4, b - 4), (a + 4, b + 4)]) + path([(a - 4, b + 4), (a + 4, b - 4)])
            mark = tag("path", d=cross, class_="cross")
        else:
            mark = tag("circle", cx=a, cy=b, r=3.4, class_="trial")
        ring = tag("circle", cx=a, cy=b, r=7, class_="ring") if best else None
        frame.content.append(tag("g", tag("title", told), ring, mark))
    return frame.svg("trials")


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


def apart(heights: Sequence[float], top: float, bottom: float) -> list[float]:
    """`heights` moved as little as keeps labels a line apart, between `top` and `bottom` where they all fit."""
    order = sorted(range(len(heights)), key=lambda i: heights[i])
    placed = [heights[i] for i in order]
    gap = min(LINE, (bottom - top) / max(1, len(placed) - 1)) if placed else LINE
    for _ in range(100):
        for i, (a, b) in enumerate(itertools.pairwise(placed)):
            if b - a < gap:
                placed[i], placed[i + 1] = (a + b - gap) / 2, (a + b + gap) / 2
        if placed:
            shift = max(0.0, top - placed[0]) or min(0.0, bottom - placed[-1])
            placed = [p + shift for p in placed] if abs(shift) > 1e-9 else placed
    result = [0.0] * len(heights)
    for i, value in zip(order, placed, strict=True):
        result[i] = value
    return result


def short(text: str, most: int = 30) -> str:
    """`text`, its middle left out where it is longer than `most`."""
    if len(text) <= most:
        return text
    head = most // 2
    return f"{text[:head]}…{text[len(text) - (most - 1 - head) :]}"
