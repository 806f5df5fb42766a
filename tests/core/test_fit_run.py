"""What a training run does and tells: budgets, evaluations, the choice of a layout, logs and event files."""

from __future__ import annotations

import importlib
import io
import sys

import numpy as np
import pytest
import torch
from training import QUIET, Sees, train

from mainstem import Recipe, fit, network_for
from mainstem.errors import ConfigurationError
from mainstem.fit import loss_function

# Budgets and history


@pytest.mark.parametrize(
    "budget, steps", [("steps=5", 5), ("epochs=2", 6), ("epochs=0.5", 2), ("epochs=0.01", 1), ("epochs=1.34", 4)]
)
def test_budgets_end_where_they_say(tiny, budget, steps):
    run = train(tiny.vectors(), budget=budget)  # three batches of 16
    assert run.steps == run.total_steps == steps and run.progress == 1
    assert run.epoch == pytest.approx(steps / 3)


def test_a_budget_in_seconds_ends(tiny):
    run = train(tiny.vectors(), budget="seconds=0.05")
    assert run.total_steps is None and run.seconds >= 0.05 and run.progress == 1
    assert run.history[-1]["step"] == run.steps and run.history[-1]["seconds"] == run.seconds


def test_a_budget_in_flops_is_for_compare(tiny):
    with pytest.raises(ConfigurationError, match="budget: flops are counted by compare"):
        train(tiny.vectors(), budget="flops=1e9")


@pytest.mark.parametrize(
    "evaluations, at", [(1, [12]), (3, [4, 8, 12]), (5, [3, 5, 8, 10, 12]), (50, list(range(1, 13)))]
)
def test_evaluations_are_spread_over_the_budget(tiny, evaluations, at):
    run = train(tiny.vectors(), evaluations=evaluations)
    assert [entry["step"] for entry in run.history] == at
    assert set(run.history[0]) == {"step", "epoch", "seconds", "lr", "train_loss", "val_loss", "val_metric"}


def test_the_training_loss_is_the_mean_since_the_last_evaluation(tiny):
    losses = []

    class Keeps:
        def loss(self, run, loss, output, y):
            losses.append(loss.item())
            return loss

    run = train(tiny.vectors(), Keeps(), evaluations=3)
    means = [np.mean(losses[i : i + 4]) for i in (0, 4, 8)]
    assert [entry["train_loss"] for entry in run.history] == pytest.approx(means)


def test_the_network_ends_in_evaluation_mode(tiny):
    assert not train(tiny.vectors()).network.training


# What is picked


def test_picking_leaves_no_trace(tiny):
    pick = importlib.import_module("mainstem.autopick").pick
    data = tiny.images()
    model = network_for("resnet-8", data, connection="stochastic-depth(mode=sample)", seed=0).train()
    before = {key: value.clone() for key, value in model.state_dict().items()}
    state = torch.get_rng_state()
    batch = data.train.x[:16], data.train.y[:16]
    recipe = Recipe()
    choice = pick(model, batch, recipe, loss_function(recipe, data), torch.device("cpu"))
    assert torch.equal(torch.get_rng_state(), state)
    assert all(torch.equal(before[key], value) for key, value in model.state_dict().items())
    assert all(p.grad is None for p in model.parameters())
    assert choice["layout"] in ("contiguous", "channels-last") and choice["precision"] in ("fp32", "bf16")
    assert choice["threads"] == torch.get_num_threads()
    assert all(seconds > 0 for seconds in choice["measured"].values()) and len(choice["measured"]) >= 2


def test_what_is_told_is_not_measured(tiny):
    run = train(tiny.images(), name="resnet-8", layout="channels-last", budget="steps=2")
    assert run.choice == {"layout": "channels-last", "precision": "fp32", "threads": 1, "measured": {}}
    kernels = [p for p in run.network.parameters() if p.ndim == 4 and p.shape[1] > 1 and p.shape[2] > 1]
    assert all(p.is_contiguous(memory_format=torch.channels_last) for p in kernels)


def test_threads_are_those_of_before_afterwards(tiny):
    before = torch.get_num_threads()
    seen = []
    train(tiny.vectors(), Sees(lambda run: seen.append(torch.get_num_threads())), threads=before + 1, budget="steps=1")
    assert seen == [before + 1] and torch.get_num_threads() == before


@pytest.mark.parametrize("device", ["cuda:99", "gpu", "abacus"])
def test_a_device_that_is_not_here_is_named(tiny, device):
    data = tiny.vectors()
    with pytest.raises(ConfigurationError, match=f"device: '{device}' cannot be used here"):
        fit(network_for("mlp-1x8", data), data, device=device, progress=False)


# What is shown


def test_a_silent_run_says_nothing(tiny, capsys):
    train(tiny.vectors())
    assert capsys.readouterr() == ("", "")


def test_a_log_is_plain_lines(tiny, capsys):
    data = tiny.vectors()
    fit(network_for("mlp-1x8", data), data, {"budget": "steps=6", "evaluations": 2, "batch_size": 16, **QUIET})
    out, err = capsys.readouterr()
    lines = err.splitlines()
    assert not out and lines[0] == "contiguous, fp32, 1 threads" and len(lines) == 3
    for line, step in zip(lines[1:], (3, 6), strict=True):
        assert line.startswith(f"step {step} epoch {step / 3:.2f}  loss ") and "accuracy" in line
        assert line.endswith(" examples/s") and "\x1b" not in line


def test_a_terminal_gets_a_bar(tiny, monkeypatch):
    class Terminal(io.StringIO):
        def isatty(self):
            return True

    monkeypatch.setattr(sys, "stderr", Terminal())
    monkeypatch.setenv("TERM", "xterm")
    monkeypatch.setenv("COLUMNS", "120")
    data = tiny.vectors()
    fit(network_for("mlp-1x8", data), data, {"budget": "steps=6", "batch_size": 16, **QUIET})
    shown = sys.stderr.getvalue()
    assert "100 %" in shown and "loss" in shown and "accuracy" in shown and "contiguous, fp32" in shown


def test_tensorboard_files_on_request(tiny, tmp_path):
    reader = pytest.importorskip("tensorboard.backend.event_processing.event_accumulator")
    data = tiny.vectors()
    recipe = {"budget": "steps=6", "evaluations": 2, "batch_size": 16, **QUIET}
    run = fit(network_for("mlp-1x8", data), data, recipe, folder=tmp_path, progress=False, tensorboard=True)
    events = reader.EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    for name in ("train_loss", "val_loss", "val_metric", "lr"):
        assert [(e.step, e.value) for e in events.Scalars(name)] == [
            (entry["step"], pytest.approx(entry[name], rel=1e-6)) for entry in run.history
        ]
    with pytest.raises(ConfigurationError, match="tensorboard: its files need a folder"):
        fit(network_for("mlp-1x8", data), data, recipe, progress=False, tensorboard=True)
