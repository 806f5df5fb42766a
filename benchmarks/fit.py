"""`fit` against a hand-written minimal loop: same network, batches, layout, precision and optimiser, step by step."""

from __future__ import annotations

import copy
import statistics
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from common import Times, against, arguments, bar, images, milliseconds, show, tidy
from torch import nn

import mainstem
from mainstem.data import Data
from mainstem.recipe import Recipe

BAR, LEAST = 1.03, 0.005  # at most, where a step takes so many seconds or more


@dataclass
class Case:
    network: str
    batch: int
    data: Data
    layout: str = "contiguous"
    precision: str = "fp32"


def cases() -> list[Case]:
    digits = images(8, channels=1, count=1024)
    colour = images(32, count=512)
    return [
        Case("mlp-2x32", 64, digits),
        Case("mlp-8x512", 128, digits),
        Case("resnet-20", 64, digits),
        Case("resnet-20", 64, digits, "channels-last", "bf16"),
        Case("wrn-16-2", 64, colour),
        Case("wrn-16-2", 64, colour, "channels-last", "bf16"),
    ]


class Loop:
    """The loop that one writes by hand; a call is one step."""

    def __init__(self, network: nn.Module, case: Case, device: torch.device):
        self.last = case.layout == "channels-last"
        self.network = network.to(device).train()
        if self.last:
            self.network = network.to(memory_format=torch.channels_last)  # type: ignore[call-overload]
        self.x, self.y = case.data.train.x.to(device), case.data.train.y.to(device)
        self.optimiser = torch.optim.SGD(
            network.parameters(), lr=0.01, momentum=0.9, nesterov=True, weight_decay=5e-4, fused=True
        )
        self.case, self.device, self.order, self.at = case, device, torch.empty(0), 0

    def __call__(self) -> None:
        if self.at + self.case.batch > len(self.order):
            self.order, self.at = torch.randperm(len(self.x), device=self.device), 0
        rows = self.order[self.at : self.at + self.case.batch]
        self.at += self.case.batch
        x, y = self.x[rows], self.y[rows]
        if self.last:
            x = x.contiguous(memory_format=torch.channels_last)
        with torch.autocast(self.device.type, torch.bfloat16, enabled=self.case.precision == "bf16"):
            output = self.network(x)
            loss = F.cross_entropy(output, y)
        self.optimiser.zero_grad()
        loss.backward()
        self.optimiser.step()


def compare(case: Case, rounds: int, seconds: float, device: torch.device) -> Times:
    network = mainstem.network_for(case.network, case.data, seed=0)
    loop = Loop(copy.deepcopy(network), case, device)
    told: dict[str, Any] = {"layout": case.layout, "precision": case.precision, "batch_size": case.batch, "lr": 0.01}
    return against(network, case.data, Recipe.parse(told), loop, rounds, seconds, device)


def main() -> None:
    told = arguments(__doc__, rounds=60, seconds=30.0)
    rows = []
    for case in cases():
        times = compare(case, told.rounds, told.seconds, told.device)
        ratio, slow = 1 / times.speedup, statistics.median(times.theirs) >= LEAST
        name = f"{case.network}, {'x'.join(map(str, case.data.shape))}, batch {case.batch}"
        cells = [name, f"{case.layout} {case.precision}", milliseconds(times.ours), milliseconds(times.theirs)]
        rows.append([*cells, f"{ratio:.3f}", bar(ratio, at_most=BAR if slow else None)])
        tidy()
    columns = ["network", "layout, precision", "fit (ms)", "loop (ms)", "fit / loop", "bar"]
    show("A training step: fit against a hand-written loop", columns, rows, told.device)


if __name__ == "__main__":
    main()
