"""Stochastic depth: survival by depth, evaluation at p times the branch, and branches that do not run."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from torch import Tensor, nn

from mainstem import Layer, Stream, network
from mainstem.connections import StochasticDepth
from mainstem.errors import ConfigurationError


class Counted(nn.Module):
    """f(x) = 1, counting its runs."""

    def __init__(self):
        super().__init__()
        self.runs = 0

    def forward(self, x: Tensor) -> Tensor:
        self.runs += 1
        return torch.ones_like(x)


def counted(depth: int, **own) -> Stream:
    return Stream([Layer(Counted(), StochasticDepth(1, index=i, depth=depth, **own)) for i in range(depth)])


def survivals(name: str, spec: str) -> list[float]:
    return [layer.connection.survival for layer in network(name, classes=2, connection=spec).stream]


def test_survival_falls_linearly_with_depth():
    found = survivals("resnet-20", "stochastic-depth")
    assert found == pytest.approx([1 - layer / 9 * 0.5 for layer in range(1, 10)])
    assert found[-1] == 0.5
    assert survivals("resnet-20", "stochastic-depth(final=0.2)")[-1] == pytest.approx(0.2)
    assert survivals("resnet-20", "stochastic-depth(final=0.8, decay=uniform)") == [0.8] * 9


@pytest.mark.parametrize("own", ["final=1.0", "final=1.0, mode=sample", "final=1.0, rescale=train"])
@pytest.mark.parametrize("name", ["resnet-14", "preact-resnet-14"])
@pytest.mark.parametrize("training", [True, False], ids=["train", "eval"])
def test_survival_one_is_the_plain_network(randomise, name, own, training):
    plain = randomise(network(name, classes=3, in_channels=1)).train(training)
    dropped = randomise(network(name, classes=3, in_channels=1, connection=f"stochastic-depth({own})")).train(training)
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(dropped(x), plain(x))


@pytest.mark.parametrize("inner, alpha", [("add", 1.0), ("rezero(alpha=0.5)", 0.5)])
@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_evaluation_scales_each_branch_by_its_survival(randomise, inner, alpha, mode):
    model = network("resnet-14", classes=3, in_channels=1, connection=f"stochastic-depth({inner}, mode={mode})")
    for layer in model.stream:
        randomise(layer.branch)
    model.eval()
    h = model.stem(torch.randn(2, 1, 8, 8))
    for number, layer in enumerate(model.stream, start=1):
        survival = 1 - number / 6 * 0.5
        carried = h if layer.shortcut is None else layer.shortcut(h)
        expected = F.relu(carried + alpha * (survival * layer.branch(h)))
        h = layer(h)[0]
        assert torch.equal(h, expected)


def test_rescaled_in_training_evaluates_as_the_plain_network(randomise):
    plain = randomise(network("resnet-14", classes=3, in_channels=1)).eval()
    dropped = network("resnet-14", classes=3, in_channels=1, connection="stochastic-depth(rescale=train)").eval()
    dropped.load_state_dict(plain.state_dict())
    x = torch.randn(4, 1, 8, 8)
    assert torch.equal(dropped(x), plain(x))


def test_three_quarters_of_the_branches_run():
    depth, draws = 50, 400
    stream, x = counted(depth).train(), torch.zeros(1, 1)
    torch.manual_seed(0)
    for _ in range(draws):
        stream(x)
    runs = torch.tensor([layer.branch.runs for layer in stream]) / draws
    assert float(runs.sum()) == pytest.approx(3 * depth / 4, rel=0.02)
    expected = torch.tensor([layer.connection.survival for layer in stream])
    assert (runs - expected).abs().max() < 4 * 0.5 / draws**0.5


def test_a_dropped_branch_is_left_alone():
    """It does not run, its statistics stay, it gets no gradient; the shortcut does."""
    rarely = "stochastic-depth(final=0.2, decay=uniform)"
    model = network("preact-resnet-14", classes=3, shortcuts="B", connection=rarely).train()
    ran: dict[int, int] = {}
    model.stream.register_layer_hook(lambda index, before, outputs, after: ran.update({index: len(outputs)}))
    x = torch.randn(4, 3, 8, 8)
    torch.manual_seed(0)
    model(x).square().sum().backward()
    assert ran[4] == 0 < sum(ran.values())  # layer 4 changes the shape
    for index, layer in enumerate(model.stream):
        tracked = [m.num_batches_tracked for m in layer.branch.modules() if isinstance(m, nn.BatchNorm2d)]
        assert all(int(count) == ran[index] for count in tracked)
        assert all((p.grad is not None) == bool(ran[index]) for p in layer.branch.parameters())
    assert model.stream[4].shortcut.weight.grad.any() and model.stream[4].before.norm.weight.grad.any()


@pytest.mark.parametrize("mode", ["batch", "sample"])
def test_rescaled_in_training_keeps_the_mean(mode):
    stream = counted(1, final=0.4, mode=mode, rescale="train").train()
    torch.manual_seed(0)
    x = torch.full((4000, 1), 3.0)
    y = stream(x) if mode == "sample" else torch.cat([stream(x[:1]) for _ in range(4000)])
    assert float(y.mean()) == pytest.approx(4.0, abs=4 * (0.6 / 0.4 / 4000) ** 0.5)
    for value in y.unique():  # either the input, or the branch's output at its scale
        assert float(value) == pytest.approx(3.0) or float(value) == pytest.approx(3.0 + 1 / 0.4)


def test_each_example_draws_its_own_coin():
    stream = counted(1, final=0.5, mode="sample").train()
    torch.manual_seed(0)
    y = stream(torch.zeros(400, 3, 2))
    assert stream[0].branch.runs == 1
    alive = y.flatten(1)
    assert torch.equal(alive.amin(1), alive.amax(1))  # whole examples
    assert 0.4 < float(alive.mean()) < 0.6


def test_coins_are_those_of_torchs_seed():
    stream, x = counted(30), torch.zeros(1, 1)
    torch.manual_seed(3)
    first = float(stream(x))
    torch.manual_seed(3)
    assert float(stream(x)) == first
    assert len({float(stream(x)) for _ in range(10)}) > 1


def test_coins_stay_on_the_cpu_under_any_default_device():
    with torch.device("meta"):
        assert counted(5)(torch.zeros(1, 1)).is_meta


@pytest.mark.parametrize(
    "options, message",
    [
        ("final=0", "stochastic-depth: final is 0; valid: a probability in"),
        ("final=1.5", "stochastic-depth: final is 1.5"),
        ("decay=square", "stochastic-depth: decay is 'square'; valid: linear or uniform"),
        ("mode=pixel", "stochastic-depth: mode is 'pixel'; valid: batch or sample"),
        ("rescale=never", "stochastic-depth: rescale is 'never'; valid: eval or train"),
        ("rezreo", "connection: unknown 'rezreo'; did you mean 'rezero'"),
    ],
)
def test_what_does_not_fit_is_refused(options, message):
    with pytest.raises(ConfigurationError, match=message):
        network("resnet-14", classes=2, connection=f"stochastic-depth({options})")
