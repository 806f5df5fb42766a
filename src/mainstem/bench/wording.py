"""A result in words and numbers that people read: shared by the terminal's table and the report."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

Result = dict[str, Any]
MARKS = {"better": "▲", "worse": "▼", "tie": "=", "unknown": "?"}


@dataclass(frozen=True)
class Words:
    """How one result's metric is written: with the decimals that its intervals deserve."""

    name: str
    unit: str
    decimals: int
    higher_is_better: bool
    baseline: str

    @classmethod
    def of(cls, result: Result) -> Words:
        metric = result["metric"]
        arms = [arm for arm in result["arms"] if arm["mean"] is not None]
        bounds = [*arms, *(arm["difference"] for arm in arms if arm["difference"])]
        halves = [(b["high"] - b["low"]) / 2 for b in bounds if b["low"] is not None and b["high"] > b["low"]]
        largest = max((abs(arm["mean"]) for arm in arms), default=1.0) or 1.0
        halves.sort()
        size = halves[len(halves) // 4] if halves else largest / 100
        decimals = min(max(1 - math.floor(math.log10(size)), 0), 6) if size > 0 else 2
        return cls(metric["name"], metric["unit"], decimals, bool(metric["higher_is_better"]), result["baseline"])

    @property
    def heading(self) -> str:
        name = self.name[0].upper() + self.name[1:] if len(self.name) > 4 else self.name
        return f"{name}, {self.unit}" if self.unit and self.unit != self.name else name

    @property
    def step(self) -> str:
        """The unit of a difference."""
        return {"%": "points", self.name: ""}.get(self.unit, self.unit)

    def value(self, number: float | None) -> str:
        return "–" if number is None else _signed(f"{number:.{self.decimals}f}")

    def difference(self, number: float | None) -> str:
        if number is None:
            return "–"
        text = f"{number:+.{self.decimals}f}"
        return _signed(text if float(text) else text[1:])

    def margin(self, row: dict[str, Any]) -> str:
        """` ± half an interval`, or nothing where there is none."""
        return "" if row["low"] is None else f" ± {(row['high'] - row['low']) / 2:.{self.decimals}f}"

    def interval(self, row: dict[str, Any], signed: bool = False) -> str:
        """`low to high`, or nothing where there is no interval."""
        if row["low"] is None:
            return ""
        write = self.difference if signed else self.value
        return f"{write(row['low'])} to {write(row['high'])}"

    def verdict(self, arm: dict[str, Any]) -> str:
        if arm["name"] == self.baseline:
            return "baseline"
        if arm["status"] == "failed":
            return "failed"
        return arm["difference"]["verdict"] if arm["difference"] else "unknown"

    def told(self, arm: dict[str, Any]) -> str:
        """An arm's difference to the baseline, as a sentence."""
        difference = arm["difference"]
        if not difference or difference["mean"] is None:
            return f"{arm['name']}: no difference measured"
        bounds = self.interval(difference, signed=True)
        step = f" {self.step}" if self.step else ""
        return (
            f"{arm['name']}: {self.difference(difference['mean'])}{step} to {self.baseline}"
            + (f", 95 % interval {bounds}" if bounds else "")
            + f": {difference['verdict']}"
        )

    def unseen(self, arm: dict[str, Any]) -> str:
        """The smallest difference that a tie could have shown."""
        difference = arm["difference"] or {}
        seen = difference.get("detectable")
        return "–" if seen is None else f"{seen:.{self.decimals}f}"


def _signed(text: str) -> str:
    return text.replace("-", "−")


def ranked(result: Result) -> list[dict[str, Any]]:
    """The arms, the best mean first and those without one last."""
    sign = -1 if result["metric"]["higher_is_better"] else 1
    return sorted(result["arms"], key=lambda arm: math.inf if arm["mean"] is None else sign * arm["mean"])


def headline(result: Result) -> str:
    """What the comparison found, in a sentence."""
    words = Words.of(result)
    baseline = result["baseline"]
    arms = [arm for arm in ranked(result) if arm["mean"] is not None]
    others = [arm for arm in arms if arm["name"] != baseline]
    if not arms:
        return "No arm finished"
    if len(result["arms"]) == 1:
        unit = "" if words.unit == words.name else " %" if words.unit == "%" else f" {words.unit}"
        return f"{arms[0]['name']} reaches {words.value(arms[0]['mean'])}{unit} {words.name}"
    if len(others) == len(arms):
        return f"{baseline}, the baseline, did not finish"
    found = {verdict: [arm for arm in others if words.verdict(arm) == verdict] for verdict in MARKS}
    if not others:
        return f"Only {baseline}, the baseline, finished"
    if len(found["unknown"]) == len(others):
        return "Too few runs for a verdict"
    if found["better"]:
        best = found["better"][0]
        size = _signed(f"{abs(best['difference']['mean']):.{words.decimals}f} {words.step}".strip())
        return f"{best['name']} beats {baseline} by {size}"
    if len(found["worse"]) == len(others):
        return f"{baseline} beats {'the other arm' if len(others) == 1 else 'every other arm'}"
    if len(found["tie"]) == len(others):
        return f"{others[0]['name']} and {baseline} tie" if len(others) == 1 else f"Every arm ties with {baseline}"
    return f"No arm beats {baseline}"


def tally(result: Result) -> str:
    """How many arms are better, tied, worse or failed, in words."""
    words = Words.of(result)
    verdicts = [words.verdict(arm) for arm in result["arms"]]
    names = {"better": "better than", "tie": "tied with", "worse": "worse than"}
    counts = [f"{verdicts.count(v)} {text}" for v, text in names.items() if v in verdicts]
    parts = [f"{', '.join(counts)} {result['baseline']}"] if counts else []
    parts += [f"{verdicts.count(v)} {text}" for v, text in [("unknown", "without a verdict"), ("failed", "failed")]
              if v in verdicts]  # fmt: skip
    return "; ".join(parts)


def count(number: float | None) -> str:
    """`269 k`, `5.03 M`: three figures and a decimal prefix."""
    return _scaled(number, 1000.0, ("", "k", "M", "G", "T", "P"))


def size(number: float | None) -> str:
    """Bytes, `8.38 MB`; one MB is a million."""
    return _scaled(number, 1000.0, ("B", "kB", "MB", "GB", "TB"))


def duration(seconds: float | None) -> str:
    """`17.8 ms`, `2.4 s`, `3 min 20 s`, `1 h 5 min`."""
    if seconds is None:
        return "–"
    for least, factor, unit in ((1.0, 1.0, "s"), (1e-3, 1e3, "ms"), (0.0, 1e6, "µs")):
        if seconds >= least and seconds < 60:
            return f"{_figures(seconds * factor)} {unit}"
    minutes, rest = divmod(round(seconds), 60)
    if minutes < 60:
        return f"{minutes} min {rest} s" if rest else f"{minutes} min"
    hours, minutes = divmod(minutes, 60)
    return f"{hours} h {minutes} min" if minutes else f"{hours} h"


def _scaled(number: float | None, base: float, prefixes: Sequence[str]) -> str:
    if number is None:
        return "–"
    power = 0
    while number >= base * 0.9995 and power < len(prefixes) - 1:
        number, power = number / base, power + 1
    text = f"{number:.0f}" if power == 0 and number == round(number) else _figures(number)
    return f"{text} {prefixes[power]}".strip()


def _figures(number: float) -> str:
    """Three significant figures, without an exponent."""
    number = float(f"{number:.3g}")
    decimals = max(0, 2 - math.floor(math.log10(abs(number)) + 1e-9)) if number else 0
    return f"{number:.{decimals}f}"


def probability(p: float | None) -> str:
    """A p value as tables print it."""
    if p is None:
        return "–"
    return "<0.001" if p < 0.001 else f"{p:.3f}" if p < 0.0995 else f"{p:.2f}"


def setting(values: dict[str, Any] | None) -> str:
    """`lr=0.05, weight_decay=0.0005`."""
    return ", ".join(f"{k}={v:.3g}" if isinstance(v, float) else f"{k}={v}" for k, v in (values or {}).items())
