"""The catalogue: a fresh index, entries that hold what they say, BibTeX."""

from __future__ import annotations

import ast
import importlib
import re
import subprocess
import sys

import pytest
import torch

import mainstem
from mainstem import catalogue, registry
from mainstem.catalogue import bibtex, build
from mainstem.errors import ConfigurationError, DamagedFileError

ENTRY = """
- id: some-paper
  title: Some Paper
  authors: [A. Author]
  year: 2020
  arxiv: "2001.00001"
  what: It adds.
  claim: It helps.
  code: ["mainstem.stream:Connection"]
  known: full
"""


@pytest.fixture
def package(tmp_path):
    """An empty package with a catalogue."""
    (tmp_path / "catalogue").mkdir()
    return tmp_path


def test_the_index_is_fresh():
    assert catalogue.INDEX.read_text(encoding="utf-8") == build.text(), "make it anew with: make index"


@pytest.mark.parametrize("entry", catalogue.papers(), ids=lambda entry: entry["id"])
def test_a_papers_code_is_where_its_entry_says(entry):
    for place in entry["code"]:
        module, _, name = place.partition(":")
        found = importlib.import_module(module)
        assert not name or hasattr(found, name)


def test_every_part_is_where_the_index_says():
    for kind, names in catalogue.parts().items():
        for name, module in names.items():
            importlib.import_module(module)
            assert registry.find(kind, name).__module__ == module


def test_parts_name_only_papers_that_are_in_the_catalogue():
    known = {entry["id"] for entry in catalogue.papers()}
    named = set()
    for path in build.PACKAGE.rglob("*.py"):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            values = [node.value] if isinstance(node, ast.keyword) and node.arg == "papers" else []
            if isinstance(node, ast.Assign) and [ast.unparse(target) for target in node.targets] == ["papers"]:
                values = [node.value]
            for value in values:
                if isinstance(value, ast.Tuple):
                    named |= {each.value for each in value.elts if isinstance(each, ast.Constant)}
    assert named
    assert named <= known


def test_unknown_ids_get_the_nearest():
    with pytest.raises(ConfigurationError, match="did you mean 'rezero'"):
        catalogue.paper("rezro")


@pytest.mark.parametrize("content", [None, "", '{"schema": 1, "pap', "[]", '{"schema": 0, "papers": [], "parts": {}}'])
def test_an_index_that_is_missing_or_damaged_says_how_to_make_it_anew(content, tmp_path, monkeypatch):
    path = tmp_path / "index.json"
    if content is not None:
        path.write_text(content)
    monkeypatch.setattr(catalogue, "INDEX", path)
    catalogue._index.cache_clear()
    try:
        with pytest.raises(DamagedFileError, match=re.escape(str(path)) + ".*python -m mainstem.catalogue"):
            catalogue.parts()
    finally:
        catalogue._index.cache_clear()


@pytest.mark.parametrize(
    ("old", "new", "says"),
    [
        ("known: full", "known: ful", "known"),
        ("known: full", "known: full\n  knwon: x", "did you mean known"),
        ('arxiv: "2001.00001"', "venue: Here", "arxiv or url"),
        ("mainstem.stream:Connection", "mainstem.stream:Conection", "does not define Conection"),
        ("mainstem.stream:Connection", "mainstem.streams", "no module mainstem.streams"),
        ("id: some-paper", "id: Some_Paper", "id"),
        ("- id", "id", "not YAML"),
        (ENTRY, "id: some-paper", "list of entries"),
    ],
)
def test_a_wrong_entry_is_named(old, new, says, package):
    (package / "catalogue" / "area.yaml").write_text(ENTRY.replace(old, new))
    with pytest.raises(ConfigurationError, match=rf"(?s)area\.yaml.*{says}"):
        build.build(package)


def test_an_id_in_two_areas_is_named(package):
    for area in ("one", "two"):
        (package / "catalogue" / f"{area}.yaml").write_text(ENTRY)
    with pytest.raises(ConfigurationError, match="some-paper is in one.yaml already"):
        build.build(package)


def test_registrations_are_read_from_the_source(package):
    (package / "area").mkdir()
    source = '@register("connection", "mine")\n@registry.register("norm", "mine")\nclass Mine: ...\n'
    (package / "area" / "mine.py").write_text(source)
    parts = build.build(package)["parts"]
    assert parts["connection"] == parts["norm"] == {"mine": "mainstem.area.mine"}
    (package / "area" / "other.py").write_text(source)
    with pytest.raises(ConfigurationError, match="registered in mainstem.area.mine already"):
        build.build(package)
    (package / "area" / "other.py").write_text('@register("connexion", "mine")\nclass Mine: ...\n')
    with pytest.raises(ConfigurationError, match="did you mean 'connection'"):
        build.build(package)
    (package / "area" / "other.py").write_text('@register("connection", NAME)\nclass Mine: ...\n')
    with pytest.raises(ConfigurationError, match="plain text"):
        build.build(package)


def test_cite_gives_the_papers_of_a_networks_parts():
    with torch.device("meta"):
        network = mainstem.network("wrn-10-1", classes=10, connection="stochastic-depth(rezero)")
    assert catalogue.papers_of(network) == ["wrn", "stochastic-depth", "rezero"]
    entries = mainstem.cite(network)
    assert re.findall(r"^@\w+\{([\w-]+),", entries, re.MULTILINE) == ["wrn", "stochastic-depth", "rezero"]
    assert entries.count("{") == entries.count("}")
    assert "author = {Sergey Zagoruyko and Nikos Komodakis}" in entries
    assert "eprint = {1605.07146}" in entries


def test_cite_reads_a_saved_network_without_torch(tmp_path):
    network = mainstem.network("resnet-8", classes=3, connection="rezero")
    network.save(tmp_path)
    code = f"import sys, mainstem; print(mainstem.cite({str(tmp_path)!r})); assert 'torch' not in sys.modules"
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == mainstem.cite(network)


def test_cite_of_a_network_without_papers_is_empty():
    assert mainstem.cite(torch.nn.Linear(2, 2)) == ""


@pytest.mark.parametrize(
    ("content", "error"),
    [(None, ConfigurationError), ('{"netw', DamagedFileError), ('{"network": {}}', DamagedFileError)],
)
def test_cite_of_a_folder_that_holds_no_network(content, error, tmp_path):
    if content is not None:
        (tmp_path / "config.json").write_text(content)
    with pytest.raises(error, match="config.json"):
        mainstem.cite(tmp_path)


def test_what_latex_would_read_as_a_command_is_escaped():
    text = bibtex.entry({**catalogue.paper("wrn"), "title": "50% of A_B & C", "venue": "R&D", "url": "https://a.b/c_d"})
    assert r"{{50\% of A\_B \& C}}" in text
    assert r"booktitle = {R\&D}" in text
    assert "url = {https://a.b/c_d}" in text
