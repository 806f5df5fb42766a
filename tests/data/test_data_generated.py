"""Generators against solvers written anew: slow, one example at a time, from the input alone."""

import itertools

import numpy as np
import pytest

from mainstem.data import load
from mainstem.data.core import ROLES
from mainstem.data.groups import elements, table
from mainstem.data.teachers import Teacher


def pairs_of(data, most=100):
    for role in ROLES:
        split = getattr(data, role)
        yield from zip(split.x[:most].tolist(), split.y[:most].tolist(), strict=True)


@pytest.mark.parametrize(
    "options", [{}, {"pairs": 3, "queries": 3, "keys": 3, "values": 2, "gap": 7, "count": 50, "val": 10, "test": 20}]
)
def test_associative_recall(options):
    o = {"pairs": 8, "queries": 4, "keys": 32, "values": 32, "gap": 0, **options}
    data = load("associative-recall", **options)
    assert data.shape == (2 * o["pairs"] + o["gap"] + o["queries"],) and data.outputs == 1 + o["keys"] + o["values"]
    for x, y in pairs_of(data):
        memory, expected, asked = {}, [], []
        for t, token in enumerate(x):
            is_key = 1 <= token <= o["keys"]
            if t < 2 * o["pairs"]:
                assert is_key == (t % 2 == 0)
                if not is_key:
                    assert o["keys"] < token <= o["keys"] + o["values"]
                    assert x[t - 1] not in memory
                    memory[x[t - 1]] = token
                expected.append(-100)
            elif t < 2 * o["pairs"] + o["gap"]:
                assert token == 0
                expected.append(-100)
            else:
                asked.append(token)
                expected.append(memory[token])
        assert y == expected and len(set(asked)) == o["queries"]


@pytest.mark.parametrize("options", [{}, {"length": 9, "items": 9, "symbols": 3}, {"length": 200, "items": 2}])
def test_selective_copy(options):
    o = {"length": 64, "items": 8, "symbols": 8, **options}
    data = load("selective-copy", **options)
    assert data.outputs == 2 + o["symbols"]
    places = set()
    for x, y in pairs_of(data):
        kept = [token for token in x[: o["length"]] if token != 0]
        places.add(tuple(t for t in range(o["length"]) if x[t]))
        assert min(kept) >= 2 and len(kept) == o["items"]
        assert x[o["length"] :] == [1] * o["items"]
        assert y == [-100] * o["length"] + kept
    assert len(places) > 100 or o["items"] == o["length"]


@pytest.mark.parametrize("options", [{}, {"length": 12, "delay": 0}, {"length": 30, "delay": 29, "symbols": 2}])
def test_delayed_recall(options):
    o = {"length": 64, "delay": 16, "symbols": 8, **options}
    for x, y in pairs_of(load("delayed-recall", **options)):
        queue = [-100] * o["delay"]
        for token, answer in zip(x, y, strict=True):
            queue.append(token)
            assert answer == queue.pop(0)


def compose(first, then):
    """The permutation that does `first` and then `then`."""
    return tuple(then[first[i]] for i in range(len(first)))


@pytest.mark.parametrize(("group", "order"), [("Z2", 2), ("Z7", 7), ("S3", 6), ("S5", 120), ("A4", 12), ("A5", 60)])
def test_state_tracking(group, order):
    data = load("state-tracking", group=group, length=20, count=300, val=50, test=50)
    listed = elements(group)
    assert len(listed) == len(set(listed)) == data.outputs == order
    assert listed[0] == tuple(range(len(listed[0])))
    for x, y in pairs_of(data, 50):
        state, expected = listed[0], []
        for token in x:
            state = compose(state, listed[token])
            expected.append(listed.index(state))
        assert y == expected
    assert set(np.unique(data.train.x)) == set(range(order))


def test_parity_is_z2():
    data = load("state-tracking", group="Z2", scored="last", length=24)
    for x, y in pairs_of(data):
        assert y == [-100] * 23 + [sum(x) % 2]


