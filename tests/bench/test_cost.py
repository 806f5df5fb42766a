"""Cost columns against counts by hand and against what must not change."""

import math
import os

import pytest
import torch
from torch import nn

from mainstem.bench import cost
from mainstem.data import Data, Split
from mainstem.recipe import Recipe


def flops(module, *shape):
    return cost.flops(module, torch.randn(*shape))


def data(x, y, task="classification", outputs=10):
    split = Split(x, y)
    return Data(
        name="made up",
        task=task,
        inputs="vector",
        train=split,
        val=split,
        test=split,
        shape=tuple(x.shape[1:]),
        outputs=outputs,
        labels=None,
        augment=None,
        meta={},
        sha256="",
    )


class Function(nn.Module):
    """A module from a function."""

    def __init__(self, function):
        super().__init__()
        self.function = function

    def forward(self, x):
        return self.function(x)


def test_a_multiplication_and_an_addition_are_two():
    assert flops(nn.Linear(16, 32), 8, 16) == 2 * 16 * 32
    assert flops(nn.Conv2d(3, 8, 3, padding=1), 4, 3, 10, 10) == 2 * 3 * 8 * 9 * 100
    matrix = torch.randn(5, 7)
    assert flops(Function(lambda x: matrix.to(x.device) @ x[0]), 2, 7) == 2 * 5 * 7


def test_fused_attention_is_counted():
    attention = Function(lambda x: nn.functional.scaled_dot_product_attention(x, x, x))
    assert flops(attention, 2, 4, 8, 16) == 2 * (2 * 4 * 8 * 8 * 16)


def test_recurrent_layers_are_counted():
    for layer, gates in [(nn.LSTM, 4), (nn.GRU, 3), (nn.RNN, 1)]:
        network = layer(16, 32, num_layers=2, batch_first=True)
        expected = 7 * 2 * gates * 32 * ((16 + 32) + (32 + 32))
        assert flops(network, 3, 7, 16) == expected


def test_a_network_that_looks_at_values_is_counted_where_it_runs():
    class Looking(nn.Module):
        def __init__(self):
            super().__init__()
            self.recurrent = nn.LSTM(16, 32, batch_first=True)

        def forward(self, x):
            x = x if x.sum().item() > 1e9 else x + 1  # needs a value
            x = self.recurrent(x)[0][:, None]
            return nn.functional.scaled_dot_product_attention(x, x, x)

    expected = 7 * 2 * 4 * 32 * (16 + 32) + 2 * (2 * 7 * 7 * 32)
    assert flops(Looking(), 3, 7, 16) == expected


def test_fourier_transforms_are_counted():
    n = 64
    real = Function(lambda x: torch.fft.irfft(torch.fft.rfft(x)))
    assert flops(real, 2, 3, n) == 2 * round(2.5 * 3 * n * math.log2(n))
    plane = Function(lambda x: torch.fft.ifft2(torch.fft.fft2(x)).real)
    assert flops(plane, 2, 8, 16) == 2 * 5 * 8 * 16 * 7


def test_an_operation_without_a_formula_is_not_taken_for_free():
    solve = Function(lambda x: torch.linalg.solve(x @ x.mT + torch.eye(x.shape[-1], device=x.device), x))
    assert flops(solve, 2, 5, 5) is None
    norm = Function(lambda x: x / torch.linalg.vector_norm(x, dim=-1, keepdim=True))
    assert flops(norm, 2, 5) == 0

    @torch.library.custom_op("mainstem_test::mystery", mutates_args=())
    def mystery(x: torch.Tensor) -> torch.Tensor:
        return x.clone()

    assert flops(Function(torch.ops.mainstem_test.mystery), 2, 5) is None


def test_batch_norm_and_dropout_are_counted_as_in_use():
    network = nn.Sequential(nn.Linear(4, 4), nn.BatchNorm1d(4), nn.Dropout(0.5)).train()
    assert flops(network, 6, 4) == 2 * 4 * 4
    assert network.training


