"""`mainstem reproduce`."""

from __future__ import annotations

import json

import fake_claims
import pytest

from mainstem.claims import ledger


def kept():
    folder = ledger.folder()
    return sorted(path.stem for path in folder.glob("*")) if folder.exists() else []


def test_it_says_what_it_costs_and_what_it_found(fakes, call):
    code, out, err = call("reproduce", "fake-shown")
    assert code == 0
    assert "about 1 s on two cores (4 seeds)" in err
    order = [
        "The paper: The gain is large.",
        "holds  one and one is two",
        "Expected: The gain lies above 0.5.",
        "gain: 1 points",
        "scrambled: 1 points",
        "Verdict: fails",
        "Seeds 0, 1, 2, 3",
    ]
    places = [out.index(part) for part in order]
    assert places == sorted(places)
    assert kept() == ["fake-shown"]


def test_an_object_per_paper(fakes, call):
    code, out, _ = call("reproduce", "fake-holds", "fake-untested", "--json")
    assert code == 0
    first, second = (json.loads(line) for line in out.splitlines())
    for found in (first, second):
        assert found.keys() >= {"id", "exact", "verdict", "expected", "measured", "seeds", "seconds"}
        assert found["exact"][0].keys() == {"name", "passed", "error", "tolerance"}
    assert (first["id"], first["verdict"], first["seeds"]) == ("fake-holds", "holds", [0, 1, 2, 3])
    assert (second["verdict"], second["reason"]) == ("not tested", "It needs a thousand GPUs.")
    assert kept() == ["fake-holds", "fake-untested"]
    assert ledger.read("fake-holds")["measured"] == first["measured"]


def test_a_failed_check_is_exit_code_1_and_is_not_kept(fakes, call):
    code, out, _ = call("reproduce", "fake-broken")
    assert code == 1
    assert "FAILS  the gap (error 0.3, tolerance 1e-06)" in out
    assert "FAILS  not a number (error not finite" in out
    assert "the effect was not run" in out
    assert kept() == []


def test_the_others_run_after_one_that_fails(fakes, call):
    code, out, _ = call("reproduce", "fake-broken", "fake-holds", "--json")
    assert code == 1
    assert [json.loads(line)["verdict"] for line in out.splitlines()] == [None, "holds"]


def test_other_seeds_are_kept_on_request_alone(fakes, call):
    found = json.loads(call("reproduce", "fake-holds", "--seeds", "10,11,12", "--json")[1])
    assert found["seeds"] == [10, 11, 12]
    assert kept() == []
    call("reproduce", "fake-holds", "--seeds", "10,11,12", "--save")
    assert ledger.read("fake-holds")["seeds"] == [10, 11, 12]


def test_the_claims_own_seeds_are_kept_however_given(fakes, call):
    call("reproduce", "fake-holds", "--no-save")
    assert kept() == []
    call("reproduce", "fake-holds", "--seeds", "0,1,2,3")
    assert kept() == ["fake-holds"]


def test_exact_only(fakes, call):
    code, out, err = call("reproduce", "fake-holds", "--exact-only", "--json")
    found = json.loads(out)
    assert (code, found["verdict"], found["measured"], found["seeds"]) == (0, None, [], [])
    assert found["exact"][0]["passed"]
    assert "exact checks only" in err
    assert kept() == []
    assert call("reproduce", "fake-holds", "--exact-only", "--save")[0] == 2


def test_stale_ones_alone(fakes, call):
    call("reproduce", "fake-holds", "fake-fails")
    fake_claims.forget()
    code, out, err = call("reproduce", "--stale")
    assert (code, out) == (0, "")
    assert "Nothing is stale" in err
    path = fakes / "claims" / "fakes" / "fake_fails.py"
    path.write_text(path.read_text() + "changed = True\n")
    fake_claims.forget()
    assert [json.loads(line)["id"] for line in call("reproduce", "--stale", "--json")[1].splitlines()] == ["fake-fails"]
    assert not ledger.is_stale(ledger.read("fake-fails"))
    assert call("reproduce", "--stale", "fake-holds")[1] == ""


def test_another_ledger(fakes, call, tmp_path):
    call("reproduce", "fake-holds", "--ledger", tmp_path / "mine")
    assert (tmp_path / "mine" / "fake-holds.json").exists()
    assert kept() == []


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        ([], "name at least one"),
        (["fake-hold"], "did you mean 'fake-holds'"),
        (["fake-holds", "rezro"], "did you mean 'rezero'"),
        (["fake-unwritten"], "it has no claim yet"),
        (["fake-holds", "--seeds", "a,b"], "not a list of integers"),
        (["fake-holds", "--seeds", "1,1"], "distinct"),
        (["fake-holds", "--seeds", "-1"], "distinct integers >= 0"),
    ],
)
def test_what_cannot_be_run_is_said(arguments, says, fakes, call):
    code, out, err = call("reproduce", *arguments)
    assert code == 2
    assert out == ""
    assert says in err
    assert kept() == []
