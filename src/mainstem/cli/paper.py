"""`mainstem paper`: the page of one paper."""

from __future__ import annotations

from collections.abc import Iterator
from pathlib import Path
from typing import Annotated, Any

import typer


def paper(
    id: Annotated[str, typer.Argument(metavar="ID", help="As in mainstem papers.")],
    ledger: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Measured verdicts (the committed ones).")
    ] = None,
) -> None:
    """Show one paper: what it proposes and claims, where its code is, where that departs, and what was measured here.

    [bold]Example[/bold]

    [cyan]mainstem paper rezero[/cyan]
    """
    from .. import catalogue
    from ..claims import ledger as measured

    entry = catalogue.paper(id)
    found = measured.read(id, ledger)
    for line in page(entry, found, found is not None and measured.is_stale(found)):
        typer.echo(line)


def page(entry: dict[str, Any], found: dict[str, Any] | None, stale: bool) -> Iterator[str]:
    """The lines of a paper's page, from its catalogue entry and its ledger entry, if it has one."""
    yield entry["title"]
    yield ", ".join(entry["authors"])
    link = entry["url"] or f"https://arxiv.org/abs/{entry['arxiv']}"
    yield f"{entry['venue']}, {entry['year']}. {link}" if entry["venue"] else f"{entry['year']}. {link}"
    yield from _section("What it proposes", entry["what"])
    yield from _section("What it claims", entry["claim"])
    yield from _section("Code", *entry["code"])
    yield from _section("Departures", entry["departures"])
    if entry["needs"]:
        yield from _section("Needs", f"pip install 'mainstem[{','.join(entry['needs'])}]'")
    lines = ["not yet"] if found is None else list(outcome(found))
    if stale:
        lines.append("Stale: the code has changed since.")
    yield from _section("Measured here", *lines)
    yield from _section("Run it", f"mainstem reproduce {entry['id']}")


def outcome(found: dict[str, Any]) -> Iterator[str]:
    """What a claim's run found, in lines: expectation, contrasts, verdict, and what it was measured on."""
    if found["expected"]:
        yield f"Expected: {found['expected']}"
    for contrast in found["measured"]:
        yield f"  {measurement(contrast)}"
    passed = sum(check["passed"] for check in found["exact"])
    yield f"Exact checks: {passed} of {len(found['exact'])} hold"
    yield f"Verdict: {found['verdict'] or 'none, the effect was not run'}"
    if found.get("reason"):
        yield f"Reason: {found['reason']}"
    if found["seeds"]:
        used, versions = found["hardware"], found["versions"]
        yield (
            f"Seeds {', '.join(map(str, found['seeds']))}; {found['seconds']:.0f} s on {used['cores']} cores"
            f" ({used['cpu']}), {used['workers']} workers; torch {versions['torch']}"
        )


def measurement(contrast: dict[str, Any]) -> str:
    """One contrast in a line: mean, interval, threshold, verdict."""
    unit = f" {contrast['unit']}" if contrast["unit"] else ""
    mean, low, high = (_number(contrast[name]) for name in ("mean", "low", "high"))
    wanted = "control, not " if contrast["role"] == "control" else ""
    asked = f"{wanted}{contrast['beyond']} {contrast['threshold']:.4g}"
    return f"{contrast['name']}: {mean}{unit} (95 %: {low} to {high}); {asked}: {contrast['verdict']}"


def _number(value: float | None) -> str:
    return "n/a" if value is None else f"{value:.4g}"


def _section(title: str, *lines: str) -> Iterator[str]:
    import textwrap

    yield ""
    yield title
    for line in lines:
        indent = "  " + " " * (len(line) - len(line.lstrip()))
        yield from textwrap.wrap(
            line.strip(), 100, initial_indent=indent, subsequent_indent=indent, break_on_hyphens=False
        )
