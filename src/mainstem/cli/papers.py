"""`mainstem papers`: what is here, and how its claims stand."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import Annotated, Any

import typer

UNMEASURED = "not measured"


def papers(
    area: Annotated[str | None, typer.Option(metavar="AREA", help="Only the papers of one area.")] = None,
    json: Annotated[bool, typer.Option("--json", help="Print a list of objects instead of a table.")] = False,
    ledger: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Measured verdicts (the committed ones).")
    ] = None,
) -> None:
    """List the papers that have code here, with the verdict that was measured on each one's claim.

    holds, fails and undecided come from the 95 % interval of the measured effect; not tested has a reason, which the
    paper's page shows. A verdict is stale where the code has changed since.

    [bold]Examples[/bold]

    [cyan]mainstem papers --area connections[/cyan]

    [cyan]mainstem papers --json[/cyan]
    """
    rows = listing(area, ledger)
    if json:
        import json as text

        typer.echo(text.dumps(rows, indent=1, ensure_ascii=False))
        return
    table = [(row["id"], row["area"], str(row["year"]), _standing(row), row["title"]) for row in rows]
    head = ("id", "area", "year", "verdict", "title")
    widths = [max(len(row[i]) for row in [head, *table]) for i in range(len(head) - 1)]
    for row in [head, *table]:
        typer.echo("  ".join([*(cell.ljust(width) for cell, width in zip(row, widths, strict=False)), row[-1]]))
    stale = sum(row["stale"] for row in rows)
    if stale:
        typer.echo(
            f"\n{stale} stale: the code has changed since they were measured; mainstem reproduce --stale", err=True
        )


def listing(area: str | None = None, ledger: Path | None = None) -> list[dict[str, Any]]:
    """The catalogue's papers with `verdict` (None if not measured) and `stale`.

    Raises `ConfigurationError` for an unknown area. A damaged ledger file is named on stderr, and counts as none.
    """
    from ..catalogue import papers
    from ..claims.ledger import is_stale, read
    from ..errors import DamagedFileError, unknown

    entries = papers()
    areas = {entry["area"] for entry in entries}
    if area is not None and area not in areas:
        raise unknown("area", area, areas)
    rows = []
    for entry in entries:
        if area not in (None, entry["area"]):
            continue
        try:
            measured = read(entry["id"], ledger)
        except DamagedFileError as error:
            print(f"mainstem: {error}", file=sys.stderr)
            measured = None
        standing = {"verdict": measured and measured["verdict"], "stale": measured is not None and is_stale(measured)}
        rows.append({**entry, **standing})
    return rows


def _standing(row: dict[str, Any]) -> str:
    return f"{row['verdict']} (stale)" if row["stale"] else row["verdict"] or UNMEASURED
