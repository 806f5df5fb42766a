"""Networks of 1000 layers: that they train, and what a layer keeps in memory with and without checkpointing.

Memory is the growth from one depth to another of all that training holds at its peak, divided by the layers between;
weights, gradients and Adam's state are 66 KiB a layer of it.
"""

from __future__ import annotations

import itertools
import math
from typing import Any

import torch
import torch.nn.functional as F
from common import arguments, bar, images, show, tidy
from torch import nn

import mainstem
from mainstem import registry
from mainstem.bench.cost import measure
from mainstem.errors import ConfigurationError
from mainstem.recipe import Recipe

DEPTHS = (250, 500, 1000)
WIDTH, BATCH = 64, 256
DATA = images(8, channels=1, count=BATCH)
RECIPE = Recipe.parse({"optimiser": "adam", "lr": 1e-3, "precision": "fp32", "batch_size": BATCH})


def build(depth: int, connection: str, **options: Any) -> nn.Module:
    return mainstem.network_for(f"mlp-{depth}x{WIDTH}", DATA, connection=connection, seed=0, **options)


def loss_after(model: nn.Module, steps: int, device: torch.device) -> tuple[float, float]:
    """The training loss of the first step and of the last."""
    x, y = DATA.train.x.to(device), DATA.train.y.to(device)
    model.to(device).train()
    optimiser = torch.optim.Adam(model.parameters(), RECIPE.lr)
    losses = []
    for _ in range(steps):
        loss = F.cross_entropy(model(x), y)
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        losses.append(float(loss.detach()))
    return losses[0], losses[-1]


def peak(depth: int, connection: str, checkpoint: bool, device: torch.device) -> float:
    """Bytes of weights, gradients, the optimiser's state and the most that a training step holds besides."""
    model = build(depth, connection, checkpoint=checkpoint)
    found = measure(model, DATA, RECIPE, device)["peak_bytes"]
    tidy()
    return math.nan if found is None else float(found)


def main() -> None:
    told = arguments(__doc__, steps=10, only="")
    rows = []
    for connection in registry.names("connection"):
        if not connection.startswith(told.only):
            continue
        try:
            first, last = loss_after(build(DEPTHS[-1], connection, checkpoint=True), told.steps, told.device)
        except ConfigurationError as error:
            rows.append([connection, "", "", "", f"does not fit: {error}"])
            continue
        trains = "yes" if math.isfinite(last) and last < first else "no"
        row = [connection, f"{first:.3g}", f"{last:.3g}", trains]
        if not math.isfinite(first):  # a step of it cannot be profiled
            rows.append(row)
            continue
        for checkpoint in (False, True):
            peaks = [peak(depth, connection, checkpoint, told.device) for depth in DEPTHS]
            each = [(b - a) / (n - m) / 1024 for (a, b), (m, n) in zip(_pairs(peaks), _pairs(DEPTHS), strict=True)]
            row.append(" ".join(f"{kib:.0f}" for kib in each))
            if checkpoint:
                row.append(bar(max(each) / min(each), at_most=1.1))
        rows.append(row)
        tidy()
    columns = ["connection", "first loss", "last loss", "trains", "KiB a layer", "checkpointed", "constant"]
    spans = ", ".join(f"{a} to {b}" for a, b in _pairs(DEPTHS))
    show(
        f"mlp-<depth>x{WIDTH}, batch {BATCH}: {told.steps} steps at {DEPTHS[-1]} layers; memory {spans}", columns, rows
    )


def _pairs(values: Any) -> list[tuple[Any, Any]]:
    return list(itertools.pairwise(values))


if __name__ == "__main__":
    main()
