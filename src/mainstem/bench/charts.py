"""The charts of a report: learning curves, quality against cost, intervals, tuning trials."""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from markupsafe import Markup

from .svg import CHARACTER, LINE, Format, Frame, Scale, left_of, marker, path, short, spread, tag


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
    left = left_of(Scale(*y_domain, 0, 1, log), y_format, int(height / 55))
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
    left = left_of(Scale(low, high, 0, 1), y_format, int(height / 55))
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
    left = left_of(Scale(*y_domain, 0, 1), y_format, 3)
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