def test_shared_parameters_count_once():
    one = nn.Linear(8, 8)
    network = nn.Sequential(one, nn.ReLU(), one, nn.Flatten())
    found = cost.measure(network, data(torch.randn(20, 8), torch.randint(0, 8, (20,)), outputs=8))
    assert found["parameters"] == 8 * 8 + 8
    assert found["flops"] == 2 * 2 * 8 * 8


def test_measuring_changes_nothing():
    torch.manual_seed(0)
    network = nn.Sequential(nn.Linear(8, 16), nn.BatchNorm1d(16), nn.Dropout(0.5), nn.Linear(16, 10)).eval()
    before = {name: value.clone() for name, value in network.state_dict().items()}
    state = torch.get_rng_state()
    cost.measure(network, data(torch.randn(40, 8), torch.randint(0, 10, (40,))))
    state_after_data = torch.get_rng_state()
    assert not network.training
    assert all(p.grad is None for p in network.parameters())
    assert all(torch.equal(value, before[name]) for name, value in network.state_dict().items())
    torch.set_rng_state(state)
    torch.randn(40, 8), torch.randint(0, 10, (40,))
    assert torch.equal(state_after_data, torch.get_rng_state())


def test_a_rate_that_would_diverge_does_not_disturb_the_timing():
    network = nn.Sequential(nn.Linear(8, 16), nn.Linear(16, 1))
    recipe = Recipe.parse({"lr": 1e30, "momentum": 0.0})
    found = cost.measure(network, data(torch.randn(40, 8), torch.randn(40, 1), "regression", 1), recipe)
    assert found["step_seconds"] > 0


@pytest.mark.parametrize("optimiser, states", [("sgd", 1), ("adamw", 2)])
def test_peak_memory_by_hand(optimiser, states):
    """Weights, optimiser state, gradients and the activations kept for the backward pass, to a tenth."""
    width, rows = 512, 256
    network = nn.Sequential(*(nn.Sequential(nn.Linear(width, width, bias=False), nn.Tanh()) for _ in range(6)))
    x, y = torch.randn(rows, width), torch.randn(rows, width)
    recipe = Recipe.parse({"batch_size": rows, "optimiser": optimiser})
    weights, activation = 6 * width * width * 4, rows * width * 4
    peak = cost.measure(network, data(x, y, "regression", width), recipe)["peak_bytes"]
    # at the end of the backward pass: every gradient, the batch, the output and a few activations are left
    least = weights * (2 + states)
    assert least < peak < 1.1 * (least + 6 * activation)


def test_peak_memory_grows_with_the_batch():
    network = nn.Sequential(nn.Linear(8, 2048), nn.Tanh(), nn.Linear(2048, 10))
    rows = data(torch.randn(512, 8), torch.randint(0, 10, (512,)))
    small, large = (cost.measure(network, rows, Recipe.parse({"batch_size": n}))["peak_bytes"] for n in (128, 512))
    added = 384 * 2048 * 4  # one activation of the hidden layer for each further row
    assert 0.9 * added < large - small < 4 * added


def test_methods_are_part_of_the_step():
    calls = []

    class Method:
        def gradients(self, run):
            calls.append(run.steps)

    network = nn.Linear(8, 10)
    rows = data(torch.randn(40, 8), torch.randint(0, 10, (40,)))
    cost.measure(network, rows, Recipe.parse({"methods": (Method(),)}))
    assert len(calls) >= cost.WARM_UP + cost.LEAST


def test_what_the_network_raises_comes_through():
    def broken(x):
        raise RuntimeError("no such path")

    network = nn.Sequential(nn.Linear(8, 10), Function(broken))
    with pytest.raises(RuntimeError, match="no such path"):
        cost.measure(network, data(torch.randn(40, 8), torch.randint(0, 10, (40,))))


def test_nothing_is_printed_and_stderr_stays_open(capfd):
    cost.measure(nn.Linear(8, 10), data(torch.randn(40, 8), torch.randint(0, 10, (40,))))
    assert capfd.readouterr().err == ""
    os.write(2, b"still here")
    assert capfd.readouterr().err == "still here"
