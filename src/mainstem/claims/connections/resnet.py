"""ResNet: plain networks get worse to train as they get deeper, residual ones do not.

Design. Digits with all training images, augmentation off, ten epochs; the training loss is the mean over the last
epoch. Plain and residual networks of 8 and 50 layers (24 blocks; 6n+2 has no 10, so the shallow one has 8), each with
its own learning rate from four by validation cross-entropy. Everything is a logarithm of a ratio of losses, so that 0
is "equal" and ln 2 "twice". The control for "no worse when deeper" is the same network with its shortcuts off.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from ...network import network
from .. import Check, Claim, Contrast, Effect, Lab

MARGIN = math.log(1.1)  # a training loss within 10 % is no worse


def exact() -> Iterator[Check]:
    for depth, expected in ((18, 11_689_512), (50, 25_557_032)):
        with torch.device("meta"):
            count = sum(p.numel() for p in network(f"resnet-{depth}", classes=1000).parameters())
        yield Check(f"resnet-{depth} has {expected:,} parameters", abs(count - expected))
    yield from zeroed_branch()


def zeroed_branch() -> Iterator[Check]:
    """With a branch of zeros, a block is ReLU(x)."""
    model = network("resnet-20", classes=10, in_channels=1, seed=0).eval()
    block = model.stream[1]
    nn.init.zeros_(block.branch.get_parameter("norm2.weight"))
    x = torch.randn(4, 16, 8, 8, generator=torch.Generator().manual_seed(0))
    with torch.no_grad():
        yield Check.equal("a zeroed branch leaves ReLU(x)", block(x)[0], x.relu())


def measure(lab: Lab) -> dict[str, np.ndarray]:
    runs = lab.compare(
        {
            "plain-8": "resnet-8+connection=plain",
            "plain-50": "resnet-50+stages=cifar+connection=plain",
            "residual-8": "resnet-8",
            "residual-50": "resnet-50+stages=cifar",
        },
        "digits",
        lr=(0.1, 0.03, 0.3, 0.01),
        budget="epochs=10",
        metric="nats",
        recipe={"augment": False},
    )
    loss = {name: np.log(each.last("train_loss", failed=math.log(10))) for name, each in runs.items()}
    return {
        "plain, 50 layers to 8": loss["plain-50"] - loss["plain-8"],
        "residual, 50 layers to 8": loss["residual-50"] - loss["residual-8"],
        "plain, no worse at 50 layers": loss["plain-50"] - loss["plain-8"],
    }


claim = Claim(
    exact=exact,
    effect=Effect(
        expected="A plain network of 50 layers ends with at least twice the training loss of one of 8; a "
        "residual one of "
        "50 layers is within 10 % of one of 8, or better.",
        contrasts=(
            Contrast("plain, 50 layers to 8", math.log(2), "above", unit="ln loss ratio"),
            Contrast("residual, 50 layers to 8", MARGIN, "below", unit="ln loss ratio"),
            Contrast("plain, no worse at 50 layers", MARGIN, "below", role="control", unit="ln loss ratio"),
        ),
        measure=measure,
        seconds=120,
    ),
)
