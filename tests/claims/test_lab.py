"""Fair comparisons for claims: grids, seeds, failures, and the record of what was used."""

from __future__ import annotations

import dataclasses
import math

import numpy as np
import pytest
import torch
from torch import nn

from mainstem.claims import Lab
from mainstem.errors import ConfigurationError

GRID = (0.1, 0.01)


class Raises(nn.Module):
    def __init__(self):
        super().__init__()
        self.linear = nn.Linear(4, 3)

    def forward(self, x):
        raise ValueError("no")


def linear():
    return nn.Linear(4, 3)


@pytest.fixture
def lab():
    return Lab([3, 4, 5], workers=0)


def test_arms_are_tuned_over_their_grid_and_run_on_the_seeds(lab, tiny):
    runs = lab.compare(
        {"a": linear, "b": linear}, tiny.vectors(), lr=GRID, budget="epochs=4", recipe={"evaluations": 4}
    )
    a, b = runs["a"], runs["b"]
    assert a.seeds == (3, 4, 5)
    assert a.setting["lr"] in GRID
    assert [each.status for each in a.outcomes] == ["ok"] * 3
    assert a.values.shape == a.seconds.shape == a.last().shape == (3,)
    assert a.minus(b).shape == (3, 48)
    assert np.array_equal(a.minus(b), np.zeros((3, 48)))  # equal arms, paired, are equal
    assert a.minus(b).mean() == (a.values - b.values).mean()
    assert len(a.outcomes[0].curve) == 4


def test_curves_give_last_values_and_first_steps(lab, tiny):
    runs = lab.compare({"a": linear}, tiny.vectors(), lr=(0.01,), budget="steps=8", recipe={"evaluations": 8})["a"]
    curves = [[entry["train_loss"] for entry in each.curve] for each in runs.outcomes]
    assert runs.last().tolist() == [curve[-1] for curve in curves]
    bound = (curves[0][3] + curves[0][2]) / 2
    first = [next((i + 1 for i, loss in enumerate(curve) if loss < bound), 99) for curve in curves]
    assert runs.first_step(below=bound, never=99).tolist() == first
    assert np.isnan(runs.first_step(below=-1.0)).all()


def test_the_best_rate_on_the_validation_split_is_taken(lab, tiny):
    data = tiny.vectors()
    runs = lab.compare({"a": linear}, data, lr=(1e-9, 0.1, 1e-8), budget="epochs=5")
    assert runs["a"].setting == {"lr": 0.1}


def test_one_rate_is_not_tried(lab, tiny, monkeypatch):
    from mainstem.bench import worker

    kinds = []
    monkeypatch.setattr(worker, "evaluate", _noting(worker.evaluate, kinds))
    lab.compare({"a": linear}, tiny.vectors(), lr=(0.1,), budget="steps=1")
    assert len(kinds) == 3


def _noting(function, calls):
    def noted(*args, **kwargs):
        calls.append(function)
        return function(*args, **kwargs)

    return noted


def test_a_run_that_fails_has_no_value_but_what_the_design_gives_it(lab, tiny):
    runs = lab.compare({"good": linear, "bad": Raises}, tiny.vectors(), lr=GRID, budget="steps=2")
    bad = runs["bad"]
    assert bad.setting is None
    assert [each.status for each in bad.outcomes] == ["error"] * 3
    assert "ValueError: no" in bad.outcomes[0].reason
    assert np.isnan(bad.values).all()
    assert np.isnan(runs["good"].minus(bad)).all()
    assert np.isnan(bad.last()).all()
    assert bad.last(failed=math.log(3)).tolist() == [math.log(3)] * 3
    assert bad.first_step(below=1.0, never=2).tolist() == [2] * 3


def test_splits_drawn_anew_are_not_crossed(lab, tiny):
    seen = []

    def drawn(seed):
        seen.append(seed)
        return tiny.vectors(seed=seed % 997)

    runs = lab.compare({"a": linear, "b": linear}, drawn, lr=GRID, budget="steps=2", redrawn=True)
    assert runs["a"].minus(runs["b"]).shape == (3,)
    assert set(seen) == {3, 4, 5, 1_000_003}  # the last is what tuning sees
    noted = {entry["seed"]: entry["sha256"] for entry in lab.used["data"]}
    assert noted == {seed: tiny.vectors(seed=seed % 997).sha256 for seed in seen}


def test_what_was_used_is_noted(lab, tiny):
    data = tiny.vectors()
    lab.compare({"a": linear}, data, lr={"a": GRID}, budget="steps=2", recipe={"momentum": 0.5})
    assert lab.used["data"] == [
        {"name": "vectors", "seed": None, "sha256": data.sha256, "sizes": {"train": 48, "val": 48, "test": 48}}
    ]
    (arm,) = lab.used["arms"]
    assert (arm["name"], arm["data"], arm["budget"]) == ("a", "vectors", "steps=2")
    assert "lr" not in arm["description"]
    assert len(arm["values"]) == len(arm["seconds"]) == 3


def test_data_loaded_by_hand_are_noted_once(lab):
    first = lab.load("digits:50")
    lab.load("digits:50")
    lab.load("digits:50", seed=1)
    assert [entry["seed"] for entry in lab.used["data"]] == [None, 1]
    assert lab.used["data"][0]["sha256"] == first.sha256


def test_cost_on_request(lab, tiny):
    runs = lab.compare({"a": linear}, tiny.vectors(), lr=(0.1,), budget="steps=1", cost=True)
    assert runs["a"].cost["parameters"] == 15
    assert lab.compare({"a": linear}, tiny.vectors(), lr=(0.1,), budget="steps=1")["a"].cost == {}


@pytest.mark.parametrize(
    ("arms", "lr", "says"),
    [
        ({"a": linear, "b": linear}, {"a": (0.1, 0.2), "b": (0.1,)}, "equally many"),
        ({"a": linear, "b": linear}, {"a": (0.1,)}, "arm b has no learning rates"),
        ({"a": linear}, (), "at least one"),
        (["mlp-1x4+lr=0.1"], (0.1, 0.2), "its learning rate is tuned"),
        (["mlp-1x4"], (0.1, -0.2), "lr"),
    ],
)
def test_unfair_grids_are_refused(arms, lr, says, lab, tiny):
    with pytest.raises(ConfigurationError, match=says):
        lab.compare(arms, tiny.vectors(), lr=lr, budget="steps=1")


@pytest.mark.parametrize("seeds", [[], [-1], [1, 1]])
def test_seeds_are_distinct(seeds):
    with pytest.raises(ConfigurationError, match="seeds"):
        Lab(seeds)


def test_worker_processes_give_the_same_numbers(tiny):
    data = tiny.vectors()
    here, there = (
        Lab([0, 1], workers=workers).compare(["mlp-1x4"], data, lr=GRID, budget="steps=3") for workers in (0, 2)
    )
    assert np.array_equal(here["mlp-1x4"].values, there["mlp-1x4"].values)
    assert here["mlp-1x4"].setting == there["mlp-1x4"].setting


def test_data_may_be_a_function_without_a_seed(lab, tiny):
    def changed(seed):
        assert seed is None
        data = tiny.vectors()
        return dataclasses.replace(
            data, name="changed", train=type(data.train)(data.train.x, torch.zeros_like(data.train.y))
        )

    lab.compare({"a": linear}, changed, lr=(0.1,), budget="steps=1")
    assert lab.used["data"][0]["name"] == "changed"
