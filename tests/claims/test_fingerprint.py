"""What a claim's fingerprint follows, and what leaves it as it is."""

from __future__ import annotations

import ast
import os

import pytest

from mainstem.claims import fingerprint

CLAIM = "mainstem.claims.area.it"

FILES = {
    "__init__.py": "from .fit import fit as fit\n",
    "fit.py": "from . import registry\ndef fit(): return registry.find\n",
    "registry.py": "def find(): return 1\n",
    "bench/__init__.py": "from .compare import compare as compare\nfrom .report import write as write\n",
    "bench/compare.py": "from .report import write\ndef compare(): return 1\n",
    "bench/report.py": "def write(): return 1\n",
    "area/__init__.py": "from .one import One\nfrom .two import Two\n",
    "area/one.py": "from ..ops import scan\nclass One:\n    def run(self):\n        from ..late import late\n",
    "area/two.py": "class Two: ...\n",
    "area/part.py": "PART = 1\n",
    "area/family.py": "FAMILY = 1\n",
    "area/other.py": "OTHER = 1\n",
    "ops/__init__.py": "from .scan import scan\nfrom .sort import sort\n",
    "ops/scan.py": "def scan(): return 1\n",
    "ops/sort.py": "def sort(): return 1\n",
    "late.py": "def late(): return 1\n",
    "unused.py": "def unused(): return 1\n",
    "claims/__init__.py": "from .protocol import Claim\n",
    "claims/protocol.py": "class Claim: ...\n",
    "claims/area/__init__.py": "",
    "claims/area/it.py": "from mainstem.claims import Claim\n",
}
PARTS = {
    "connection": {"part": "mainstem.area.part", "other": "mainstem.area.other"},
    "network": {"family-<depth>": "mainstem.area.family"},
}


class Package:
    """A package like mainstem, of which a test may change any file."""

    def __init__(self, root):
        self.root = root / "mainstem"
        for name, text in FILES.items():
            self.write(name, text)

    def write(self, name, text):
        path = self.root / name
        path.parent.mkdir(parents=True, exist_ok=True)
        before = path.stat().st_mtime_ns if path.exists() else 0
        path.write_text(text)
        os.utime(path, ns=(before + 1_000_000, before + 1_000_000))
        fingerprint._source.cache_clear()
        fingerprint._bytes_of.cache_clear()

    def claim(self, text):
        self.write("claims/area/it.py", text)

    @property
    def reached(self):
        return {name.removeprefix("mainstem.") for name in fingerprint.state(CLAIM)["modules"].split()} - {
            "claims.area.it"
        }

    @property
    def fingerprint(self):
        return fingerprint.state(CLAIM)["fingerprint"]


@pytest.fixture
def package(tmp_path, monkeypatch):
    monkeypatch.setattr(fingerprint, "PACKAGE", tmp_path / "mainstem")
    monkeypatch.setattr(fingerprint.catalogue, "parts", lambda: PARTS)
    monkeypatch.setattr(fingerprint.catalogue, "papers", lambda: [{"area": "area"}])
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    yield Package(tmp_path)
    fingerprint._source.cache_clear()
    fingerprint._bytes_of.cache_clear()


@pytest.mark.parametrize(
    ("text", "reached"),
    [
        ("from mainstem.claims import Claim", {"claims.protocol"}),
        ("from .. import Claim", {"claims.protocol"}),
        ("from ...area import One", {"area.one", "ops.scan", "late"}),
        ("from ...area.two import Two", {"area.two"}),
        ("from ...area import two", {"area.two"}),
        ("import mainstem\nmainstem.area.Two()", {"area.two"}),
        ("import mainstem.area\nmainstem.area.Two()", {"area", "area.one", "area.two", "ops.scan", "late"}),
        ("import mainstem as m\nm.fit()", {"fit", "registry"}),
        ("from mainstem import area as a\na.two.Two.run()", {"area.two"}),
        ("from mainstem.area import *", {"area", "area.one", "area.two", "ops.scan", "late"}),
        ("def run():\n    from ...late import late", {"late"}),
        ("from ...bench import compare", {"bench.compare"}),
        ("import torch\nfrom torch import nn\nfrom numpy.area import One", set()),
        ("spec = 'family-20+connection=part'", {"area.family", "area.part"}),
        ("spec = 'wrapper(part, final=0.5)'", {"area.part"}),
        ("spec = f'family-{depth}+connection={name}'", {"area.family"}),
        ("names = ['part', 'others', 'a-part']", {"area.part"}),
        ("names = ['part2', 'family-x', 'family-20-2', 'Other']", set()),
        ('"""The other part."""', set()),
        ("# other", set()),
    ],
)
def test_what_is_followed(text, reached, package):
    package.claim(text + "\n")
    assert package.reached == reached


