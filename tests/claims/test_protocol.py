"""Checks, contrasts and verdicts."""

from __future__ import annotations

import math

import numpy as np
import pytest
import torch

from mainstem.claims import Check, Claim, Contrast, Effect, Lab, NotTested
from mainstem.claims.protocol import overall
from mainstem.claims.reproduce import check
from mainstem.errors import ConfigurationError

ABOVE, AT, BELOW = [1.0, 1.1, 0.9], [0.4, 0.6, 0.5], [0.0, 0.1, -0.1]


@pytest.mark.parametrize(
    ("given", "expected", "tolerance", "error", "passed"),
    [
        (3, 3, 0, 0, True),
        (3, 4, 0, 1, False),
        (torch.tensor([1.0, 2.0]), [1.0, 2.5], 0.5, 0.5, True),
        (torch.tensor([1.0, 2.0]), torch.tensor([1.0, 2.5]), 0.4, 0.5, False),
        (torch.ones(2, dtype=torch.bfloat16, requires_grad=True), 1.0, 0, 0, True),
        (torch.tensor([1 + 1j]).conj(), [1 - 1j], 0, 0, True),
        (torch.ones(2), torch.ones(2, 1), 1, math.inf, False),
        (torch.ones(0), torch.ones(0), 1, math.inf, False),
        (float("inf"), 1.0, 1, math.inf, False),
    ],
)
def test_equality_within_a_tolerance(given, expected, tolerance, error, passed):
    found = Check.equal("it", given, expected, tolerance)
    assert found.error == error
    assert found.passed is passed
    assert found.to_json() == {
        "name": "it",
        "passed": passed,
        "error": error if math.isfinite(error) else None,
        "tolerance": tolerance,
    }


def test_nan_does_not_pass():
    assert not Check.equal("it", torch.tensor([1.0, float("nan")]), 1.0, 1e9).passed
    assert not Check("it", float("nan"), math.inf).passed


def test_conditions():
    assert Check.that("it", True).passed
    assert not Check.that("it", False).passed


@pytest.mark.parametrize(
    ("values", "beyond", "role", "verdict"),
    [
        (ABOVE, "above", "effect", "holds"),
        (AT, "above", "effect", "undecided"),
        (BELOW, "above", "effect", "fails"),
        (ABOVE, "below", "effect", "fails"),
        (AT, "below", "effect", "undecided"),
        (BELOW, "below", "effect", "holds"),
        (ABOVE, "above", "control", "fails"),
        (AT, "above", "control", "undecided"),
        (BELOW, "above", "control", "holds"),
        (ABOVE, "below", "control", "holds"),
        (BELOW, "below", "control", "fails"),
        ([1.0], "above", "effect", "undecided"),
        ([1.0, 1.1, float("nan")], "above", "effect", "undecided"),
        ([1.0, 1.0, 1.0], "above", "effect", "holds"),
        ([0.5, 0.5, 0.5], "above", "effect", "undecided"),
    ],
)
def test_the_verdict_on_a_contrast(values, beyond, role, verdict):
    found = Contrast("gain", 0.5, beyond, role).judge(values)
    assert found.verdict == verdict
    if np.isfinite(values).all() and len(values) > 1:
        assert found.low <= found.mean <= found.high
        assert found.mean == pytest.approx(np.mean(values))
    else:
        assert found.low is None


def test_examples_count_as_well_as_seeds():
    """Two seeds that agree about four examples, which do not agree among themselves, decide nothing."""
    values = np.add.outer([0.01, -0.01], [3.0, -1.0, 2.0, 0.0])
    assert Contrast("gain", 0.5).judge(values).verdict == "undecided"
    assert Contrast("gain", 0.5).judge(values.mean(1)).verdict == "holds"


@pytest.mark.parametrize(
    ("verdicts", "expected"),
    [
        (["holds", "holds"], "holds"),
        (["holds", "undecided"], "undecided"),
        (["holds", "fails"], "fails"),
        (["undecided", "fails"], "fails"),
    ],
)
def test_the_verdict_on_a_claim(verdicts, expected):
    values = {"holds": ABOVE, "undecided": AT, "fails": BELOW}
    assert overall(Contrast("gain", 0.5).judge(values[each]) for each in verdicts) == expected


def effect(measure, *contrasts):
    return Effect(expected="It helps.", contrasts=contrasts or (Contrast("gain"),), measure=measure, seconds=1)


@pytest.mark.parametrize(
    ("values", "says"),
    [
        ({"gian": [1.0, 2.0]}, "gian.*gain"),
        ({}, "gain"),
        ({"gain": [1.0, 2.0, 3.0]}, r"shape \(3,\), for 2 seeds"),
        ({"gain": 1.0}, r"shape \(\)"),
    ],
)
def test_measured_values_are_those_declared(values, says):
    with pytest.raises(ConfigurationError, match=says):
        effect(lambda lab: values).judge(Lab([0, 1]))


def test_a_design_is_whole():
    with pytest.raises(ConfigurationError, match="same name"):
        effect(dict, Contrast("gain"), Contrast("gain", 1.0))
    with pytest.raises(ConfigurationError, match="only controls"):
        effect(dict, Contrast("gain", role="control"))
    with pytest.raises(ConfigurationError, match="did you mean 'control'"):
        Contrast("gain", role="contrl")
    with pytest.raises(ConfigurationError, match="valid: above, below"):
        Contrast("gain", beyond="over")
    with pytest.raises(ConfigurationError, match="checks nothing"):
        check(Claim(exact=lambda: iter(()), effect=NotTested("why")))


def test_exact_checks_run_on_one_thread():
    before = torch.get_num_threads()
    torch.set_num_threads(2)
    try:
        claim = Claim(lambda: [Check.equal("threads", torch.get_num_threads(), 1)], NotTested("why"))
        assert check(claim)[0].passed
        assert torch.get_num_threads() == 2
    finally:
        torch.set_num_threads(before)
