"""The contract of claims, over every paper that has one."""

from __future__ import annotations

import importlib.util

import pytest

from mainstem.catalogue import papers
from mainstem.claims import Effect, find, module_of
from mainstem.claims.reproduce import check

IDS = [entry["id"] for entry in papers() if importlib.util.find_spec(module_of(entry["id"]))]

every_claim = pytest.mark.parametrize("id", IDS)


@every_claim
def test_exact_checks_hold(id):
    failed = [each for each in check(find(id)) if not each.passed]
    assert not failed


@every_claim
def test_the_design_is_written_down(id):
    claim = find(id)
    if isinstance(claim.effect, Effect):
        assert any(contrast.role == "control" for contrast in claim.effect.contrasts), "there is no control"
        assert 5 <= len(claim.effect.seeds) <= 10
        assert 0 < claim.effect.seconds <= 300
        assert claim.effect.expected.endswith(".")
    else:
        assert claim.effect.reason.endswith(".")
