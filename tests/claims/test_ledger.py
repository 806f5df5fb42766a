"""The ledger: whole entries, stale ones, damaged ones, and where it lies."""

from __future__ import annotations

import importlib
import json
from pathlib import Path

import fake_claims
import pytest

from mainstem.claims import find, ledger
from mainstem.claims.reproduce import reproduce
from mainstem.errors import ConfigurationError, DamagedFileError


@pytest.fixture
def fakes(tmp_path, monkeypatch):
    with fake_claims.installed(tmp_path, monkeypatch) as copy:
        yield copy


@pytest.mark.parametrize(
    ("id", "verdict"),
    [
        ("fake-holds", "holds"),
        ("fake-fails", "fails"),
        ("fake-undecided", "undecided"),
        ("fake-shown", "fails"),
        ("fake-untested", "not tested"),
    ],
)
def test_an_entry_comes_back_as_it_was_written(id, verdict, fakes):
    found = reproduce(id)
    assert found["verdict"] == verdict
    assert ledger.read(id) is None
    path = ledger.write(found)
    assert path.name == f"{id}.json"
    assert ledger.read(id) == {"schema": ledger.SCHEMA, **found}
    assert not ledger.is_stale(found)


def test_what_an_entry_holds(fakes):
    found = reproduce("fake-shown", seeds=[7, 8, 9])
    effect, control = found["measured"]
    assert (effect["role"], effect["verdict"]) == ("effect", "holds")
    assert (control["role"], control["verdict"]) == ("control", "fails")
    assert effect["low"] < effect["mean"] < effect["high"]
    assert effect["threshold"] == 0.5
    assert found["exact"] == [{"name": "one and one is two", "passed": True, "error": 0.0, "tolerance": 0.0}]
    assert found["seeds"] == [7, 8, 9]
    assert found["versions"].keys() >= {"mainstem", "torch", "python"}
    assert found["hardware"]["cores"] >= 1
    assert "mainstem.claims.fakes.design" in found["code"]["modules"].split()


def test_exact_checks_that_fail_stop_the_effect(fakes):
    found = reproduce("fake-broken")
    assert [check["passed"] for check in found["exact"]] == [True, False, False]
    assert found["exact"][2]["error"] is None
    assert (found["verdict"], found["measured"], found["seeds"]) == (None, [], [])


def test_exact_only(fakes):
    found = reproduce("fake-holds", exact_only=True)
    assert (found["verdict"], found["measured"]) == (None, [])
    assert found["exact"][0]["passed"]


@pytest.mark.parametrize("edited", ["claims/fakes/fake_holds.py", "claims/fakes/design.py", "claims/protocol.py"])
def test_an_edit_makes_an_entry_stale(edited, fakes):
    found = reproduce("fake-holds")
    path = fakes / edited
    source = path.read_text()
    path.write_text(source + "# a comment\n")
    fake_claims.forget()
    assert not ledger.is_stale(found)
    path.write_text(source + "changed = True\n")
    fake_claims.forget()
    assert ledger.is_stale(found)
    path.write_text(source)
    fake_claims.forget()
    assert not ledger.is_stale(found)


@pytest.mark.parametrize(
    "damage",
    [
        lambda text: "",
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: text.replace('"schema": 1', '"schema": 99'),
        lambda text: text.replace('"verdict": "holds",\n "exp', '"verdict": "hold",\n "exp'),
        lambda text: text.replace('"id": "fake-holds"', '"id": "fake-fails"'),
        lambda text: text.replace('"code"', '"coda"'),
        lambda text: text.replace('"modules"', '"module"'),
    ],
)
def test_a_damaged_entry_is_named(damage, fakes):
    path = ledger.write(reproduce("fake-holds"))
    text = path.read_text()
    assert damage(text) != text
    path.write_text(damage(text))
    with pytest.raises(DamagedFileError, match="fake-holds.json"):
        ledger.read("fake-holds")


def test_where_the_ledger_lies(fakes, tmp_path, monkeypatch):
    assert ledger.folder(tmp_path / "given") == tmp_path / "given"
    assert ledger.folder() == tmp_path / "ledger"
    monkeypatch.delenv("MAINSTEM_LEDGER")
    assert ledger.folder() == Path(__file__).parents[2] / "ledger"


def test_an_installation_without_a_ledger(fakes, tmp_path, monkeypatch):
    monkeypatch.delenv("MAINSTEM_LEDGER")
    monkeypatch.setattr(ledger, "__file__", str(tmp_path / "site-packages" / "mainstem" / "claims" / "ledger.py"))
    assert ledger.folder() is None
    assert ledger.read("fake-holds") is None
    with pytest.raises(ConfigurationError, match="--ledger"):
        ledger.write({"id": "fake-holds"})
    packaged = tmp_path / "site-packages" / "mainstem" / "ledger"
    packaged.mkdir(parents=True)
    assert ledger.folder() == packaged


def test_a_ledger_that_cannot_be_written(fakes, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(ConfigurationError, match="fake-holds.json cannot be written"):
        ledger.write(reproduce("fake-holds", exact_only=True), tmp_path / "file")
    assert json.loads((tmp_path / "index.json").read_text())  # nothing else was touched


def test_claims_that_cannot_be_found(fakes):
    with pytest.raises(ConfigurationError, match="did you mean 'fake-holds'"):
        find("fake-hold")
    with pytest.raises(ConfigurationError, match="fake-unwritten: it has no claim yet"):
        find("fake-unwritten")
    (fakes / "claims" / "fakes" / "fake_unwritten.py").write_text("import no_such_package\n")
    importlib.invalidate_caches()
    with pytest.raises(ConfigurationError, match="needs no_such_package"):
        find("fake-unwritten")
