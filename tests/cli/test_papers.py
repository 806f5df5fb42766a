"""`mainstem papers` and `mainstem paper`."""

from __future__ import annotations

import json
import subprocess
import sys

import fake_claims
import pytest

from mainstem.claims import ledger
from mainstem.claims.reproduce import reproduce


def test_the_list_has_what_was_measured(fakes, call):
    ledger.write(reproduce("fake-shown"))
    ledger.write(reproduce("fake-untested"))
    code, out, _ = call("papers", "--json", "--area", "fakes")
    rows = {row["id"]: row for row in json.loads(out)}
    assert code == 0
    assert set(rows) == {*fake_claims.IDS, "fake-unwritten"}
    for row in rows.values():
        assert row.keys() >= {"id", "title", "area", "code", "verdict", "stale"}
    verdicts = {id: row["verdict"] for id, row in rows.items() if row["verdict"]}
    assert verdicts == {"fake-shown": "fails", "fake-untested": "not tested"}
    code, out, _ = call("papers", "--area", "fakes")
    lines = {line.split()[0]: line for line in out.splitlines()}
    assert "fails" in lines["fake-shown"]
    assert "not measured" in lines["fake-unwritten"]


def test_stale_verdicts_are_marked(fakes, call):
    ledger.write(reproduce("fake-holds"))
    assert "stale" not in call("papers")[1]
    (fakes / "claims" / "fakes" / "design.py").write_text("changed = True\n")
    fake_claims.forget()
    code, out, err = call("papers")
    assert code == 0
    assert "holds (stale)" in out
    assert "reproduce --stale" in err
    (row,) = (row for row in json.loads(call("papers", "--json")[1]) if row["id"] == "fake-holds")
    assert (row["verdict"], row["stale"]) == ("holds", True)
    assert "Stale" in call("paper", "fake-holds")[1]


def test_a_damaged_entry_hides_no_other(fakes, call):
    ledger.write(reproduce("fake-holds"))
    broken = ledger.folder() / "fake-fails.json"
    broken.write_text('{"schema": 1, "id"')
    code, out, err = call("papers", "--json")
    verdicts = {row["id"]: row["verdict"] for row in json.loads(out)}
    assert code == 0
    assert (verdicts["fake-holds"], verdicts["fake-fails"]) == ("holds", None)
    assert str(broken) in err
    code, out, err = call("paper", "fake-fails")
    assert code == 2
    assert str(broken) in err


def test_another_ledger(fakes, call, tmp_path):
    ledger.write(reproduce("fake-holds"), tmp_path / "mine")
    rows = json.loads(call("papers", "--json", "--ledger", tmp_path / "mine")[1])
    assert {row["id"]: row["verdict"] for row in rows}["fake-holds"] == "holds"
    assert "holds" not in call("papers")[1].replace("fake-holds", "")


def test_the_page_of_a_paper(fakes, call):
    out = call("paper", "fake-shown")[1]
    for part in ("On fake-shown", "A. Author", "The gain is large.", "mainstem.stream:Connection", "not yet"):
        assert part in out
    ledger.write(reproduce("fake-shown"))
    out = call("paper", "fake-shown")[1]
    for part in ("Verdict: fails", "scrambled: 1 points", "control, not above 0.5", "mainstem reproduce fake-shown"):
        assert part in out


def test_unknown_names_get_the_nearest(call):
    assert call("papers", "--area", "conections")[0] == 2
    assert "did you mean 'connections'" in call("papers", "--area", "conections")[2]
    assert "did you mean 'stochastic-depth'" in call("paper", "stochastic-dept")[2]


@pytest.mark.parametrize("command", [["papers"], ["papers", "--json"], ["paper", "rezero"]])
def test_nothing_heavy_is_imported(command):
    heavy = "{'torch', 'numpy', 'scipy', 'pandas', 'sqlalchemy', 'optuna', 'yaml'}"
    code = f"""
import sys
from mainstem.cli import main
try:
    main({command!r})
except SystemExit as ended:
    assert not ended.code
assert not {heavy} & set(sys.modules), {heavy} & set(sys.modules)
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert "rezero" in done.stdout.lower()
