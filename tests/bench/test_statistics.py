"""Intervals and verdicts: against references, against simulated truth, and where the data say nothing."""

import numpy as np
import pytest
from scipy import stats

from mainstem.bench.statistics import estimate, holm, interval, summarise, verdict
from mainstem.errors import ConfigurationError


def layout(rng, repetitions, seeds, examples, *, seed=1.0, example=1.0, residual=1.0, mean=0.0):
    """Differences `[R, S, E]` with known components, given as standard deviations."""
    return (
        mean
        + seed * rng.standard_normal((repetitions, seeds, 1))
        + example * rng.standard_normal((repetitions, 1, examples))
        + residual * rng.standard_normal((repetitions, seeds, examples))
    )


def runs(scores, seeds=None):
    """Finals of one arm from scores `[S, E]`."""
    scores = np.asarray(scores, dtype=np.float32)
    seeds = range(len(scores)) if seeds is None else seeds
    rows = zip(seeds, scores, strict=True)
    return [{"seed": seed, "value": float(row.mean()), "scores": row} for seed, row in rows]


def values(numbers):
    return [{"seed": i, "value": v, "scores": None} for i, v in enumerate(numbers)]


def test_one_value_per_seed_is_the_paired_t_test():
    rng = np.random.default_rng(0)
    d = rng.normal(0.3, 1, 7)
    mean, low, high, df = interval(d)
    expected = stats.ttest_1samp(d, 0)
    assert (low, high) == pytest.approx(tuple(expected.confidence_interval(0.95)))
    assert estimate(d).p == pytest.approx(expected.pvalue)
    assert (mean, df) == (pytest.approx(d.mean()), 6)


def test_the_variance_of_the_mean_is_unbiased_where_every_component_shows():
    rng = np.random.default_rng(1)
    d = layout(rng, 3000, 6, 40, seed=0.5, example=1.0, residual=1.0)
    truth = 0.5**2 / 6 + 1 / 40 + 1 / (6 * 40)
    estimates = np.array([estimate(x).error ** 2 for x in d])
    assert d.mean((1, 2)).var() == pytest.approx(truth, rel=0.1)
    assert estimates.mean() == pytest.approx(truth, rel=0.05)


def test_false_positives_on_one_test_split():
    """Five seeds, one split: the crossed test keeps its level where the t over seeds is wrong twice as often.

    The examples' term of the variance is as large as the residual's, the seeds' 0.3 of it.
    """
    rng = np.random.default_rng(2)
    d = layout(rng, 4000, 5, 60, seed=(0.3 / 60) ** 0.5, example=(1 / 5) ** 0.5)
    crossed = np.mean([estimate(x).p < 0.05 for x in d])
    paired = np.mean(stats.ttest_1samp(d.mean(2), 0, axis=1).pvalue < 0.05)
    assert 0.015 < crossed < 0.055
    assert paired > 0.08


@pytest.mark.parametrize("seed, example", [(0.0, 0.0), (1.0, 0.0), (0.0, 1.0), (1.0, 1.0)])
def test_false_positives_at_the_corners(seed, example):
    rng = np.random.default_rng(3)
    d = layout(rng, 2000, 5, 50, seed=seed, example=example)
    assert np.mean([estimate(x).p < 0.05 for x in d]) < 0.075


@pytest.mark.parametrize("crossed", [True, False])
def test_a_detectable_difference_is_found_with_eighty_percent_power(crossed):
    rng = np.random.default_rng(4)
    quiet = layout(rng, 1000, 8, 40, seed=0.3, example=0.5)
    quiet = quiet if crossed else quiet.mean(2)
    size = np.median([estimate(x).detectable(0.05) for x in quiet])
    found = np.mean([estimate(x + size).p < 0.05 for x in quiet])
    assert 0.7 < found < 0.9
    assert np.mean([estimate(x + size / 3).p < 0.05 for x in quiet]) < 0.4


def test_holm_by_hand():
    assert holm({"a": 0.01, "b": 0.04, "c": 0.03}) == pytest.approx({"a": 0.03, "c": 0.06, "b": 0.06})
    assert holm({"a": 0.9, "b": 0.8}) == pytest.approx({"b": 1.0, "a": 1.0})
    assert holm({}) == {}


def test_holm_turns_a_small_difference_among_many_arms_into_a_tie():
    rng = np.random.default_rng(5)
    base = rng.normal(0, 1, 6)
    noise = rng.normal(0, 1, 6)
    noise -= noise.mean()
    shift = 2.9 * noise.std(ddof=1) / np.sqrt(6)  # t = 2.9 on 5 degrees of freedom: p = 0.034
    alone = {"base": values(base), "arm": values(base + noise + shift)}
    many = alone | {f"other {i}": values(base + rng.normal(0, 5, 6)) for i in range(5)}
    assert summarise(alone, "base", True)["arm"]["difference"]["verdict"] == "better"
    one = summarise(many, "base", True)["arm"]["difference"]
    assert one["p"] == pytest.approx(0.034, abs=0.002)
    assert one["verdict"] == "tie"
    assert one["p_holm"] > 0.05
    assert one["detectable"] > summarise(alone, "base", True)["arm"]["difference"]["detectable"]


def test_direction_of_a_verdict_follows_the_metric():
    rng = np.random.default_rng(6)
    base = rng.normal(0, 1, (5, 80))
    finals = {"base": runs(base), "up": runs(base + 1 + 0.1 * rng.normal(0, 1, (5, 80)))}
    assert summarise(finals, "base", True)["up"]["difference"]["verdict"] == "better"
    assert summarise(finals, "base", False)["up"]["difference"]["verdict"] == "worse"
    assert summarise(finals, "base", True)["up"]["difference"]["mean"] == pytest.approx(1, abs=0.02)
    assert summarise(finals, "base", True)["base"]["difference"] is None


