"""Results of several comparisons side by side, as a Markdown table: one row an arm, one column a comparison.

    python experiments/table.py experiments/connections/*.json

A cell holds the mean on the test split, its difference to the baseline with the 95 % interval, and the verdict of the
corrected test: better, worse, or tie.
"""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

MARKS = {"better": "**better**", "worse": "worse", "tie": "tie", "unknown": "?"}


def cell(arm: dict[str, Any] | None, digits: int) -> str:
    if arm is None:
        return ""
    if arm["mean"] is None:
        return arm["reason"] or arm["status"]
    text = f"{arm['mean']:.{digits}f}"
    difference = arm["difference"]
    if difference is not None and difference["mean"] is not None:
        mean, low, high = (f"{difference[key]:+.{digits}f}" for key in ("mean", "low", "high"))
        text += f" ({mean} [{low}, {high}] {MARKS[difference['verdict']]})"
    return text


def heading(name: str, result: dict[str, Any]) -> str:
    metric = result["metric"]
    unit = f", {metric['unit']}" if metric["unit"] not in (None, "", metric["name"]) else ""
    return f"{name}: {metric['name']}{unit}, {'higher' if metric['higher_is_better'] else 'lower'} is better"


def table(results: dict[str, dict[str, Any]]) -> str:
    arms = {name: {arm["name"]: arm for arm in result["arms"]} for name, result in results.items()}
    rows = list(dict.fromkeys(arm for found in arms.values() for arm in found))
    lines = ["| | " + " | ".join(heading(name, result) for name, result in results.items()) + " |"]
    lines.append("|---" * (len(results) + 1) + "|")
    for row in rows:
        cells = []
        for name, result in results.items():
            digits = 1 if result["metric"]["unit"] == "%" else 3
            cells.append(cell(arms[name].get(row), digits))
        lines.append(f"| {row} | " + " | ".join(cells) + " |")
    return "\n".join(lines)


def main() -> None:
    paths = [Path(argument) for argument in sys.argv[1:]]
    if not paths:
        sys.exit("give the result.json files of comparisons")
    print(table({path.stem: json.loads(path.read_text(encoding="utf-8")) for path in paths}))


if __name__ == "__main__":
    main()
