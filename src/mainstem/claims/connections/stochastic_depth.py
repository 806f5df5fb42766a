"""Stochastic depth: dropping layers in training saves time and regularises.

Design. 500 digits, a fifth of their training labels replaced by a random other class, splits redrawn with every seed;
a residual network of 50 layers (24 blocks; 50 blocks would take this past five minutes), 300 steps. Each arm has its
own learning rate from three by validation accuracy (validation and test labels are clean). The control has no coins:
every branch is always run and scaled by the probability with which stochastic depth keeps it, so that what remains is
the shrinking of the branches. Time is the ratio of training seconds over the same runs.
"""

from __future__ import annotations

import functools
from collections.abc import Iterator

import numpy as np
import torch

from ...bench.experiment import Arm
from ...connections import StochasticDepth
from ...network import network
from ...stream import Call, Connection, Layer, State
from .. import Check, Claim, Contrast, Effect, Lab


class ExpectedDepth(StochasticDepth):
    """The branch scaled by its survival probability, in training as in evaluation, and never dropped."""

    def forward(self, state: State, branch: Call) -> State:
        return self.inner.write(self.inner.carry(state, branch), self.survival * branch(self.inner.read(state)))


def exact() -> Iterator[Check]:
    x = torch.randn(4, 1, 8, 8, generator=torch.Generator().manual_seed(0))
    plain = network("resnet-50", stages="cifar", classes=10, in_channels=1, seed=0)
    dropped = network(
        "resnet-50", stages="cifar", classes=10, in_channels=1, seed=0, connection="stochastic-depth(final=1.0)"
    )
    yield Check.equal("survival 1 is the plain network", dropped(x), plain(x), 1e-6)

    torch.manual_seed(0)
    branch = torch.nn.Linear(6, 6)
    layer = Layer(branch, StochasticDepth(6, index=3, depth=8)).eval()
    v = torch.randn(5, 6)
    survival = 1 - 4 / 8 * 0.5
    yield Check.equal("evaluation adds p f(x)", layer(v)[0], v + survival * branch(v), 1e-6)

    layers = [StochasticDepth(1, index=i, depth=50) for i in range(50)]
    expected = sum(each.survival for each in layers)
    yield Check("survival 0.5 keeps 3L/4 of the blocks on average", abs(expected / (0.75 * 50) - 1), 0.02)
    ran = sum(len(_visit(each)) for _ in range(400) for each in layers)
    yield Check("and so do the coins", abs(ran / (400 * expected) - 1), 0.02)


def _visit(connection: Connection) -> list[torch.Tensor]:
    call = Call(Layer(torch.nn.Identity(), connection), {})
    connection(torch.zeros(1, 1), call)
    return call.outputs


def measure(lab: Lab) -> dict[str, np.ndarray]:
    fifty = "resnet-50+stages=cifar"
    runs = lab.compare(
        {
            "constant depth": fifty,
            "stochastic depth": f"{fifty}+connection=stochastic-depth(final=0.5)",
            "expected depth": Arm(
                name="expected depth",
                network="resnet-50",
                overrides={"stages": "cifar", "connection": functools.partial(ExpectedDepth, final=0.5)},
            ),
        },
        "digits:500",
        lr=(0.1, 0.03, 0.3),
        budget="steps=300",
        redrawn=True,
        data_options={"label_noise": 0.2},
    )
    constant, dropped, scaled = runs["constant depth"], runs["stochastic depth"], runs["expected depth"]
    return {
        "error, stochastic minus constant": constant.values - dropped.values,
        "time of training, stochastic to constant": dropped.seconds / constant.seconds,
        "error, expected minus constant": constant.values - scaled.values,
    }


claim = Claim(
    exact=exact,
    effect=Effect(
        expected="With a fifth of the training labels wrong, stochastic depth's test error lies below "
        "constant depth's; "
        "its training takes at most 0.85 of the time.",
        contrasts=(
            Contrast("error, stochastic minus constant", 0.0, "below", unit="points"),
            Contrast("time of training, stochastic to constant", 0.85, "below", unit="ratio"),
            Contrast("error, expected minus constant", 0.0, "below", role="control", unit="points"),
        ),
        measure=measure,
        seconds=270,
        seeds=tuple(range(8)),
    ),
)