def test_pairing_matches_seeds_and_not_positions():
    rng = np.random.default_rng(7)
    base = rng.normal(0, 3, (4, 30))
    arm = runs((base + 0.5)[::-1], seeds=[3, 2, 1, 0])
    difference = summarise({"base": runs(base), "arm": arm}, "base", True)["arm"]["difference"]
    assert (difference["low"], difference["high"]) == pytest.approx((0.5, 0.5), abs=1e-5)


def test_identical_arms_tie_and_claim_nothing():
    rng = np.random.default_rng(8)
    correct = rng.random((5, 40)) < 0.9
    for arm in (runs(correct), values([0.9] * 5)):
        finals = {"a": arm, "b": list(arm)}
        difference = summarise(finals, "a", True)["b"]["difference"]
        assert difference["verdict"] == "tie"
        assert (difference["mean"], difference["low"], difference["high"], difference["p"]) == (0, 0, 0, 1)
        assert difference["detectable"] is None


def test_the_same_difference_at_every_seed_counts_as_one_observation():
    finals = {"a": values([0.5] * 5), "b": values([0.7] * 5)}
    assert summarise(finals, "a", True)["b"]["difference"]["verdict"] == "tie"
    everywhere = {"a": runs(np.zeros((5, 40))), "b": runs(np.ones((5, 40)))}
    assert summarise(everywhere, "a", True)["b"]["difference"]["verdict"] == "better"


def test_seeds_that_change_nothing_leave_the_test_over_examples():
    rng = np.random.default_rng(9)
    row = rng.normal(0.2, 1, 50)
    found = estimate(np.tile(row, (4, 1)))
    assert found.p == pytest.approx(stats.ttest_1samp(row, 0).pvalue)
    assert found.df == pytest.approx(49)


def test_a_single_seed_has_no_interval_and_no_verdict():
    assert interval([0.4]) == (0.4, None, None, None)
    assert interval(np.ones((1, 30))) == (1.0, None, None, None)
    found = summarise({"a": values([0.5]), "b": values([0.9])}, "a", True)["b"]
    assert (found["mean"], found["low"], found["high"]) == (0.9, None, None)
    assert found["difference"] == {
        "mean": pytest.approx(0.4), "low": None, "high": None,
        "p": None, "p_holm": None, "verdict": "unknown", "detectable": None,
    }  # fmt: skip


def test_failed_runs_are_left_out_and_an_arm_of_failures_is_unknown():
    failed = {"seed": 1, "value": None, "scores": None}
    base = values([0.5, 0.6, 0.7])
    some = [{"seed": 0, "value": 0.6, "scores": None}, failed, {"seed": 2, "value": 0.9, "scores": None}]
    found = summarise({"a": base, "some": some, "none": [failed]}, "a", True)
    assert found["some"]["difference"]["mean"] == pytest.approx(0.15)
    assert found["none"]["mean"] is None
    assert found["none"]["difference"]["verdict"] == "unknown"
    # the arm that failed is no test, so it costs the others no correction
    assert found["some"]["difference"]["p_holm"] == found["some"]["difference"]["p"]
    without = summarise({"a": [failed], "b": base}, "a", True)
    assert without["b"]["difference"]["verdict"] == "unknown"


def test_examples_that_do_not_match_are_tested_over_seeds():
    rng = np.random.default_rng(10)
    a, b = rng.normal(0, 1, (5, 30)), rng.normal(0.3, 1, (5, 30))
    expected = stats.ttest_1samp((b - a).mean(1), 0).pvalue
    redrawn = summarise({"a": runs(a), "b": runs(b)}, "a", True, crossed=False)
    assert redrawn["b"]["difference"]["p"] == pytest.approx(expected, rel=1e-4)
    lengths = [*runs(b)[:4], {"seed": 4, "value": float(b[4].mean()), "scores": b[4, :-1]}]
    uneven = summarise({"a": runs(a), "b": lengths}, "a", True)
    assert uneven["b"]["difference"]["p"] == pytest.approx(expected, rel=1e-4)
    # a metric that is not the mean of its scores, such as a root mean square, is tested by its values
    roots = {k: [r | {"value": abs(r["value"]) ** 0.5} for r in runs(v)] for k, v in {"a": a, "b": b}.items()}
    root = [x["value"] - y["value"] for x, y in zip(roots["b"], roots["a"], strict=True)]
    found = summarise(roots, "a", False)["b"]["difference"]
    assert found["p"] == pytest.approx(stats.ttest_1samp(root, 0).pvalue)


def test_values_that_are_not_finite_make_no_verdict():
    found = summarise({"a": values([0.5, 0.6]), "b": values([0.5, float("inf")])}, "a", True)["b"]
    assert (found["mean"], found["difference"]["verdict"]) == (None, "unknown")


def test_a_claims_verdict():
    assert verdict(0.2, 0.4, 0.1) == "holds"
    assert verdict(-0.2, 0.05, 0.1) == "fails"
    assert verdict(0.0, 0.4, 0.1) == "undecided"
    assert verdict(0.0, 0.0, 0.0) == "undecided"
    assert verdict(None, None, 0.1) == "undecided"


def test_wrong_input_is_named():
    with pytest.raises(ConfigurationError, match=r"\(2, 2, 2\)"):
        interval(np.zeros((2, 2, 2)))
    with pytest.raises(ConfigurationError, match="did you mean 'resnet'"):
        summarise({"resnet": []}, "resnett", True)
