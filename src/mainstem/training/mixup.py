"""Mixup (Zhang et al., 2018): train on convex combinations of pairs of examples and of their classes."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

from ..errors import ConfigurationError
from ..fit import Run
from ..registry import register


@register("method", "mixup")
class Mixup:
    """`x <- t x + (1 - t) x'`, and the same of the one-hot targets, with `t ~ Beta(alpha, alpha)` drawn once a batch.

    Args: alpha, above 0; 0.2 is usual for images.
    Raises: `ConfigurationError` where the inputs are not numbers or the targets not one class an example.
    Source: mixup: Beyond Empirical Risk Minimization, arXiv:1710.09412.
    """

    def __init__(self, alpha: float = 0.2):
        if alpha <= 0:
            raise ConfigurationError(f"mixup: alpha is {alpha}; valid: a number above 0")
        self.beta = torch.distributions.Beta(alpha, alpha)

    def start(self, run: Run) -> None:
        if run.data.task != "classification" or run.data.inputs == "tokens" or run.data.train.y[:1].ndim != 1:
            raise ConfigurationError(
                f"mixup: needs numbers in and one class an example; {run.data.name} is {run.data.task} of "
                f"{run.data.inputs} data"
            )

    def batch(self, run: Run, x: Tensor, y: Tensor) -> tuple[Tensor, Tensor]:
        t = float(self.beta.sample())
        partner = torch.randperm(len(x)).to(x.device)
        target = F.one_hot(y, run.data.outputs).to(x.dtype)
        return t * x + (1 - t) * x[partner], t * target + (1 - t) * target[partner]
