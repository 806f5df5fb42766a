"""Parts by name.

A part is declared where it is written, with `@register(kind, name)`, and found with `find(kind, name)`. What ships
with mainstem is listed in the catalogue's generated index, so that finding a part imports only the module that holds
it; what a user registers is found the same way.
"""

from __future__ import annotations

import importlib
import re
from collections.abc import Callable
from typing import Any, TypeVar

from .errors import ConfigurationError, unknown

KINDS = ("connection", "network", "norm", "activation", "method", "data", "metric", "optimiser", "schedule")

T = TypeVar("T")
_parts: dict[str, dict[str, Any]] = {kind: {} for kind in KINDS}


def register(kind: str, name: str) -> Callable[[T], T]:
    """Declare the decorated class or function as the part `name` of `kind`.

    A network's or data set's name may be a pattern with fields of integers, such as `wrn-<depth>-<k>`.
    """
    if kind not in KINDS:
        raise unknown("kind", kind, KINDS)

    def declare(part: T) -> T:
        known = _parts[kind].get(name)
        if known is not None and _origin(known) != _origin(part):
            raise ConfigurationError(f"{kind}: {name!r} is already registered by {_origin(known)}")
        _parts[kind][name] = part
        return part

    return declare


def names(kind: str) -> list[str]:
    """Every name (or pattern) registered under `kind`, sorted."""
    return sorted({*_index().get(kind, {}), *_parts[kind]})


def find(kind: str, name: str) -> Any:
    """The part `name` of `kind`; an unknown name raises with the nearest valid ones."""
    if name not in _parts[kind]:
        module = _index().get(kind, {}).get(name)
        if module is None:
            raise unknown(kind, name, names(kind))
        importlib.import_module(module)
    return _parts[kind][name]


def match(kind: str, name: str) -> tuple[Any, dict[str, int]]:
    """The part whose pattern `name` fits, and the integers that the pattern's fields take."""
    for pattern in sorted(names(kind), key=lambda p: ("<" in p, -len(p))):
        found = _regex(pattern).fullmatch(name)
        if found:
            return find(kind, pattern), {field: int(value) for field, value in found.groupdict().items()}
    raise unknown(kind, name, names(kind))


def _regex(pattern: str) -> re.Pattern[str]:
    pieces = re.split(r"<(\w+)>", pattern)
    return re.compile("".join(f"(?P<{p}>\\d+)" if i % 2 else re.escape(p) for i, p in enumerate(pieces)))


def _origin(part: Any) -> str:
    return f"{getattr(part, '__module__', '?')}.{getattr(part, '__qualname__', part)}"


def _index() -> dict[str, dict[str, str]]:
    from .catalogue import parts

    return parts()
