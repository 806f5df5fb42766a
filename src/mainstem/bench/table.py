"""A comparison's result, or its plan, as text for a terminal."""

from __future__ import annotations

import sys
from typing import IO, Any

from rich import box
from rich.console import Console
from rich.table import Table
from rich.text import Text

from . import wording
from .wording import MARKS, Result, Words

STYLES = {"better": "bold green", "worse": "bold red", "failed": "bold yellow"}
NONE: dict[str, Any] = {"mean": None, "low": None, "high": None, "p_holm": None}
PLAIN_WIDTH = 160  # of a file or a pipe


def print_result(result: Result, file: IO[str] | None = None, width: int | None = None) -> None:
    """Print the arms, best first, and what was found in a sentence. Costs appear where the width allows them."""
    console = _console(file, width)
    words = Words.of(result)
    console.print(result_table(result, console.width))
    tests = sum(bool(arm["difference"]) and arm["difference"]["p_holm"] is not None for arm in result["arms"])
    if any(arm["low"] is not None for arm in result["arms"]):
        corrected = f"; p is corrected for {tests} comparisons" if tests > 1 else ""
        console.print(Text(f"± is half a 95 % interval{corrected}.", style="dim"))
    console.print()
    console.print(Text(wording.headline(result) + ".", style="bold"))
    ties = [arm for arm in wording.ranked(result) if words.verdict(arm) == "tie"]
    for arm in ties:
        seen = words.unseen(arm)
        if seen != "–":
            step = f" {words.step}" if words.step else ""
            console.print(
                Text(f"{arm['name']} ties: a true difference of {seen}{step} would have been seen 4 times in 5.")
            )
    for arm in result["arms"]:
        if arm["status"] != "ok" and arm["reason"]:
            console.print(Text(f"{arm['name']} {arm['status']}: {arm['reason'].splitlines()[0]}", style="yellow"))
    for note in result["notes"]:
        console.print(Text(f"Note: {note}", style="dim"))


def result_table(result: Result, width: int) -> Table:
    """The table of `print_result` for a terminal of `width` columns."""
    words = Words.of(result)
    costs = width >= 110
    table = _table("arm")
    for heading in (words.heading.lower() if words.unit else words.heading, "difference", "p"):
        table.add_column(heading, justify="right", no_wrap=True)
    table.add_column("verdict", no_wrap=True)
    for heading in ("params", "FLOPs", "step", "memory") if costs else ("step",):
        table.add_column(heading, justify="right", no_wrap=True)
    for arm in wording.ranked(result):
        verdict = words.verdict(arm)
        difference = arm["difference"] or NONE
        baseline = arm["name"] == result["baseline"]
        cost = arm["cost"]
        written = [
            wording.count(cost["parameters"]),
            wording.count(cost["flops"]),
            wording.duration(cost["step_seconds"]),
            wording.size(cost["peak_bytes"]),
        ]
        table.add_row(
            _name(arm["name"], width),
            words.value(arm["mean"]) + words.margin(arm),
            "" if baseline else words.difference(difference["mean"]) + words.margin(difference),
            "" if baseline else wording.probability(difference["p_holm"]),
            Text(f"{MARKS.get(verdict, ' ')} {verdict}", style=STYLES.get(verdict, "dim")),
            *(written if costs else written[2:3]),
        )
    return table


def print_plan(plan: dict[str, Any], file: IO[str] | None = None, width: int | None = None) -> None:
    """Print what `mainstem.bench.estimate` says a comparison would run, and how long it would take."""
    console = _console(file, width)
    table = _table("arm")
    for heading in ("runs", "steps each", "step", "time each"):
        table.add_column(heading, justify="right", no_wrap=True)
    for arm in plan["arms"]:
        steps = "–" if arm["steps"] is None else f"{arm['steps']:,}".replace(",", " ")
        times = wording.duration(arm["step_seconds"]), wording.duration(arm["seconds"])
        table.add_row(_name(arm["name"], console.width), str(arm["runs"]), steps, *times)
    console.print(table)
    for arm in plan["arms"]:
        if arm["reason"]:
            console.print(Text(f"{arm['name']} would fail: {arm['reason'].splitlines()[0]}", style="yellow"))
    data = plan["data"]
    about = wording.duration(plan["seconds"]) if plan["seconds"] is not None else "an unknown time"
    workers = f"{plan['workers']} worker{'s' if plan['workers'] != 1 else ''}" if plan["workers"] else "this process"
    console.print(Text(f"{plan['runs']} runs on {data['name']}, about {about} with {workers}. Nothing was run."))


def _table(first: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD, pad_edge=False, padding=(0, 1, 0, 0), show_edge=False)
    table.add_column(first, overflow="fold", min_width=16)
    return table


def _name(name: str, width: int) -> Text:
    """An arm's name, on a line for each of its options where the terminal is narrow for it."""
    return Text(name.replace("+", "\n+") if len(name) > width // 4 else name)


def _console(file: IO[str] | None, width: int | None) -> Console:
    """Colours and the terminal's width on a terminal; plain text of a fixed width elsewhere."""
    file = file or sys.stdout
    console = Console(file=file, highlight=False, width=width)
    if width is None and not console.is_terminal:
        return Console(file=file, highlight=False, width=PLAIN_WIDTH, color_system=None)
    return console
