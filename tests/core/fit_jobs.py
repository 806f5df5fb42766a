"""A training run for processes that are killed."""

from __future__ import annotations

import time
from pathlib import Path

import torch

from mainstem import Recipe, fit, network_for
from mainstem.data import Data, Split
from mainstem.fit import Run

RECIPE = {
    "budget": "steps=90",
    "batch_size": 8,
    "lr": 0.02,
    "evaluations": 7,
    "checkpoint_every": 4,
    "layout": "contiguous",
    "precision": "fp32",
    "threads": 1,
    "methods": ("ema(decay=0.9)", "mixup"),
}


def data(pause: float = 0.0) -> Data:
    """Images of two classes; augmenting a batch takes `pause` seconds, so that a kill finds the run under way."""
    generator = torch.Generator().manual_seed(0)
    y = torch.arange(40) % 2
    x = torch.randn(40, 1, 8, 8, generator=generator) + y[:, None, None, None]

    def augment(x: torch.Tensor, own: torch.Generator) -> torch.Tensor:
        time.sleep(pause)
        return x + 0.1 * torch.randn(x.shape, generator=own)

    splits = {"train": Split(x, y), "val": Split(x[:10], y[:10]), "test": Split(x[:10], y[:10])}
    return Data("toy", "classification", "image", **splits, shape=(1, 8, 8), outputs=2, augment=augment, sha256="toy")


def run(folder: Path | None, pause: float = 0.0) -> Run:
    toy = data(pause)
    model = network_for("resnet-8", toy, connection="stochastic-depth(rezero, final=0.6)", seed=0)
    return fit(model, toy, Recipe.parse(RECIPE), folder=folder, device="cpu", progress=False)
