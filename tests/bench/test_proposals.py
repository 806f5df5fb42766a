import math

import pytest

from mainstem.bench.experiment import parse_space
from mainstem.bench.plan import first_of_batch
from mainstem.bench.proposals import SPREAD, propose

SPACE = parse_space(
    {
        "lr": {"low": 0.001, "high": 1, "log": True},
        "batch_size": {"low": 8, "high": 64},
        "betas": [[0.9, 0.99], [0.9, 0.999]],
    }
)
DEFAULT = {"lr": 0.1, "batch_size": 32, "betas": [0.9, 0.999]}


def search(trials, arm="a", seed=0, batch=4, fails=()):
    """Tuning of an objective whose best lr is 0.02."""
    results = []
    for k in range(trials):
        known = results[: first_of_batch(k, batch)]
        setting = propose(SPACE, DEFAULT, k, known, seed=seed, arm=arm, higher_is_better=False)
        results.append((setting, None if k in fails else abs(math.log(setting["lr"] / 0.02))))
    return [setting for setting, _ in results]


def test_trial_0_is_the_default_and_all_lie_in_the_space():
    settings = search(16)
    assert settings[0] == DEFAULT
    for setting in settings:
        assert 0.001 <= setting["lr"] <= 1
        assert isinstance(setting["batch_size"], int) and 8 <= setting["batch_size"] <= 64
        assert setting["betas"] in ([0.9, 0.99], [0.9, 0.999])


def test_proposals_repeat_and_later_ones_differ_between_arms_and_seeds():
    assert search(12) == search(12)
    assert search(12)[SPREAD:] != search(12, arm="b")[SPREAD:]
    assert search(12)[SPREAD:] != search(12, seed=1)[SPREAD:]
    assert len({setting["lr"] for setting in search(16)}) == 16


@pytest.mark.parametrize("default", [0.1, 0.001, 1.0, 0.03])
def test_the_first_trials_spread_over_the_range_and_keep_off_the_default(default):
    space = parse_space({"lr": {"low": 0.001, "high": 1, "log": True}})
    for trials in (3, 4, SPREAD):
        ask = {"results": [], "seed": 0, "arm": "a", "higher_is_better": True}
        rates = [propose(space, {"lr": default}, k, **ask)["lr"] for k in range(trials)]
        places = sorted((math.log10(rate) + 3) / 3 % 1 for rate in rates)  # the range as a circle
        gaps = [b - a for a, b in zip(places, [*places[1:], places[0] + 1], strict=True)]
        assert max(gaps) < 2 / trials and min(gaps) > 0.3 / trials


def test_later_trials_follow_the_results():
    settings = search(40)
    distance = [abs(math.log(setting["lr"] / 0.02)) for setting in settings]
    assert sorted(distance[20:])[10] < sorted(distance[:SPREAD])[SPREAD // 2]


def test_a_failed_trial_counts_as_the_worst():
    settings = search(12)
    values = [-abs(math.log(setting["lr"] / 0.02)) for setting in settings]
    values[4] = None
    ask = {"seed": 0, "arm": "a", "higher_is_better": True}

    def next_if(fourth):
        known = [(s, fourth if v is None else v) for s, v in zip(settings, values, strict=True)]
        return propose(SPACE, DEFAULT, 12, known, **ask)

    assert next_if(None) == next_if(min(v for v in values if v is not None))
    assert next_if(None) != next_if(10.0)
    assert propose(SPACE, DEFAULT, 12, [(s, None) for s in settings], **ask)["lr"] > 0


def test_few_choices_are_each_tried_once():
    space = parse_space({"lr": [0.1, 0.2, 0.3], "clip": [None, 1.0]})
    default = {"lr": 0.2, "clip": None}
    ask = {"results": [], "seed": 0, "higher_is_better": True}
    tried = [propose(space, default, k, arm="a", **ask) for k in range(6)]
    assert tried[0] == default
    assert sorted((s["lr"], str(s["clip"])) for s in tried) == [
        (r, c) for r in (0.1, 0.2, 0.3) for c in ("1.0", "None")
    ]
    assert tried == [propose(space, default, k, arm="b", **ask) for k in range(6)]  # arms with one space try the same
    only = parse_space({"lr": [0.2]})
    assert propose(only, {"lr": 0.2}, 3, arm="a", **ask) == {"lr": 0.2}
