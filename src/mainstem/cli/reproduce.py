"""`mainstem reproduce`: run papers' claims."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from ..errors import ConfigurationError


def reproduce(
    ids: Annotated[list[str] | None, typer.Argument(metavar="ID...", help="As in mainstem papers.")] = None,
    seeds: Annotated[str | None, typer.Option(metavar="0,1,2", help="Which seeds (the claim's own).")] = None,
    exact_only: Annotated[bool, typer.Option("--exact-only", help="Only the exact checks.")] = False,
    stale: Annotated[
        bool, typer.Option("--stale", help="Those whose code has changed since they were measured.")
    ] = False,
    workers: Annotated[
        int | None, typer.Option(metavar="N", help="Processes (one a core); 0: none beside this.")
    ] = None,
    ledger: Annotated[
        Path | None, typer.Option(metavar="FOLDER", help="Where verdicts are kept (the committed ones).")
    ] = None,
    save: Annotated[
        bool | None,
        typer.Option("--save/--no-save", help="Keep the result in the ledger (yes, with the claim's own seeds)."),
    ] = None,
    json: Annotated[bool, typer.Option("--json", help="Print an object per paper, one a line.")] = False,
) -> None:
    """Run a paper's claim: its exact checks, then its effect as a comparison with a control, and print the verdict.

    It says first what it will cost. The exit code is 1 if an exact check fails.

    [bold]Examples[/bold]

    [cyan]mainstem reproduce rezero[/cyan]

    [cyan]mainstem reproduce rezero --seeds 10,11,12,13,14[/cyan]

    [cyan]mainstem reproduce resnet wrn --exact-only --json[/cyan]

    [cyan]mainstem reproduce --stale[/cyan]
    """
    import json as text

    from ..claims import ledger as verdicts
    from ..claims import reproduce as run

    chosen = _chosen(list(ids or []), stale, ledger)
    given = None if seeds is None else _seeds(seeds)
    if save and exact_only:
        raise ConfigurationError("save: --exact-only measures no effect to keep")
    for id in chosen:  # of all, before any is run
        typer.echo(cost(id, given, exact_only), err=True)
    failed = False
    for id in chosen:
        found = run.reproduce(id, seeds=given, exact_only=exact_only, workers=workers, progress=None)
        failed |= not all(check["passed"] for check in found["exact"])
        if json:
            typer.echo(text.dumps(found, ensure_ascii=False))
        else:
            _show(id, found)
        if found["verdict"] is not None and (_own(id, given) and verdicts.folder(ledger) if save is None else save):
            typer.echo(f"Kept in {verdicts.write(found, ledger)}", err=True)
    if failed:
        raise typer.Exit(1)


def cost(id: str, seeds: list[int] | None, exact_only: bool) -> str:
    """What running a claim will take, in a line."""
    from .. import claims

    effect = claims.find(id).effect
    if exact_only or isinstance(effect, claims.NotTested):
        return f"{id}: exact checks only, seconds"
    count = len(effect.seeds if seeds is None else seeds)
    about = effect.seconds * count / len(effect.seeds)
    time = f"{about:.0f} s" if about < 120 else f"{about / 60:.0f} min"
    return f"{id}: about {time} on two cores ({count} seeds)"


def _own(id: str, seeds: list[int] | None) -> bool:
    """Whether these are the claim's own seeds."""
    from .. import claims

    effect = claims.find(id).effect
    return seeds is None or (isinstance(effect, claims.Effect) and seeds == list(effect.seeds))


def _chosen(ids: list[str], stale: bool, ledger: Path | None) -> list[str]:
    from ..catalogue import paper
    from .papers import listing

    for id in ids:
        paper(id)
    if stale:
        standing = [row["id"] for row in listing(ledger=ledger) if row["stale"]]
        chosen = [id for id in standing if not ids or id in ids]
        if not chosen:
            typer.echo("Nothing is stale.", err=True)
        return chosen
    if not ids:
        raise ConfigurationError("id: name at least one paper (mainstem papers lists them), or give --stale")
    return list(dict.fromkeys(ids))


def _seeds(text: str) -> list[int]:
    try:
        return [int(word) for word in text.split(",")]
    except ValueError:
        raise ConfigurationError(f"seeds: {text!r} is not a list of integers such as 0,1,2") from None


def _show(id: str, found: dict[str, Any]) -> None:
    from ..catalogue import paper
    from .paper import outcome

    entry = paper(id)
    typer.echo(f"\n{entry['title']} ({id})")
    typer.echo(f"The paper: {entry['claim']}")
    for check in found["exact"]:
        mark = "holds" if check["passed"] else "FAILS"
        error = "not finite" if check["error"] is None else f"{check['error']:.3g}"
        typer.echo(f"  {mark}  {check['name']} (error {error}, tolerance {check['tolerance']:.3g})")
    for line in outcome(found):
        typer.echo(line)
