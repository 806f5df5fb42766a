"""`mainstem cite`."""

from __future__ import annotations

import re

import pytest

import mainstem


def ids(entries):
    return re.findall(r"^@\w+\{([\w-]+),", entries, re.MULTILINE)


@pytest.mark.parametrize(
    ("network", "expected"),
    [
        ("wrn-28-10", ["wrn"]),
        ("resnet-20", ["resnet"]),
        ("preact-resnet-110+connection=exclusive-gate(bias=-3)", ["preact-resnet"]),
        (
            "resnet-20+connection=stochastic-depth(rezero, final=0.8)+norm=none",
            ["resnet", "stochastic-depth", "rezero"],
        ),
        ("mlp-4x8+connection=rezero", ["rezero"]),
        ("mlp-4x8+in_channels=3+connection=rezero", ["rezero"]),
    ],
)
def test_a_network_by_name(network, expected, call):
    code, out, _ = call("cite", network)
    assert code == 0
    assert ids(out) == expected


def test_a_saved_network(call, tmp_path):
    mainstem.network("resnet-8", classes=3, connection="rezero").save(tmp_path / "mine")
    assert ids(call("cite", tmp_path / "mine")[1]) == ["resnet", "rezero"]


def test_a_network_that_nothing_was_taken_for(call):
    code, out, err = call("cite", "mlp-4x8")
    assert (code, out) == (0, "")
    assert "no part that comes from a paper" in err


@pytest.mark.parametrize(
    ("network", "says"),
    [
        ("resnt-20", "did you mean 'resnet"),
        ("resnet-20+connection=rezro", "did you mean 'rezero'"),
        (".", "config.json"),
    ],
)
def test_what_cannot_be_cited_is_said(network, says, call, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    code, out, err = call("cite", network)
    assert (code, out) == (2, "")
    assert says in err
