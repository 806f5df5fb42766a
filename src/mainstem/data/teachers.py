"""Teacher networks: random functions whose values are the targets."""

from __future__ import annotations

import itertools
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..registry import register
from .core import Data, build, choice, draws, number, whole
from .generated import generate

ACTIVATIONS: dict[str, Callable[[np.ndarray], np.ndarray]] = {
    "relu": lambda v: np.maximum(v, 0),
    "tanh": np.tanh,
    "sin": np.sin,
    "linear": lambda v: v,
}


@dataclass(frozen=True)
class Teacher:
    """A random multilayer perceptron `teacher(x [N, features]) -> [N, outputs]` in float64.

    Weights and biases are Gaussian, with variance 2/fan-in and 0.1; every output is shifted and scaled to mean 0 and
    deviation 1 over standard normal inputs.
    """

    weights: tuple[np.ndarray, ...]
    biases: tuple[np.ndarray, ...]
    activation: str
    mean: np.ndarray
    std: np.ndarray

    @classmethod
    def draw(
        cls,
        seed: int | None,
        *,
        features: int,
        hidden: int = 32,
        depth: int = 2,
        outputs: int = 1,
        activation: str = "relu",
    ) -> Teacher:
        """The teacher of a data set: call with its `meta["teacher"]`."""
        rng = draws(seed, "teacher")
        widths = [features, *[hidden] * depth, outputs]
        weights = tuple(rng.standard_normal((i, o)) * np.sqrt(2 / i) for i, o in itertools.pairwise(widths))
        biases = tuple(rng.standard_normal(o) * np.sqrt(0.1) for o in widths[1:])
        raw = cls(weights, biases, activation, np.zeros(outputs), np.ones(outputs))
        seen = raw(draws(seed, "teacher scale").standard_normal((8192, features)))
        return cls(weights, biases, activation, seen.mean(0).round(6), seen.std(0).round(6))

    def __call__(self, x: np.ndarray) -> np.ndarray:
        v = np.asarray(x, dtype=np.float64)
        for i, (weight, bias) in enumerate(zip(self.weights, self.biases, strict=True)):
            v = v @ weight + bias
            if i + 1 < len(self.weights):
                v = ACTIVATIONS[self.activation](v)
        return (v - self.mean) / self.std


@register("data", "teacher")
def teacher(
    *,
    seed: int | None = None,
    count: int = 2000,
    val: int = 1000,
    test: int = 2000,
    task: str = "regression",
    features: int = 16,
    outputs: int | None = None,
    hidden: int = 32,
    depth: int = 2,
    activation: str = "relu",
    noise: float = 0.0,
) -> Data:
    """Standard normal inputs `[N, features]` and what a random network says about them.

    Regression: its outputs `[N, outputs]`, of mean 0 and deviation 1, plus Gaussian noise; the best mse is `noise**2`.
    Classification: the largest of its outputs; with probability `noise` the class is drawn evenly instead, so that the
    best accuracy is `100 * (1 - noise * (1 - 1/outputs))`. `Teacher.draw(**data.meta["teacher"])` is the teacher.

    Args:
        count, val, test: numbers of examples.
        task: "regression" or "classification".
        features: of an input.
        outputs: outputs (1 unless told) or classes (10 unless told).
        hidden, depth, activation: units of a hidden layer, hidden layers, and "relu", "tanh", "sin" or "linear".
        noise: in deviations of the target, or a probability.
    """
    classes = choice("task", task, ("regression", "classification")) == "classification"
    outputs = whole("outputs", (10 if classes else 1) if outputs is None else outputs, 2 if classes else 1)
    noise = number("noise", noise, 0.0, 1.0 if classes else 1e3)
    options: dict[str, Any] = {
        "features": whole("features", features),
        "hidden": whole("hidden", hidden),
        "depth": whole("depth", depth, 0),
        "outputs": outputs,
        "activation": choice("activation", activation, tuple(ACTIVATIONS)),
    }
    truth = Teacher.draw(seed, **options)

    def draw(rng: np.random.RandomState, n: int) -> tuple[np.ndarray, np.ndarray]:
        x = rng.standard_normal((n, features)).astype(np.float32)
        said = truth(x)
        if not classes:
            return x, (said + noise * rng.standard_normal(said.shape)).astype(np.float32)
        y = said.argmax(1)
        return x, np.where(rng.random_sample(n) < noise, rng.randint(outputs, size=n), y)

    splits = generate(draw, seed, count=count, val=val, test=test, name="teacher")
    ideal = {"accuracy": 100 * (1 - noise * (1 - 1 / outputs))} if classes else {"mse": noise**2}
    columns = [f"x{i}" for i in range(features)]
    meta = {"columns": columns, "mean": [0.0] * features, "std": [1.0] * features, "ideal": ideal}
    meta |= {"teacher": {"seed": seed, **options}}
    labels = [str(c) for c in range(outputs)] if classes else None
    return build("teacher", task, "vector", splits, outputs=outputs, labels=labels, meta=meta)
