"""The report of a comparison: one HTML page that needs nothing else, no network and no script."""

from __future__ import annotations

import functools
import json
import math
from collections.abc import Callable, Sequence
from importlib import resources
from pathlib import Path
from typing import Any

import jinja2
from markupsafe import Markup

from ..files import write_text
from . import charts, svg, wording
from .statistics import interval
from .wording import Result, Words

COLOURS = 6  # more arms than this share one colour, and each has a chart of its own
COSTS: dict[str, tuple[str, Callable[[float], str]]] = {
    "step_seconds": ("Time of a training step", wording.duration),
    "flops": ("Forward FLOPs of an example", wording.count),
    "parameters": ("Parameters", wording.count),
    "peak_bytes": ("Peak memory of training", wording.size),
}


def write(result: Result, path: str | Path) -> None:
    """Write the report of `result` (see `result.json`) to `path`, atomically."""
    write_text(path, render(result))


def render(result: Result) -> str:
    """The report as HTML. Whatever the result holds appears as text and never as markup."""
    words = Words.of(result)
    arms = wording.ranked(result)
    colours = _colours(result, arms)
    experiment = result["experiment"]
    return _template().render(
        result=result,
        words=words,
        wording=wording,
        style=Markup(_text("report.css")),
        svg=svg,
        colours=colours,
        many=len(arms) > COLOURS,
        arms=arms,
        strips=_strips(words, arms),
        curves=_curves(result, words, arms, colours),
        scatters=_scatters(words, arms, colours),
        tuning=_tuning(words, arms),
        failures=_failures(arms),
        experiment=json.dumps(experiment, indent=1, ensure_ascii=False),
        seeds=_seeds(experiment),
    )


@functools.cache
def _template() -> jinja2.Template:
    environment = jinja2.Environment(
        autoescape=True, trim_blocks=True, lstrip_blocks=True, undefined=jinja2.StrictUndefined
    )
    return environment.from_string(_text("report.html.j2"))


def _text(name: str) -> str:
    return resources.files(__package__).joinpath(name).read_text(encoding="utf-8")


def _colours(result: Result, arms: Sequence[dict[str, Any]]) -> dict[str, int]:
    """The baseline is 0; the others, best first, have a colour each as long as there are enough."""
    others = [arm["name"] for arm in arms if arm["name"] != result["baseline"]]
    return {result["baseline"]: 0} | {name: i if len(arms) <= COLOURS else 1 for i, name in enumerate(others, 1)}


def _seeds(experiment: dict[str, Any]) -> int:
    seeds = experiment.get("seeds", 0)
    return len(seeds) if isinstance(seeds, list) else int(seeds)


def _strips(words: Words, arms: Sequence[dict[str, Any]]) -> dict[str, Markup]:
    """Each arm's difference to the baseline as a dot and a bar, all on one axis."""
    rows = {arm["name"]: arm for arm in arms if arm["difference"] and arm["difference"]["mean"] is not None}
    ends = [row["difference"][k] for row in rows.values() for k in ("mean", "low", "high")]
    domain = svg.spread([0.0, *(end for end in ends if end is not None)])
    return {
        name: charts.interval_strip(
            row["difference"]["mean"], row["difference"]["low"], row["difference"]["high"],
            domain, words.told(row), words.verdict(row),
        )
        for name, row in rows.items()
    }  # fmt: skip


