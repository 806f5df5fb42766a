"""Papers that nobody wrote, with claims for every verdict, in a copy of mainstem's source that a test may edit."""

from __future__ import annotations

import contextlib
import json
import shutil
import sys
from collections.abc import Iterator
from pathlib import Path

import pytest

import mainstem.claims
from mainstem import catalogue
from mainstem.claims import fingerprint

HERE = Path(__file__).parent
AREA = "fakes"
IDS = sorted(path.stem.replace("_", "-") for path in (HERE / AREA).glob("fake_*.py"))


def entry(id: str) -> dict:
    """The catalogue entry of a fake paper, or of one whose claim is yet to be written."""
    return {
        "id": id,
        "area": AREA,
        "title": f"On {id}",
        "authors": ["A. Author", "B. Author"],
        "year": 2001,
        "venue": None,
        "arxiv": "0000.00000",
        "url": None,
        "bibtex": {},
        "what": "Adds a gain.",
        "claim": "The gain is large.",
        "code": ["mainstem.stream:Connection"],
        "known": "full",
        "departures": "none",
        "needs": [],
    }


@contextlib.contextmanager
def installed(folder: Path, monkeypatch: pytest.MonkeyPatch) -> Iterator[Path]:
    """The fake papers in the catalogue, a ledger of their own, and the copy of the source, which is returned."""
    copy = folder / "mainstem"
    shutil.copytree(fingerprint.PACKAGE, copy, ignore=shutil.ignore_patterns("__pycache__"))
    shutil.copytree(HERE / AREA, copy / "claims" / AREA, ignore=shutil.ignore_patterns("__pycache__"))
    entries = [entry(id) for id in [*IDS, "fake-unwritten"]]
    index = folder / "index.json"
    index.write_text(json.dumps({"schema": 1, "papers": catalogue.papers() + entries, "parts": catalogue.parts()}))
    monkeypatch.setattr(catalogue, "INDEX", index)
    monkeypatch.setattr(fingerprint, "PACKAGE", copy)
    monkeypatch.setattr(mainstem.claims, "__path__", [*mainstem.claims.__path__, str(copy / "claims")])
    monkeypatch.setenv("MAINSTEM_LEDGER", str(folder / "ledger"))
    monkeypatch.setenv("XDG_CACHE_HOME", str(folder / "cache"))
    forget()
    yield copy
    forget()
    for name in [name for name in sys.modules if name.startswith(f"mainstem.claims.{AREA}")]:
        del sys.modules[name]


def forget() -> None:
    """What is remembered about files that have been edited since."""
    for remembered in (catalogue._index, fingerprint._source, fingerprint._bytes_of):
        remembered.cache_clear()