def test_parts_are_looked_up_in_texts_of_areas_alone(package):
    package.claim("from ...late import late\nfrom ...area import Two\n")
    package.write("late.py", "def late(): return 'part'\n")
    assert "area.part" not in package.reached
    package.write("area/two.py", "class Two:\n    inner = 'part'\n")
    assert "area.part" in package.reached


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("late.py", "def late():\n    return 1  # and why\n"),
        ("late.py", '"""Late."""\n\n\ndef late():\n    """Return 1."""\n    return 1\n'),
        ("late.py", "def late(): return (1)\n"),
        ("area/two.py", "class Two: changed = True\n"),
        ("unused.py", "def unused(): return 2\n"),
        ("area/__init__.py", "from .one import One\nfrom .two import Two\nfrom .part import PART\n"),
    ],
)
def test_what_leaves_it_as_it_is(name, text, package):
    package.claim("from ...area import One\n")
    before = fingerprint.state(CLAIM)
    package.write(name, text)
    assert package.fingerprint == before["fingerprint"]
    assert not fingerprint.stale(CLAIM, before)


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("late.py", "def late(): return 2\n"),
        ("late.py", "def late(): return 1.0\n"),
        ("late.py", "def late(): return '1'\n"),
        ("late.py", "def late(: half edited\n"),
        ("ops/scan.py", "def scan(x): return 1\n"),
        ("area/one.py", "class One: ...\n"),
        ("area/__init__.py", "from .two import Two as One\n"),
        ("claims/area/it.py", "from ...area import One\nthreshold = 2\n"),
    ],
)
def test_what_changes_it(name, text, package):
    package.claim("from ...area import One\n")
    before = package.fingerprint
    package.write(name, text)
    assert package.fingerprint != before


def test_a_module_that_is_gone_makes_an_entry_stale(package):
    package.claim("from ...area import One\n")
    before = fingerprint.state(CLAIM)
    package.claim("")
    (package.root / "late.py").unlink()
    assert fingerprint.stale(CLAIM, before)


def test_files_are_parsed_once(package, monkeypatch):
    package.claim("from ...area import One\n")
    before = package.fingerprint
    parsed = []
    facts = fingerprint._facts
    monkeypatch.setattr(fingerprint, "_facts", lambda path, *rest: parsed.append(path) or facts(path, *rest))
    fingerprint._source.cache_clear()
    assert package.fingerprint == before
    assert not parsed
    package.write("late.py", "def late(): return 2\n")
    assert package.fingerprint != before
    assert [path.removeprefix(f"{package.root}/") for path in parsed] == ["late.py"]


@pytest.mark.parametrize("content", ["", "{", "[]", '{"format": 0, "files": {}}', '{"format": 1}'])
def test_a_damaged_cache_is_made_anew(content, package):
    package.claim("from ...area import One\n")
    before = package.fingerprint
    cache = fingerprint._cache(package.root)
    cache.write_text(content)
    fingerprint._source.cache_clear()
    assert package.fingerprint == before
    assert '"files": {' in cache.read_text()


def test_without_a_place_for_the_cache(package, monkeypatch, tmp_path):
    package.claim("from ...area import One\n")
    before = package.fingerprint
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    fingerprint._source.cache_clear()
    assert package.fingerprint == before


def test_versions_of_python_agree():
    """Later ones have fields that are empty where the source does not use them."""
    tree = ast.parse("def f(x): return x")
    before = fingerprint._canonical(tree, [])
    function = tree.body[0]
    function._fields = (*function._fields, "type_params")
    function.type_params = []
    assert fingerprint._canonical(tree, []) == before


def test_the_package_itself():
    names = fingerprint.state("mainstem.claims.lab")["modules"].split()
    assert {"mainstem.fit", "mainstem.bench.worker", "mainstem.bench.statistics"} <= {
        *names,
        *fingerprint.state("mainstem.claims.protocol")["modules"].split(),
    }
    assert not {"mainstem", "mainstem.bench.report", "mainstem.connections.rezero", "mainstem.catalogue"} & set(names)
