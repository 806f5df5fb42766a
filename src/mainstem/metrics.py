"""What a prediction is worth: metrics by name, or a function of the user's."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from . import registry
from .errors import ConfigurationError

if TYPE_CHECKING:
    from .data import Data

IGNORED = -100  # a target that is not scored
CLASSES, NUMBERS = ("classification", "next-token"), ("regression",)  # tasks


@dataclass(frozen=True)
class Metric:
    """A metric: `per_example(output, y) -> [N]`, whose mean is the value, or `total(outputs, ys) -> number`.

    `tasks` are those that it is for; none means any.
    """

    name: str
    unit: str = ""
    higher_is_better: bool = True
    per_example: Callable[[Tensor, Tensor], Tensor] | None = None
    total: Callable[[np.ndarray, np.ndarray], float] | None = None
    tasks: tuple[str, ...] = ()


def metric(spec: Any = "auto", data: Data | None = None) -> Metric:
    """The metric that `spec` names.

    "auto" is accuracy for classification, mean squared error for regression and nats for next-token prediction. A
    function `f(output, y)` may return one value an example, `[N]`, or one number for all; give it an attribute
    `higher_is_better = False` where lower is better. A name whose task is not that of `data` raises.
    """
    if isinstance(spec, Metric):
        return spec
    if spec == "auto":
        task = data.task if data is not None else "classification"
        spec = {"classification": "accuracy", "regression": "mse", "next-token": "nats"}[task]
    if isinstance(spec, str):
        found = registry.find("metric", spec)()
        if data is not None and found.tasks and data.task not in found.tasks:
            raise ConfigurationError(
                f"metric: {spec} is for {' and '.join(found.tasks)}; the task of {data.name} is {data.task}"
            )
        return found
    if not callable(spec):
        raise ConfigurationError(f"metric: {spec!r} is neither a name nor a function (output, y) -> values")
    higher = bool(getattr(spec, "higher_is_better", True))
    return Metric(getattr(spec, "__name__", type(spec).__name__), "", higher, per_example=spec)


def _over_positions(values: Tensor, y: Tensor) -> Tensor:
    """Mean over an example's scored positions: `[N]` from `[N]` or `[N, T]`."""
    if y.ndim == 1:
        return values
    scored = y != IGNORED
    return (values * scored).sum(1) / scored.sum(1).clamp(min=1)


def _cross_entropy(output: Tensor, y: Tensor) -> Tensor:
    return F.cross_entropy(output.float().movedim(-1, 1), y, reduction="none", ignore_index=IGNORED)


@registry.register("metric", "accuracy")
def accuracy() -> Metric:
    """Share of right classes, in per cent."""
    return Metric(
        "accuracy",
        "%",
        True,
        lambda output, y: _over_positions(100.0 * (output.argmax(-1) == y).float(), y),
        tasks=CLASSES,
    )


@registry.register("metric", "nats")
def nats() -> Metric:
    """Cross-entropy in nats a target."""
    return Metric("nats", "nats", False, lambda output, y: _over_positions(_cross_entropy(output, y), y), tasks=CLASSES)


@registry.register("metric", "bits")
def bits() -> Metric:
    """Cross-entropy in bits a target."""
    return Metric(
        "bits",
        "bits",
        False,
        lambda output, y: _over_positions(_cross_entropy(output, y), y) / float(np.log(2)),
        tasks=CLASSES,
    )


def _errors(output: Tensor, y: Tensor) -> Tensor:
    return (output.float().view_as(y) - y).flatten(1)


@registry.register("metric", "mse")
def mse() -> Metric:
    """Mean squared error, in the targets' unit squared."""
    return Metric("mse", "", False, lambda output, y: _errors(output, y).square().mean(1), tasks=NUMBERS)


@registry.register("metric", "mae")
def mae() -> Metric:
    """Mean absolute error, in the targets' unit."""
    return Metric("mae", "", False, lambda output, y: _errors(output, y).abs().mean(1), tasks=NUMBERS)


@registry.register("metric", "r2")
def r2() -> Metric:
    """Coefficient of determination; one number for a split."""
    from sklearn.metrics import r2_score

    def total(output: np.ndarray, y: np.ndarray) -> float:
        return float(r2_score(y.reshape(len(y), -1), output.reshape(len(y), -1)))

    return Metric("r2", "", True, total=total, tasks=NUMBERS)


@registry.register("metric", "balanced-accuracy")
def balanced_accuracy() -> Metric:
    """Mean recall of the classes, in per cent; one number for a split."""
    from sklearn.metrics import balanced_accuracy_score

    return Metric(
        "balanced-accuracy",
        "%",
        True,
        total=lambda output, y: 100.0 * float(balanced_accuracy_score(y, output.argmax(-1))),
        tasks=("classification",),
    )


class Scores:
    """Collects a metric over batches; `.value` is the mean, `.per_example` the values where there are any."""

    def __init__(self, metric: Metric):
        self.metric = metric
        self._values: list[Tensor] = []
        self._weights: list[int] = []
        self._outputs: list[Tensor] = []
        self._targets: list[Tensor] = []

    def add(self, output: Tensor, y: Tensor) -> None:
        if self.metric.per_example is None:
            self._outputs.append(output.float().cpu())
            self._targets.append(y.cpu())
            return
        values = torch.as_tensor(self.metric.per_example(output, y)).detach().float().cpu()
        if values.ndim > 1 or (values.ndim == 1 and len(values) != len(y)):
            raise ConfigurationError(
                f"metric: {self.metric.name} returned shape {tuple(values.shape)} for {len(y)} examples; "
                "return one value an example, or one number"
            )
        self._values.append(values)
        self._weights.append(len(y))

    @property
    def per_example(self) -> np.ndarray | None:
        if not self._values or self._values[0].ndim == 0:
            return None
        return torch.cat(self._values).numpy()

    @property
    def value(self) -> float:
        if self.metric.total is not None:
            return float(self.metric.total(torch.cat(self._outputs).numpy(), torch.cat(self._targets).numpy()))
        scores = self.per_example
        if scores is not None:
            return float(scores.astype(np.float64).mean())
        return float(np.average([float(v) for v in self._values], weights=self._weights))
