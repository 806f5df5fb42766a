"""Wide ResNet: at equal parameters, a wide shallow network is as accurate as a thin deep one, and trains faster.

Design. 300 digits, splits redrawn with every seed, 40 epochs of 4 steps. WRN-10-4 (1.20 M parameters) against a thin
pre-activation ResNet of 74 layers (1.14 M), the depth whose parameters come nearest, each with its own learning rate
from three by validation accuracy. Accuracy is a question of no loss: at most half a point lower. Time is the ratio of
training seconds over the same runs; the loss at equal time is read off the thin network's learning curve where the
wide one ended. The control takes the width away and keeps the depth, WRN-10-1: it must be worse than the thin network
by more than the margin.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch

from ...network import network
from .. import Check, Claim, Contrast, Effect, Lab, Runs


def exact() -> Iterator[Check]:
    with torch.device("meta"):
        count = sum(p.numel() for p in network("wrn-28-10", classes=10).parameters())
    yield Check("wrn-28-10 has 36,479,194 parameters", abs(count - 36_479_194))


def measure(lab: Lab) -> dict[str, np.ndarray]:
    runs = lab.compare(
        {"wide": "wrn-10-4", "thin": "preact-resnet-74", "shallow": "wrn-10-1"},
        "digits:300",
        lr=(0.1, 0.03, 0.3),
        budget="epochs=40",
        redrawn=True,
        recipe={"evaluations": 20},
    )
    wide, thin = runs["wide"], runs["thin"]
    thin_loss = at_time(thin, wide.seconds)
    return {
        "accuracy, wide minus thin": wide.values - thin.values,
        "time of training, thin to wide": thin.seconds / wide.seconds,
        "training loss at equal time, wide to thin": np.log(wide.last("train_loss")) - np.log(thin_loss),
        "accuracy, shallow minus thin": runs["shallow"].values - thin.values,
    }


def at_time(runs: Runs, seconds: np.ndarray) -> np.ndarray:
    """The training loss of each run after the given times, `[S]`, between two looks on a straight line."""
    curves = [each.curve for each in runs.outcomes]
    return np.array(
        [
            np.interp(t, [e["seconds"] for e in curve], [e["train_loss"] for e in curve]) if curve else math.nan
            for t, curve in zip(seconds, curves, strict=True)
        ]
    )


claim = Claim(
    exact=exact,
    effect=Effect(
        expected="WRN-10-4 is at most half a point less accurate than a thin network of 74 layers with as "
        "many parameters, "
        "trains at least twice as fast per epoch, and has the lower training loss after equal time.",
        contrasts=(
            Contrast("accuracy, wide minus thin", -0.5, "above", unit="points"),
            Contrast("time of training, thin to wide", 2.0, "above", unit="ratio"),
            Contrast("training loss at equal time, wide to thin", 0.0, "below", unit="ln loss ratio"),
            Contrast("accuracy, shallow minus thin", -0.5, "above", role="control", unit="points"),
        ),
        measure=measure,
        seconds=200,
        seeds=tuple(range(8)),
    ),
)
