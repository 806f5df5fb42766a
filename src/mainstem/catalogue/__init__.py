"""What is here: papers, and parts by name. One generated JSON file answers, so that nothing heavy is imported.

`catalogue/<area>.yaml` describes the papers of an area; `python -m mainstem.catalogue` (`make index`) gathers them, and
every `@register(kind, name)` in the source, into `index.json`.
"""

from __future__ import annotations

import functools
import json
from pathlib import Path
from typing import Any

from ..errors import ConfigurationError, DamagedFileError, unknown

INDEX = Path(__file__).with_name("index.json")
SCHEMA = 1


@functools.lru_cache(maxsize=1)
def _index() -> dict[str, Any]:
    remedy = "make it anew with: python -m mainstem.catalogue"
    try:
        index = json.loads(INDEX.read_text(encoding="utf-8"))
    except FileNotFoundError:
        raise DamagedFileError(f"{INDEX} is missing; {remedy}") from None
    except (json.JSONDecodeError, UnicodeDecodeError) as error:
        raise DamagedFileError(f"{INDEX} is not whole JSON ({error}); {remedy}") from None
    if not isinstance(index, dict) or index.get("schema") != SCHEMA or not index.keys() >= {"papers", "parts"}:
        raise DamagedFileError(f"{INDEX} is not an index of schema {SCHEMA}; {remedy}")
    return index


def parts() -> dict[str, dict[str, str]]:
    """Every part that ships with mainstem: kind -> name (or pattern) -> module.

    Raises `DamagedFileError`, which says how to make the index anew, if it is missing or not whole.
    """
    return _index()["parts"]


def papers() -> list[dict[str, Any]]:
    """Every paper that has code here, sorted by area and id. Keys: those of `catalogue/<area>.yaml`, and `area`.

    Raises as `parts`.
    """
    return _index()["papers"]


def paper(id: str) -> dict[str, Any]:
    """The entry of one paper. Raises `ConfigurationError` with the nearest ids for one that is not here."""
    for entry in papers():
        if entry["id"] == id:
            return entry
    raise unknown("paper", id, [entry["id"] for entry in papers()])


def papers_of(network: Any) -> list[str]:
    """The ids of the papers whose parts a network uses, in order of appearance.

    `network` is any module whose parts carry `papers`, or a folder that `Network.save` wrote (its `config.json` lists
    them, so that no weights are read).

    Raises:
        ConfigurationError: there is no network in the folder. DamagedFileError: its `config.json` is not whole.
    """
    if hasattr(network, "modules"):
        found = [paper for part in network.modules() for paper in getattr(part, "papers", ())]
        return list(dict.fromkeys(found))
    from ..files import read_json

    path = Path(network) / "config.json"
    if not path.exists():
        raise ConfigurationError(
            f"no network is saved in {network} (there is no {path.name}); cite takes a network or its folder"
        )
    config = read_json(path)
    if not isinstance(config, dict) or not isinstance(config.get("papers"), list):
        raise DamagedFileError(f"{path} does not list the papers of a network")
    return config["papers"]


def cite(network: Any) -> str:
    """BibTeX of the papers whose parts a network uses: a module, or the folder of a saved one; "" if it uses none.

    Raises as `papers_of`.
    """
    from .bibtex import entry

    return "\n\n".join(entry(paper(id)) for id in papers_of(network))