def test_test_sequences_may_be_longer():
    data = load("state-tracking", group="S3", length=10, test_length=40)
    assert data.shape == (10,) and data.val.x.shape[1] == 10 and data.test.x.shape == data.test.y.shape == (1000, 40)


@pytest.mark.parametrize("group", ["Z5", "S4", "A4"])
def test_a_multiplication_table_is_that_of_a_group(group):
    product = table(group)
    n = len(product)
    assert (product[0] == np.arange(n)).all() and (product[:, 0] == np.arange(n)).all()
    assert all(sorted(row) == list(range(n)) for row in [*product.tolist(), *product.T.tolist()])
    for a, b, c in itertools.product(range(n), repeat=3):
        assert product[product[a, b], c] == product[a, product[b, c]]


def test_a_teacher_says_the_targets():
    for seed, options in (
        (None, {}),
        (4, {"features": 5, "hidden": 7, "depth": 3, "outputs": 2, "activation": "tanh"}),
    ):
        data = load("teacher", seed=seed, **options)
        truth = Teacher.draw(**data.meta["teacher"])
        for x, y in pairs_of(data, 20):
            v = x
            for i, (weight, bias) in enumerate(zip(truth.weights, truth.biases, strict=True)):
                v = [
                    sum(a * w for a, w in zip(v, column, strict=True)) + b
                    for column, b in zip(weight.T, bias, strict=True)
                ]
                if i < len(truth.weights) - 1:
                    v = [np.tanh(a) if truth.activation == "tanh" else max(a, 0.0) for a in v]
            v = [(a - m) / s for a, m, s in zip(v, truth.mean, truth.std, strict=True)]
            assert np.allclose(v, y, atol=1e-5)
        assert abs(data.train.y.mean()) < 0.1 and abs(data.train.y.std() - 1) < 0.1
        assert data.meta["ideal"] == {"mse": 0.0}


def test_what_is_ideal_for_a_noisy_teacher_is_what_the_teacher_scores():
    data = load("teacher", noise=0.5, test=20000)
    truth = Teacher.draw(**data.meta["teacher"])
    scored = float(((truth(data.test.x.numpy()) - data.test.y.numpy()) ** 2).mean())
    assert scored == pytest.approx(data.meta["ideal"]["mse"], rel=0.05) and data.meta["ideal"]["mse"] == 0.25

    data = load("teacher", task="classification", noise=0.3, outputs=4, test=20000)
    truth = Teacher.draw(**data.meta["teacher"])
    scored = 100 * float((truth(data.test.x.numpy()).argmax(1) == data.test.y.numpy()).mean())
    assert scored == pytest.approx(data.meta["ideal"]["accuracy"], abs=1.5)
    assert data.meta["ideal"]["accuracy"] == pytest.approx(100 * (1 - 0.3 * 0.75))


def test_the_teacher_is_another_for_another_seed():
    weights = [Teacher.draw(**load("teacher", seed=seed).meta["teacher"]).weights[0] for seed in (None, 0, 1)]
    for one, other in itertools.combinations(weights, 2):
        assert not np.allclose(one, other)


@pytest.mark.parametrize("name", ["associative-recall", "delayed-recall", "selective-copy", "state-tracking"])
def test_the_ideal_of_exact_generators(name):
    assert load(name).meta["ideal"] == {"accuracy": 100.0, "nats": 0.0}


def test_sizes_are_what_was_asked_for_and_the_test_split_does_not_depend_on_the_training_split():
    small, large = (load("delayed-recall", count=count, val=30, test=40, seed=1) for count in (10, 3000))
    assert [len(small.train), len(small.val), len(small.test)] == [10, 30, 40]
    assert (small.test.x == large.test.x).all() and (small.val.x == large.val.x).all()


def test_all_of_a_small_space_can_be_had():
    data = load("state-tracking", group="Z2", length=6, count=40, val=12, test=12)
    seen = {tuple(x) for x, _ in pairs_of(data)}
    assert len(seen) == 64
