"""Recipes and budgets: what is accepted, and errors that say what to write instead."""

from __future__ import annotations

import json

import pytest

from mainstem import Budget, Recipe
from mainstem.errors import ConfigurationError


@pytest.mark.parametrize(
    "given, unit, amount",
    [
        ("steps=300", "steps", 300),
        (" epochs = 0.5 ", "epochs", 0.5),
        ("seconds=1e2", "seconds", 100),
        ({"flops": 1e12}, "flops", 1e12),
        (Budget(steps=3), "steps", 3),
    ],
)
def test_budgets(given, unit, amount):
    budget = Budget.of(given)
    assert (budget.unit, budget.amount) == (unit, amount)
    assert Budget.of(str(budget)) == budget
    assert Recipe(budget=given).budget == budget


@pytest.mark.parametrize(
    "given, message",
    [
        ("steps=-3", "budget: steps: Input should be greater than 0 .given: '-3'"),
        ("steps=0", "budget: steps: Input should be greater than 0"),
        ("steps=2.5", "budget: steps: .*integer"),
        ("steps=many", "budget: steps: .*integer"),
        ("stpes=3", "budget: stpes: unknown field; did you mean steps"),
        ("300", "budget: '300' is not of the form steps=N, epochs=N, seconds=N or flops=N"),
        ({"steps": 3, "epochs": 1}, "budget: give exactly one of steps, epochs, seconds or flops, not .*steps.*epochs"),
        ({}, "budget: give exactly one of .* not none"),
    ],
)
def test_a_wrong_budget_is_explained(given, message):
    with pytest.raises(ConfigurationError, match=message):
        Budget.of(given)


@pytest.mark.parametrize(
    "fields, message",
    [
        ({"learning_rate": 1}, "recipe: learning_rate: unknown field; did you mean .*"),
        ({"momentun": 0.9}, "recipe: momentun: unknown field; did you mean momentum"),
        ({"zzzz": 1}, "recipe: zzzz: unknown field; valid: loss, optimiser, lr"),
        ({"lr": "fast"}, "recipe: lr: .*number.* .given: 'fast'"),
        ({"lr": -1}, "recipe: lr: Input should be greater than 0 .given: -1"),
        ({"lr": float("nan")}, "recipe: lr: "),
        ({"lr": float("inf")}, "recipe: lr: "),
        ({"batch_size": 2.5}, "recipe: batch_size: .*integer"),
        ({"batch_size": 0}, "recipe: batch_size: Input should be greater than 0"),
        ({"warmup": 1.0}, "recipe: warmup: Input should be less than 1"),
        ({"loss": "mean-square"}, "recipe: loss: .*'cross-entropy', 'mse'.* .given: 'mean-square'"),
        ({"layout": "nhwc"}, "recipe: layout: .*'channels-last'"),
        ({"optimiser": "sdg"}, "recipe: optimiser: unknown 'sdg'; did you mean 'sgd'"),
        ({"schedule": "cosin"}, "recipe: schedule: unknown 'cosin'; did you mean 'cosine'"),
        ({"budget": {"steps": -1}}, "recipe: budget.steps: Input should be greater than 0"),
        ({"budget": {"steps": 1, "seconds": 2}}, "recipe: budget: give exactly one of"),
        ({"budget": "forever"}, "recipe: budget: 'forever' is not of the form"),
        ({"betas": [0.9]}, "recipe: betas"),
        ({"seed": -1}, "recipe: seed: Input should be greater than or equal to 0"),
        ({"evaluations": 0}, "recipe: evaluations: "),
        ({"clip": 0}, "recipe: clip: Input should be greater than 0"),
    ],
)
def test_a_wrong_field_is_named_with_its_value(fields, message):
    with pytest.raises(ConfigurationError, match=message):
        Recipe.parse(fields, "recipe")


def test_every_wrong_field_is_told_at_once():
    with pytest.raises(ConfigurationError) as caught:
        Recipe.parse({"lr": -1, "momentum": 2, "epochs": 3}, "recipe")
    lines = str(caught.value).splitlines()
    assert len(lines) == 3 and all(line.startswith("recipe: ") for line in lines)


def test_a_recipe_is_fixed_and_changed_by_but():
    recipe = Recipe(lr=0.2, budget="steps=5")
    with pytest.raises(ValueError):
        recipe.lr = 0.3
    changed = recipe.but(lr=0.3, budget="epochs=2")
    assert (changed.lr, changed.budget.unit, recipe.lr) == (0.3, "epochs", 0.2)
    with pytest.raises(ConfigurationError, match="recipe: lr"):
        recipe.but(lr=-1)


def test_its_identity_is_json():
    class Method:
        def step(self, run): ...

    def score(output, y): ...

    recipe = Recipe(methods=("ema", {"name": "mixup", "alpha": 0.5}, Method()), metric=score, budget="steps=5")
    found = recipe.identity()
    assert json.loads(json.dumps(found, allow_nan=False)) == found
    assert found["methods"][:2] == ["ema", {"name": "mixup", "alpha": 0.5}] and "Method" in found["methods"][2]
    assert "score" in found["metric"] and found["budget"]["steps"] == 5
    assert Recipe().identity() == Recipe().identity() != Recipe(lr=0.2).identity()
