"""Batches: their order is a function of seed and epoch, in memory and read from a data set."""

from __future__ import annotations

import pytest
import torch

from mainstem import Recipe, evaluate, fit, network_for
from mainstem.batches import Batches
from mainstem.data import Split

CPU = torch.device("cpu")


class Lazy(torch.utils.data.Dataset):
    """Examples that are read one at a time."""

    def __init__(self, x):
        self.x = x

    def __len__(self):
        return len(self.x)

    def __getitem__(self, index):
        return self.x[index].clone()


def lazy(data):
    """The same data behind a data set."""
    for role in ("train", "val", "test"):
        split = getattr(data, role)
        setattr(data, role, Split(Lazy(split.x), split.y))
    return data


def numbered(n=20, batch_size=6, seed=0, augment=None, read=False):
    x = torch.arange(n, dtype=torch.float32)[:, None]
    split = Split(Lazy(x) if read else x, torch.arange(n))
    return Batches(split, Recipe(batch_size=batch_size, seed=seed), CPU, augment)


def rows(batches, steps):
    found = []
    for step in steps:
        x, y = batches[step]
        assert torch.equal(x[:, 0].long(), y)  # inputs and targets stay together
        found.append(y.tolist())
    return found


def seen_in(batches, epoch):
    per = batches.per_epoch
    return [row for batch in rows(batches, range(per * epoch, per * (epoch + 1))) for row in batch]


@pytest.mark.parametrize("read", [False, True], ids=["memory", "read"])
def test_every_example_once_an_epoch(read):
    batches = numbered(n=24, read=read)
    assert batches.per_epoch == 4
    for epoch in range(2):
        seen = seen_in(batches, epoch)
        assert sorted(seen) == list(range(24)) and seen != sorted(seen)


def test_the_last_incomplete_batch_is_left_out():
    batches = numbered(n=20)
    assert batches.per_epoch == 3
    seen = seen_in(batches, 0)
    assert len(seen) == len(set(seen)) == 18
    left = [set(range(20)) - set(seen_in(batches, epoch)) for epoch in range(4)]
    assert len({frozenset(each) for each in left}) > 1  # not the same ones every time


def test_a_split_smaller_than_a_batch_is_one():
    batches = numbered(n=4)
    assert batches.per_epoch == 1 and sorted(rows(batches, [0])[0]) == [0, 1, 2, 3]


def test_order_is_a_function_of_seed_and_epoch():
    in_turn = rows(numbered(), range(12))
    assert rows(numbered(), range(12)) == in_turn
    jumping = [9, 2, 2, 11, 0, 5]
    assert rows(numbered(), jumping) == [in_turn[step] for step in jumping]
    assert in_turn[:3] != in_turn[3:6]
    assert rows(numbered(seed=1), range(12)) != in_turn
    torch.manual_seed(123)
    assert rows(numbered(), range(12)) == in_turn  # whatever else was drawn


def test_data_that_are_read_come_in_the_same_order():
    in_memory = rows(numbered(), range(6))
    assert rows(numbered(read=True), range(6)) == in_memory
    assert rows(numbered(read=True), range(4, 6)) == in_memory[4:6]  # from the middle of an epoch


def test_augmentation_is_a_function_of_seed_and_step():
    def noisy(x, generator):
        return x + torch.rand(x.shape, generator=generator)

    first, again, other = (numbered(augment=noisy, seed=seed) for seed in (0, 0, 1))
    a = [first[step][0] for step in (0, 1)]
    assert torch.equal(again[1][0], a[1]) and torch.equal(again[0][0], a[0])
    assert not torch.equal(a[0] % 1, a[1] % 1) and not torch.equal(other[0][0] % 1, a[0] % 1)
    assert not (first.sample()[0] % 1).any()  # plain, for timing
    assert torch.equal(first[0][0], a[0])


def test_the_layout_is_the_one_asked_for():
    x = torch.randn(8, 2, 4, 4)
    batches = Batches(Split(x, torch.zeros(8, dtype=torch.long)), Recipe(batch_size=4), CPU)
    assert batches[0][0].is_contiguous()
    batches.layout = "channels-last"
    assert batches[0][0].is_contiguous(memory_format=torch.channels_last)


RECIPE = {
    "budget": "epochs=2", "batch_size": 16, "evaluations": 2, "lr": 0.05, "methods": ("mixup",),
    "layout": "contiguous", "precision": "fp32", "threads": 1,
}  # fmt: skip
CONNECTION = "stochastic-depth(mode=sample)"  # draws from torch's generator at every step


def test_a_run_on_data_that_are_read_equals_one_in_memory(tiny):
    runs = []
    for data in (tiny.images(), lazy(tiny.images())):
        data.augment = lambda x, generator: x + 0.1 * torch.randn(x.shape, generator=generator)
        model = network_for("resnet-8", data, connection=CONNECTION, seed=0)
        runs.append(fit(model, data, RECIPE, progress=False))
    for a, b in zip(*(run.network.state_dict().values() for run in runs), strict=True):
        assert torch.equal(a, b)
    found = [evaluate(run.network, run.data.test, run.data) for run in runs]
    assert found[0].loss == found[1].loss and (found[0].scores == found[1].scores).all()


def test_a_run_on_data_that_are_read_resumes_in_the_middle_of_an_epoch(tiny, tmp_path, interrupt):
    data = lazy(tiny.images())
    recipe = Recipe.parse({**RECIPE, "checkpoint_every": 2, "evaluations": 1})

    def make():
        return network_for("resnet-8", data, connection=CONNECTION, seed=0)

    unbroken = fit(make(), data, recipe, progress=False)
    model = make()
    interrupt(model, 3)
    with pytest.raises(interrupt.error):
        fit(model, data, recipe, folder=tmp_path, progress=False)
    resumed = fit(make(), data, recipe, folder=tmp_path, progress=False)
    for a, b in zip(unbroken.network.state_dict().values(), resumed.network.state_dict().values(), strict=True):
        assert torch.equal(a, b)


def test_evaluating_draws_nothing(tiny):
    model = network_for("resnet-8", tiny.images(), connection=CONNECTION, seed=0)
    for data in (tiny.images(), lazy(tiny.images())):
        state = torch.get_rng_state()
        evaluate(model, data.val, data)
        assert torch.equal(torch.get_rng_state(), state)
