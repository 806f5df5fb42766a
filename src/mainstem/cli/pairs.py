"""`key=value` on the command line."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any

from ..errors import ConfigurationError


def recipe_fields(pairs: Iterable[str] | None) -> dict[str, Any]:
    """Recipe fields from `key=value` pairs, values read as YAML scalars."""
    from ..bench.experiment import load_yaml

    fields: dict[str, Any] = {}
    for pair in pairs or ():
        key, equals, value = pair.partition("=")
        if not equals or not key:
            raise ConfigurationError(f"recipe: {pair!r} is not of the form key=value")
        fields[key.strip()] = load_yaml(value, f"recipe.{key.strip()}")
    return fields