def _curves(
    result: Result, words: Words, arms: Sequence[dict[str, Any]], colours: dict[str, int]
) -> list[dict[str, Any]]:
    """One tab a quantity: a chart for a wide page and one for a narrow one, or, of many arms, a chart each."""
    unit = str(result["experiment"].get("budget", "")).partition("=")[0]
    x, x_label = {"epochs": ("epoch", "epochs"), "seconds": ("seconds", "seconds")}.get(unit, ("step", "steps"))
    quantities = [
        ("val_metric", f"Validation {words.name}", words.value, False),
        ("train_loss", "Training loss", _loss, True),
        ("val_loss", "Validation loss", _loss, True),
    ]
    tabs = []
    for quantity, title, written, log in quantities:
        found = {arm["name"]: _series(arm, x, quantity, colours[arm["name"]], log) for arm in arms}
        series = [s for s in found.values() if s is not None]
        if not series:
            continue
        domain = _focus(series, words.higher_is_better if quantity == "val_metric" else False, log)
        draw = functools.partial(
            charts.curves, x_label=x_label, x_format=_plain, y_format=written, y_domain=domain, log=log
        )
        clipped = any(not domain[0] <= value <= domain[1] for s in series for value in s.mean)
        tab: dict[str, Any] = {"title": title, "clipped": clipped, "each": [], "wide": None, "narrow": None}
        if len(arms) <= COLOURS:
            tab["wide"] = draw(series, width=1040, height=400, title=title, name=f"{quantity}-w", kind="on-wide")
            tab["narrow"] = draw(
                series, width=358, height=300, title=title, labels=False, name=f"{quantity}-n", kind="on-narrow"
            )
        else:
            tab["each"] = _multiples(series, draw, quantity, result["baseline"])
        tabs.append(tab)
    return tabs


def _multiples(
    series: Sequence[charts.Series], draw: Callable[..., Markup], quantity: str, baseline: str
) -> list[tuple[str, Markup]]:
    """A small chart an arm, the baseline's line behind each."""
    behind = [charts.Series(s.name, 0, s.x, s.mean, quiet=True) for s in series if s.name == baseline]
    drawn = []
    for i, s in enumerate(series):
        others = [] if s.name == baseline else behind
        chart = draw([*others, s], width=330, height=210, title=s.name, labels=False, name=f"{quantity}-{i}")
        drawn.append((s.name, chart))
    return drawn


def _series(arm: dict[str, Any], x: str, quantity: str, colour: int, log: bool) -> charts.Series | None:
    """The arm's mean curve over its finished runs, evaluation by evaluation, with a 95 % interval over seeds."""
    runs = [run["curve"] for run in arm["finals"] if run["status"] == "ok" and run["curve"]]
    points = []
    for i in range(min(map(len, runs), default=0)):
        values = [_number(run[i].get(quantity)) for run in runs]
        if all(value is not None and (value > 0 or not log) for value in values):
            mean, low, high, _ = interval([v for v in values if v is not None])
            points.append((sum(run[i][x] for run in runs) / len(runs), mean, low, high))
    if not points:
        return None
    xs, means, lows, highs = zip(*points, strict=True)
    if len(runs) < 2:
        return charts.Series(arm["name"], colour, xs, means)
    least = min(means) / 100  # where a band on a logarithmic axis is cut off
    return charts.Series(arm["name"], colour, xs, means, [max(v, least) for v in lows] if log else lows, highs)


