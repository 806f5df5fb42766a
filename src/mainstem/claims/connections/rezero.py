"""ReZero: very deep networks without normalisation start as the identity and converge sooner.

Design. Fully connected ReLU networks of 128 layers and 64 features on digits with all training images; Adam, constant
learning rate, 200 steps, no augmentation. Each arm has its own learning rate from five by validation cross-entropy.
What is measured is the first step, in fives, at which the mean training loss lies under 0.1; a run that never gets
there counts as 200, which understates the advantage. Contrasts are logarithms of ratios of steps. The control keeps
the learned scalar and starts it at 1.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
import torch.nn.functional as F

from ...network import network
from .. import Check, Claim, Contrast, Effect, Lab

STEPS = 200


def exact() -> Iterator[Check]:
    torch.manual_seed(0)
    stream = network("mlp-128x64", classes=10, in_channels=64, norm="none", connection="rezero", seed=0).stream
    x = torch.randn(64)
    yield Check.equal("128 layers start as the identity", stream(x), x)
    singular = torch.linalg.svdvals(torch.func.jacrev(stream)(x))
    yield Check.equal("all singular values of the Jacobian are 1", singular, torch.ones(64), 1e-6)

    model = network("mlp-1000x64", classes=10, in_channels=64, norm="none", connection="rezero", seed=0)
    optimiser = torch.optim.Adam(model.parameters(), 1e-3)
    inputs, targets = torch.randn(16, 64), torch.randint(10, (16,))
    losses = []
    for _ in range(50):
        loss = F.cross_entropy(model(inputs), targets)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
    yield Check.that("1000 layers: 50 steps without NaN", all(map(math.isfinite, losses)))
    yield Check("1000 layers: the loss after 50 steps, as a share of the first", losses[-1] / losses[0], 0.5)


def measure(lab: Lab) -> dict[str, np.ndarray]:
    deep = "mlp-128x64+norm=none"
    runs = lab.compare(
        {
            "rezero": f"{deep}+connection=rezero",
            "residual": deep,
            "post-norm": "mlp-128x64+placement=post",
            "plain": f"{deep}+connection=plain",
            "alpha from 1": f"{deep}+connection=rezero(alpha=1.0)",
        },
        "digits",
        lr=(1e-3, 3e-4, 3e-3, 1e-4, 1e-2),
        budget=f"steps={STEPS}",
        metric="nats",
        recipe={
            "optimiser": "adam",
            "schedule": "constant",
            "weight_decay": 0.0,
            "augment": False,
            "evaluations": STEPS // 5,
        },
    )
    steps = {name: np.log(each.first_step(below=0.1, never=STEPS)) for name, each in runs.items()}
    return {
        "residual to rezero": steps["residual"] - steps["rezero"],
        "post-norm to rezero": steps["post-norm"] - steps["rezero"],
        "plain network's loss": runs["plain"].last("train_loss", failed=math.log(10)),
        "residual to alpha from 1": steps["residual"] - steps["alpha from 1"],
    }


claim = Claim(
    exact=exact,
    effect=Effect(
        expected="A ReZero network of 128 layers reaches a training loss of 0.1 in at most half the steps "
        "of an ordinary "
        "residual and of a post-norm network; a plain one stays at chance (ln 10 = 2.303).",
        contrasts=(
            Contrast("residual to rezero", math.log(2), "above", unit="ln step ratio"),
            Contrast("post-norm to rezero", math.log(2), "above", unit="ln step ratio"),
            Contrast("plain network's loss", 2.2, "above", unit="nats"),
            Contrast("residual to alpha from 1", math.log(2), "above", role="control", unit="ln step ratio"),
        ),
        measure=measure,
        seconds=150,
    ),
)
