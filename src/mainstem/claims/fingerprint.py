"""A hash of a claim and of all the code in mainstem that it runs, so that a measured verdict is known to be stale.

What counts, found in the syntax trees without importing anything:

- the module of the claim;
- every module of mainstem that it imports, and what those import, imports inside functions included. A name that a
  package re-exports (`from mainstem.connections import ReZero`) leads to the module that defines it, not to all that
  the package holds;
- every part whose name stands in a text of the claim or of another module of an area, such as
  `"resnet-20+connection=rezero"`: its module is looked up in the catalogue's index. A name that is put together at run
  time is seen where it is an f-string whose fields are numbers; otherwise import the part.

Docstrings, comments and layout do not count, nor do modules that only show or record results (`ASIDE`). Parsing is done
once a file: what was found is kept in the user's cache folder, by time and size.
"""

from __future__ import annotations

import ast
import contextlib
import functools
import hashlib
import json
import os
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from .. import catalogue
from ..files import write_json

PACKAGE = Path(__file__).parents[1]
NAME = PACKAGE.name
FORMAT = hashlib.sha256(Path(__file__).read_bytes()).hexdigest()[:16]  # of what is kept about a file: this code's
DOCUMENTED = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)

# Their code cannot change a number.
ASIDE = tuple(
    f"{NAME}.{module}"
    for module in (
        "cli",
        "progress",
        "catalogue",
        "bench.estimate",
        "bench.progress",
        "bench.report",
        "bench.svg",
        "bench.table",
        "bench.wording",
        "claims.fingerprint",
        "claims.ledger",
    )
)

Facts = dict[str, Any]  # of a file: hash, package, imports [[module, name or None]], binds {name: import}, words


def state(module: str) -> dict[str, str]:
    """What a ledger entry keeps of the code of a claim's module, for instance `mainstem.claims.connections.rezero`.

    Returns `fingerprint`; `modules`, those that count, separated by spaces; and `files`, a hash of them as they are,
    which tells without parsing anything that nothing has changed.
    """
    source = _source(PACKAGE)
    found = sorted(source.reached(module))
    lines = [f"{each} {source.files[each]['hash']}" for each in found]
    return {"fingerprint": _digest("\n".join(lines)), "files": _digest(_as_they_are(found)), "modules": " ".join(found)}


def stale(module: str, kept: dict[str, str]) -> bool:
    """Whether the code of a claim's module is another than when `state` returned `kept`."""
    if _digest(_as_they_are(kept["modules"].split())) == kept["files"]:
        return False
    return state(module)["fingerprint"] != kept["fingerprint"]


class Source:
    """The modules of the package and what each of them leads to."""

    def __init__(self, files: dict[str, Facts], parts: dict[str, dict[str, str]], areas: set[str]):
        self.files, self.areas = files, areas
        self._leads: dict[str, frozenset[str]] = {}
        self._parts: dict[str, set[str]] = {}
        for names in parts.values():
            for name, module in names.items():
                key = _shape(name) if "<" in name else name.partition(":")[0]
                self._parts.setdefault(key, set()).add(module)

    def reached(self, module: str) -> set[str]:
        """`module` and all that it leads to."""
        found, waiting = set(), [module]
        while waiting:
            each = waiting.pop()
            if each not in found and each in self.files:
                found.add(each)
                waiting.extend(self._from(each))
        return found

    def _from(self, module: str) -> frozenset[str]:
        if module not in self._leads:
            facts = self.files[module]
            found = {self._resolved(target, name) for target, name in facts["imports"]}
            if self._in_area(module):
                for word in facts["words"]:
                    found |= self._parts.get(word, set()) | self._parts.get(_shape(word), set())
            self._leads[module] = frozenset(each for each in found if each and not _aside(each))
        return self._leads[module]

    def _resolved(self, module: str, name: str | None, depth: int = 0) -> str | None:
        """The module that `from module import name` leads to; a dotted name is looked up step by step."""
        if name is None or depth > 20:
            return module
        first, _, rest = name.partition(".")
        if f"{module}.{first}" in self.files:
            return self._resolved(f"{module}.{first}", rest or None, depth + 1)
        bound = self.files.get(module, {}).get("binds", {}).get(first) if self._package(module) else None
        return self._resolved(bound[0], bound[1], depth + 1) if bound else module

    def _package(self, module: str) -> bool:
        return self.files.get(module, {}).get("package", False)

    def _in_area(self, module: str) -> bool:
        names = module.removeprefix(f"{NAME}.claims.").removeprefix(f"{NAME}.").split(".")
        return names[0] in self.areas


def _shape(name: str) -> str:
    """A name with every number and every field of a pattern alike, so that `wrn-28-10` and `wrn-<depth>-<k>` agree."""
    return re.sub(r"<\w+>|\d+", "#", name)


def _aside(module: str) -> bool:
    return module == NAME or module in ASIDE or module.startswith(tuple(f"{name}." for name in ASIDE))


@functools.lru_cache(maxsize=1)
def _source(package: Path) -> Source:
    areas = {entry["area"] for entry in catalogue.papers()}
    return Source(_files(package), catalogue.parts(), areas)


def _as_they_are(modules: list[str]) -> str:
    return "\n".join(f"{module} {_bytes_of(PACKAGE, module)}" for module in modules)


@functools.cache
def _bytes_of(package: Path, module: str) -> str:
    base = package.joinpath(*module.split(".")[1:])
    path = base.with_suffix(".py")
    path = path if path.exists() else base / "__init__.py"
    return _digest(path.read_bytes()) if path.exists() else "none"


def _digest(content: str | bytes) -> str:
    return hashlib.sha256(content.encode() if isinstance(content, str) else content).hexdigest()[:32]


