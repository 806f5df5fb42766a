"""Measured verdicts, one JSON file a paper: `ledger/<id>.json`."""

from __future__ import annotations

import os
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DamagedFileError
from ..files import read_json, write_json
from . import module_of
from .fingerprint import stale
from .protocol import VERDICTS

SCHEMA = 1
VARIABLE = "MAINSTEM_LEDGER"
KEYS = {"id", "verdict", "expected", "measured", "exact", "seeds", "seconds", "code"}

Entry = dict[str, Any]


def folder(given: str | Path | None = None) -> Path | None:
    """Where the ledger lies: what is given, else the folder in `MAINSTEM_LEDGER`, else the source checkout's, else the
    one that an installed package holds. None if there is none.
    """
    if given or os.environ.get(VARIABLE):
        return Path(given or os.environ[VARIABLE])
    package = Path(__file__).parents[1]
    checkout = package.parents[1]
    if (checkout / "pyproject.toml").exists() and package.parent.name == "src":
        return checkout / "ledger"
    return package / "ledger" if (package / "ledger").is_dir() else None


def read(id: str, where: str | Path | None = None) -> Entry | None:
    """The entry of a paper, or None if it has not been measured.

    Raises `DamagedFileError`, naming the file, if it is not a whole entry of this paper.
    """
    base = folder(where)
    path = base / f"{id}.json" if base else None
    if path is None or not path.exists():
        return None
    entry, remedy = read_json(path), f"remove it, or make it anew with: mainstem reproduce {id}"
    if not isinstance(entry, dict) or entry.get("schema") != SCHEMA or not entry.keys() >= KEYS:
        raise DamagedFileError(f"{path} is not a ledger entry of schema {SCHEMA}; {remedy}")
    if not isinstance(entry["code"], dict) or not entry["code"].keys() >= {"fingerprint", "files", "modules"}:
        raise DamagedFileError(f"{path} does not say which code it measured; {remedy}")
    if entry["id"] != id or entry["verdict"] not in VERDICTS:
        raise DamagedFileError(f"{path} is not the entry of {id}; {remedy}")
    return entry


def write(entry: Entry, where: str | Path | None = None) -> Path:
    """Write an entry under its id, atomically, and return its path.

    Raises `ConfigurationError` where there is no ledger to write to, or it cannot be written.
    """
    base = folder(where)
    if base is None:
        raise ConfigurationError(f"ledger: this installation has none; give --ledger FOLDER, or set {VARIABLE}")
    path = base / f"{entry['id']}.json"
    try:
        write_json(path, {"schema": SCHEMA, **entry})
    except OSError as error:
        raise ConfigurationError(f"ledger: {path} cannot be written ({error.strerror or error})") from None
    return path


def is_stale(entry: Entry) -> bool:
    """Whether the claim, or code that it runs, has changed since the entry was measured."""
    return stale(module_of(entry["id"]), entry["code"])
