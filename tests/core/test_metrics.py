"""Metrics against scikit-learn and torch, and what a user's function may return."""

from __future__ import annotations

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from torch import Tensor

from mainstem import registry
from mainstem.errors import ConfigurationError
from mainstem.metrics import IGNORED, Metric, Scores, metric

generator = torch.Generator().manual_seed(0)
LOGITS, CLASSES = torch.randn(50, 4, generator=generator), torch.randint(4, (50,), generator=generator)
NUMBERS, TARGETS = torch.randn(50, 3, generator=generator), torch.randn(50, 3, generator=generator)


def scored(spec, output: Tensor, y: Tensor, size: int = 16) -> Scores:
    """Over batches, the last one smaller."""
    scores = Scores(metric(spec))
    for a, b in zip(output.split(size), y.split(size), strict=True):
        scores.add(a, b)
    return scores


def test_classification_metrics_equal_the_references():
    from sklearn.metrics import accuracy_score, balanced_accuracy_score

    predicted = LOGITS.argmax(1)
    assert scored("accuracy", LOGITS, CLASSES).value == pytest.approx(100 * accuracy_score(CLASSES, predicted))
    assert scored("balanced-accuracy", LOGITS, CLASSES).value == pytest.approx(
        100 * balanced_accuracy_score(CLASSES, predicted)
    )
    nats = float(F.cross_entropy(LOGITS, CLASSES))
    assert scored("nats", LOGITS, CLASSES).value == pytest.approx(nats)
    assert scored("bits", LOGITS, CLASSES).value == pytest.approx(nats / np.log(2))


def test_regression_metrics_equal_the_references():
    from sklearn.metrics import mean_absolute_error, mean_squared_error, r2_score

    for name, reference in [("mse", mean_squared_error), ("mae", mean_absolute_error), ("r2", r2_score)]:
        assert scored(name, NUMBERS, TARGETS).value == pytest.approx(reference(TARGETS, NUMBERS))
    images = torch.randn(6, 1, 3, 3)
    assert scored("mse", images + 2, images, size=4).value == pytest.approx(4, rel=1e-5)


@pytest.mark.parametrize("name", ["accuracy", "nats", "mse"])
def test_values_of_examples_are_kept_in_order(name):
    output, y = (LOGITS, CLASSES) if name != "mse" else (NUMBERS, TARGETS)
    scores = scored(name, output, y)
    assert scores.per_example.shape == (50,) and scores.per_example.dtype == np.float32
    one_by_one = [scored(name, output[i : i + 1], y[i : i + 1]).value for i in range(50)]
    np.testing.assert_allclose(scores.per_example, one_by_one, rtol=1e-6)
    assert scores.value == pytest.approx(float(np.mean(one_by_one)))


@pytest.mark.parametrize("name", ["r2", "balanced-accuracy"])
def test_a_number_for_the_whole_split_has_no_values_of_examples(name):
    output, y = (LOGITS, CLASSES) if name != "r2" else (NUMBERS, TARGETS)
    assert scored(name, output, y).per_example is None


def test_positions_that_are_not_scored_do_not_count():
    output, y = torch.randn(5, 7, 4), torch.randint(4, (5, 7))
    y[:, 3:] = IGNORED
    for name in ("accuracy", "nats"):
        whole, part = scored(name, output, y), scored(name, output[:, :3], y[:, :3])
        np.testing.assert_allclose(whole.per_example, part.per_example, rtol=1e-6)


@pytest.mark.parametrize(
    "task, name, higher", [("images", "accuracy", True), ("numbers", "mse", False), ("tokens", "nats", False)]
)
def test_each_task_has_its_own(tiny, task, name, higher):
    found = metric("auto", getattr(tiny, task)(n=6))
    assert (found.name, found.higher_is_better) == (name, higher)


@pytest.mark.parametrize("name", registry.names("metric"))
def test_a_metric_is_for_some_tasks(tiny, name):
    found = metric(name)
    assert found.name == name and (found.per_example is None) != (found.total is None)
    fits = []
    for data in (tiny.images(n=6), tiny.numbers(n=6), tiny.tokens(n=6)):
        try:
            metric(name, data)
            fits.append(data.task)
        except ConfigurationError as error:
            assert f"metric: {name} is for " in str(error) and f"of {data.name} is {data.task}" in str(error)
    assert set(fits) == set(found.tasks)


def top_two(output: Tensor, y: Tensor) -> Tensor:
    return (output.topk(2).indices == y[:, None]).any(1)


def worst(output: Tensor, y: Tensor) -> float:
    return float((output.argmax(1) != y).sum()) / len(y)


worst.higher_is_better = False


def test_a_function_of_each_example():
    assert metric(top_two) == Metric("top_two", per_example=top_two)
    scores = scored(top_two, LOGITS, CLASSES)
    assert scores.value == pytest.approx(float(top_two(LOGITS, CLASSES).float().mean()))
    assert scores.per_example.shape == (50,)


def test_a_function_of_a_batch():
    found = metric(worst)
    assert not found.higher_is_better
    scores = scored(worst, LOGITS, CLASSES)
    assert scores.value == pytest.approx(worst(LOGITS, CLASSES))  # batches count by their size
    assert scores.per_example is None


@pytest.mark.parametrize(
    "wrong, shape", [(lambda output, y: output, r"\(50, 4\)"), (lambda output, y: output[0], r"\(4,\)")]
)
def test_a_function_that_returns_another_shape_is_told(wrong, shape):
    with pytest.raises(
        ConfigurationError, match=f"returned shape {shape} for 50 examples; return one value an example"
    ):
        scored(wrong, LOGITS, CLASSES, size=50)


def test_what_is_no_metric_is_refused():
    with pytest.raises(ConfigurationError, match="metric: unknown 'acuracy'; did you mean 'accuracy'"):
        metric("acuracy")
    with pytest.raises(ConfigurationError, match="metric: 3 is neither a name nor a function"):
        metric(3)