def _files(package: Path) -> dict[str, Facts]:
    """The facts of every module, those of files that have not changed from the cache."""
    cache = _cache(package)
    try:
        known = json.loads(cache.read_text(encoding="utf-8"))
        known = known["files"] if known["format"] == FORMAT else {}
    except (OSError, ValueError, KeyError, TypeError):  # there is none yet, or it is not whole: it is made anew
        known = {}
    files: dict[str, Facts] = {}
    for path, about in _walk(str(package)):
        relative = path[len(str(package)) + 1 : -3]
        names = [NAME, *relative.split(os.sep)]
        is_package = names[-1] == "__init__"
        module = ".".join(names[:-1] if is_package else names)
        stamp = [about.st_mtime_ns, about.st_size]
        kept = known.get(module)
        files[module] = (
            kept if kept and kept["stamp"] == stamp else {"stamp": stamp, **_facts(path, module, is_package)}
        )
    if files != known:
        with contextlib.suppress(OSError):  # a home that cannot be written to costs time, nothing else
            write_json(cache, {"format": FORMAT, "files": files})
    return files


def _walk(folder: str) -> Iterator[tuple[str, os.stat_result]]:
    with os.scandir(folder) as entries:
        for entry in sorted(entries, key=lambda entry: entry.name):
            if entry.is_dir(follow_symlinks=False) and entry.name != "__pycache__":
                yield from _walk(entry.path)
            elif entry.name.endswith(".py"):
                yield entry.path, entry.stat()


def _cache(package: Path) -> Path:
    base = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache")
    return base / NAME / f"source-{hashlib.sha256(str(package).encode()).hexdigest()[:12]}.json"


def _facts(path: str, module: str, package: bool) -> Facts:
    content = Path(path).read_bytes()
    try:
        tree = ast.parse(content)
    except SyntaxError:  # half edited: whatever leads here is stale, and the rest of the listing goes on
        return {"hash": _digest(content), "package": package, "imports": [], "binds": {}, "words": []}
    inside = module if package else module.rpartition(".")[0]
    binds: dict[str, tuple[str, str | None]] = {}
    imports: set[tuple[str, str | None]] = set()
    texts: set[str] = set()
    chains: set[str] = set()
    inner: set[int] = set()
    waiting: list[ast.AST] = [tree]
    while waiting:
        node = waiting.pop()
        if isinstance(node, DOCUMENTED) and ast.get_docstring(node, clean=False) is not None:
            node.body = node.body[1:]
        elif isinstance(node, ast.ImportFrom | ast.Import):
            for bound, origin in _imported(node, inside):
                imports.add(origin)
                binds[bound] = origin
        elif isinstance(node, ast.Attribute) and id(node) not in inner:
            chains.add(_chain(node, inner))
        elif isinstance(node, ast.JoinedStr):
            texts.add("".join(str(v.value) if isinstance(v, ast.Constant) else "1" for v in node.values))
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            texts.add(node.value)
        waiting.extend(ast.iter_child_nodes(node))
    for root, _, rest in (chain.partition(".") for chain in chains):
        if root in binds:  # mainstem.connections.ReZero, after import mainstem: not all of mainstem
            target, name = binds[root]
            imports.discard((target, name))
            imports.add((target, f"{name}.{rest}" if name else rest))
    return {
        "hash": _digest("".join(_canonical(tree, []))),
        "package": package,
        "imports": sorted(([target, name] for target, name in imports), key=str),
        "binds": {bound: list(origin) for bound, origin in sorted(binds.items())},
        "words": sorted({word.strip(".-") for text in texts for word in re.findall(r"[\w.-]+", text)}),
    }


def _imported(node: ast.ImportFrom | ast.Import, inside: str) -> Iterator[tuple[str, tuple[str, str | None]]]:
    """The names that an import binds, each with the module of the package, and the name in it, that it stands for."""
    if isinstance(node, ast.ImportFrom):
        module = _absolute(node, inside)
        for alias in node.names if module else ():
            yield alias.asname or alias.name, (module or "", None if alias.name == "*" else alias.name)
        return
    for alias in node.names:
        if alias.name.split(".")[0] == NAME:
            yield (alias.asname, (alias.name, None)) if alias.asname else (NAME, (NAME, None))
            if not alias.asname and alias.name != NAME:
                yield alias.name, (alias.name, None)


def _absolute(node: ast.ImportFrom, inside: str) -> str | None:
    """The module that an import is from, if it is one of the package."""
    if not node.level:
        return node.module if (node.module or "").split(".")[0] == NAME else None
    base = inside.split(".")[: len(inside.split(".")) - node.level + 1]
    return ".".join([*base, node.module] if node.module else base)


def _chain(node: ast.Attribute, inner: set[int]) -> str:
    """The dotted name `a.b.c` that ends at `node`, or ""; the attributes within it are added to `inner`."""
    names: list[str] = []
    value: ast.expr = node
    while isinstance(value, ast.Attribute):
        inner.add(id(value))
        names.append(value.attr)
        value = value.value
    return ".".join([value.id, *reversed(names)]) if isinstance(value, ast.Name) else ""


def _canonical(node: Any, out: list[str]) -> list[str]:
    """Append a syntax tree to `out`, the same in every version of Python: fields that are empty are left out."""
    if isinstance(node, ast.AST):
        out.append(type(node).__name__)
        for name in node._fields:
            value = getattr(node, name, None)
            if value is not None and value != []:
                out.append(f"({name}=")
                _canonical(value, out)
                out.append(")")
    elif isinstance(node, list):
        out.append("[")
        for each in node:
            _canonical(each, out)
            out.append(",")
        out.append("]")
    else:
        out.append(repr(node))
    return out
