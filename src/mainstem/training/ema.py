"""Exponential moving average of the weights."""

from __future__ import annotations

import copy
from typing import Any

import torch
from torch import nn

from ..errors import ConfigurationError
from ..fit import Run
from ..registry import register


@register("method", "ema")
class EMA:
    """Evaluate, and end with, a moving average of the weights: `w_ema <- decay w_ema + (1 - decay) w`, every step.

    Args:
        decay: in [0, 1). With `ramp`, step t uses `min(decay, (1 + t) / (10 + t))`, so that short runs forget their
            start.

    Buffers, such as running statistics, are those of the last step.
    """

    def __init__(self, decay: float = 0.999, ramp: bool = True):
        if not 0 <= decay < 1:
            raise ConfigurationError(f"ema: decay is {decay}; valid: a number in [0, 1)")
        self.decay, self.ramp = decay, ramp
        self.average: nn.Module | None = None

    def start(self, run: Run) -> None:
        self.average = copy.deepcopy(run.network).requires_grad_(False)

    @torch.no_grad()
    def step(self, run: Run) -> None:
        assert self.average is not None
        decay = min(self.decay, (1 + run.steps) / (10 + run.steps)) if self.ramp else self.decay
        pairs = zip(self.average.parameters(), run.network.parameters(), strict=True)
        averaged, current = (list(each) for each in zip(*pairs, strict=True))
        torch._foreach_lerp_(averaged, current, 1 - decay)
        for kept, buffer in zip(self.average.buffers(), run.network.buffers(), strict=True):
            kept.copy_(buffer)

    def evaluated(self, run: Run, network: nn.Module) -> nn.Module:
        assert self.average is not None
        return self.average

    def finish(self, run: Run) -> None:
        assert self.average is not None
        run.network.load_state_dict(self.average.state_dict())

    def state_dict(self) -> dict[str, Any]:
        return self.average.state_dict() if self.average is not None else {}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        assert self.average is not None
        self.average.load_state_dict(state)
