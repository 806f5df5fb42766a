"""`mainstem cite`: BibTeX of the papers whose parts a network uses."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def cite(
    network: Annotated[
        str,
        typer.Argument(
            metavar="NETWORK_OR_FOLDER", help="A network with options, as for compare, or the folder of a saved one."
        ),
    ],
) -> None:
    """Print BibTeX of the papers whose parts a network uses.

    [bold]Examples[/bold]

    [cyan]mainstem cite wrn-28-10[/cyan]

    [cyan]mainstem cite "resnet-56+connection=stochastic-depth(rezero)"[/cyan]

    [cyan]mainstem cite runs/digits[/cyan]
    """
    from .. import catalogue

    entries = catalogue.cite(network if Path(network).is_dir() else _built(network))
    if entries:
        typer.echo(entries)
    else:
        typer.echo(f"{network} uses no part that comes from a paper in the catalogue", err=True)


def _built(text: str):
    """The network that `text` describes, without weights."""
    import inspect

    import torch

    from .. import registry
    from ..bench.experiment import parse_arm
    from ..network import network

    arm = parse_arm(text)
    build, _ = registry.match("network", arm.network)
    # What data would decide, where the family has no default of its own; no paper depends on it.
    sizes = {
        name: 1
        for name, parameter in inspect.signature(build).parameters.items()
        if name in ("classes", "in_channels") and parameter.default is parameter.empty
    }
    with torch.device("meta"):
        return network(arm.network, **{**sizes, **arm.overrides})
