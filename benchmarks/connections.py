"""What each registered connection costs: a training step and its peak memory, as ratios to plain addition.

Nothing is asked of these figures; they tell what a connection adds to the same network, and what skipping saves.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as F
from common import arguments, images, in_turn, milliseconds, show, tidy
from torch import Tensor, nn

import mainstem
from mainstem import registry
from mainstem.autopick import arrange, place
from mainstem.bench.cost import measure
from mainstem.errors import ConfigurationError
from mainstem.optimisers import optimiser
from mainstem.recipe import Recipe

NETWORKS = ["resnet-32", "mlp-32x256"]
OPTIONS = {"stochastic-depth": ["stochastic-depth(final=0.5)", "stochastic-depth(final=0.5, mode=sample)"]}
DATA = images(8, channels=1, count=256)
CHOICE = {"layout": "channels-last"}
RECIPE = Recipe.parse({"lr": 0.01, "layout": CHOICE["layout"], "precision": "fp32"})


def connections() -> list[str]:
    """Every registered connection but the addition itself, some with options."""
    names = (name for name in registry.names("connection") if name != "add")
    return [spec for name in names for spec in OPTIONS.get(name, [name])]


def build(network: str, connection: str) -> nn.Module:
    return mainstem.network_for(network, DATA, connection=connection, seed=0)


def training_step(model: nn.Module, x: Tensor, y: Tensor) -> Callable[[], Any]:
    place(model.to(x.device).train(), CHOICE)
    optim = optimiser(model, RECIPE)

    def step() -> None:
        loss = F.cross_entropy(model(x), y)
        optim.zero_grad()
        loss.backward()
        optim.step()

    return step


def peak(model: nn.Module, device: torch.device) -> float:
    return float(measure(model, DATA, RECIPE, device)["peak_bytes"] or float("nan"))


def main() -> None:
    told = arguments(__doc__, rounds=40, seconds=10.0)
    x, y = DATA.train.x[: RECIPE.batch_size].to(told.device), DATA.train.y[: RECIPE.batch_size].to(told.device)
    x = arrange(x, CHOICE["layout"])
    rows = []
    for network in NETWORKS:
        plain = training_step(build(network, "add"), x, y)
        memory = peak(build(network, "add"), told.device)
        for connection in connections():
            try:
                step = training_step(build(network, connection), x, y)
            except ConfigurationError as error:
                rows.append([f"{network} {connection}", "", "", f"does not fit: {error}"])
                continue
            times = in_turn(step, plain, told.rounds, told.seconds, told.device)
            held = peak(build(network, connection), told.device)
            cells = [f"{network} {connection}", milliseconds(times.ours), milliseconds(times.theirs)]
            rows.append([*cells, f"{1 / times.speedup:.2f}", f"{held / memory:.2f}"])
            tidy()
    columns = ["network and connection", "step (ms)", "addition (ms)", "step ratio", "memory ratio"]
    show("Connections against plain addition, 8x8 images, batch 64, fp32, channels-last", columns, rows, told.device)


if __name__ == "__main__":
    main()