def _focus(series: Sequence[charts.Series], higher_is_better: bool, log: bool) -> tuple[float, float]:
    """The range that shows how the curves end: the first fifth of each may leave it at the bad end."""
    late = [value for s in series for value in s.mean[len(s.mean) // 5 :]]
    bounds = [v for s in series for edge in (s.low, s.high) if edge for v in edge[len(s.mean) // 2 :]]
    low, high = svg.spread([*late, *bounds], 0.05, log)
    every = [value for s in series for value in s.mean]
    if log:
        return low, svg.spread(every, 0.05, log)[1]
    return (low, high) if higher_is_better or not every else (low, max(high, svg.spread(late)[1]))


def _scatters(words: Words, arms: Sequence[dict[str, Any]], colours: dict[str, int]) -> list[dict[str, Any]]:
    """Quality against each cost that at least two arms have."""
    tabs = []
    for cost, (title, written) in COSTS.items():
        points = [
            charts.Point(
                arm["name"], colours[arm["name"]], arm["cost"][cost], arm["mean"], arm["low"], arm["high"],
                f" ({words.interval(arm)})" if arm["low"] is not None else "",
            )
            for arm in arms
            if arm["cost"].get(cost) and arm["mean"] is not None
        ]  # fmt: skip
        if len(points) < 2:
            continue
        draw = functools.partial(
            charts.scatter, points, title=f"{words.name} against {title.lower()}", x_label=f"{title} (logarithmic)",
            x_format=written, y_format=words.value, higher_is_better=words.higher_is_better,
        )  # fmt: skip
        left_out = [arm["name"] for arm in arms if arm["mean"] is not None and not arm["cost"].get(cost)]
        wide, narrow = draw(width=1040, height=440, kind="on-wide"), draw(width=358, height=360, kind="on-narrow")
        tabs.append({"title": title, "wide": wide, "narrow": narrow, "left_out": left_out})
    return tabs


def _tuning(words: Words, arms: Sequence[dict[str, Any]]) -> dict[str, Any]:
    """The tuning trials: a chart an arm where one number was tuned, and all of them as rows."""
    trials = [(arm, trial) for arm in arms for trial in arm["trials"]]
    keys = {key for _, trial in trials for key in trial["setting"]}
    rows = [
        {"arm": arm["name"], "best": trial["setting"] == arm["setting"] and trial["status"] == "ok", **trial}
        for arm, trial in trials
    ]
    numbers = [value for _, trial in trials for value in trial["setting"].values()]
    if len(keys) != 1 or not all(isinstance(v, int | float) and not isinstance(v, bool) for v in numbers):
        return {"rows": rows, "charts": [], "key": None}
    [key] = keys
    values = sorted(t["value"] for _, t in trials if t["value"] is not None)
    low = values[len(values) // 4] - 2 * (values[-1] - values[len(values) // 4]) if values else 0.0
    if not words.higher_is_better and values:
        top = values[-1 - len(values) // 4]
        domain = svg.spread([v for v in values if v <= top + 2 * (top - values[0])])
    else:
        domain = svg.spread([v for v in values if v >= low])
    drawn = []
    for arm in arms:
        points = [
            (float(t["setting"][key]), _inside(t["value"], domain), _trial(words, t), t["setting"] == arm["setting"])
            for t in arm["trials"]
        ]
        if points:
            chart = charts.trials(
                points, title=f"{arm['name']}: validation {words.name} against {key}",
                x_domain=svg.spread(numbers, log=min(numbers) > 0), y_domain=domain,
                x_format=_plain, y_format=words.value,
            )  # fmt: skip
            drawn.append((arm["name"], chart))
    return {"rows": rows, "charts": drawn, "key": key}


def _inside(value: float | None, domain: tuple[float, float]) -> float | None:
    return None if value is None else min(max(value, domain[0]), domain[1])


def _trial(words: Words, trial: dict[str, Any]) -> str:
    outcome = words.value(trial["value"]) if trial["value"] is not None else trial["status"]
    return f"{wording.setting(trial['setting'])}: {outcome}"


def _failures(arms: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
    """Everything that did not end well, alike reasons of an arm together."""
    found: dict[tuple[str, str, str], dict[str, list[str]]] = {}
    for arm in arms:
        for kind, number, runs in (("final run, seed", "seed", arm["finals"]), ("tuning trial", "k", arm["trials"])):
            for run in runs:
                if run["status"] != "ok":
                    key = (arm["name"], run["status"], run["reason"] or "no reason was recorded")
                    found.setdefault(key, {}).setdefault(kind, []).append(str(run[number]))
    return [
        {"arm": arm, "status": status, "reason": reason, "where": [_plural(*item) for item in where.items()]}
        for (arm, status, reason), where in found.items()
    ]


def _plural(kind: str, numbers: Sequence[str]) -> str:
    if len(numbers) > 1:
        kind = kind.replace("run,", "runs,").replace("seed", "seeds").replace("trial", "trials")
    return f"{kind} {', '.join(numbers)}"


def _number(value: Any) -> float | None:
    return float(value) if isinstance(value, int | float) and math.isfinite(value) else None


def _plain(value: float) -> str:
    if value and not 1e-4 <= abs(value) < 1e5:
        return f"{value:.0e}".replace("e-0", "e-").replace("e+0", "e").replace("-", "−")
    return f"{value:g}".replace("-", "−")


def _loss(value: float) -> str:
    return f"{value:.3g}" if 1e-4 <= abs(value) < 1e5 or not value else f"{value:.1e}"
