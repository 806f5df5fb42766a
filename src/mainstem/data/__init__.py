"""Data sets by name and by kind.

    data = load("digits")                             # shipped with scikit-learn
    data = load("digits:300", seed=1)                 # 300 training images, splits redrawn
    data = load("csv:houses.csv", target="price")     # a file of yours
    data = load("associative-recall", pairs=16)       # generated, with a known right answer

Every data set comes in three disjoint splits. Without a seed they are fixed, as the data set's own function documents;
a seed redraws them (and redraws what is generated). Statistics for normalisation come from the training split only.
"""

from __future__ import annotations

import inspect
import os
import re
from typing import Any

from .. import registry
from ..errors import ConfigurationError, unknown
from .core import Data, Split, mislabelled
from .prepare import answers, prepare

__all__ = ["Data", "Split", "answers", "load", "names", "prepare"]

PATH = ":PATH"  # how the registered name of a kind of file ends


def names() -> list[str]:
    """The data sets that `load` knows; those that end in `:PATH` read a file or folder of yours."""
    return registry.names("data")


def load(
    name: str, *, seed: int | None = None, target: str | None = None, label_noise: float = 0.0, **options: Any
) -> Data:
    """Load or generate a data set.

    Args:
        name: one of `names()`, where PATH stands for a file or folder; with `:COUNT`, a data set of that many training
            examples ("digits:300"); or a name with options, "selective-copy(length=128)".
        seed: redraws the splits; None gives the documented, fixed ones.
        target: the column to predict, for `csv:PATH`.
        label_noise: share of the training labels that are replaced by one of the other classes, drawn from the seed;
            validation and test labels stay right.
        options: options of the data set's own function, among them `count` for what `:COUNT` says.

    Raises:
        ConfigurationError: an unknown name or option (with the nearest ones), a count larger than what there is, or a
            file that cannot be used (with its path, and the row and column where there are any).
    """
    if seed is not None and (not isinstance(seed, int) or isinstance(seed, bool) or seed < 0):
        raise ConfigurationError(f"seed: {seed!r} is not an integer of 0 or more")
    part, given = _find(name)
    accepted = [p for p in inspect.signature(part).parameters if p not in {"seed", "path"} and p not in given]
    if target is not None:
        if "target" not in accepted:
            raise ConfigurationError(f"target: {name} has no columns to choose from; only csv:PATH takes a target")
        given["target"] = target
        accepted.remove("target")
    for option in options:
        if option not in accepted:
            raise unknown(f"data {name}", option, accepted)
    data = part(**given, seed=seed, **options)
    data.name = name
    return mislabelled(data, label_noise, seed) if label_noise else data


def _find(name: str) -> tuple[Any, dict[str, Any]]:
    """The function that `name` means, and the arguments that the name gives it."""
    if not isinstance(name, str):
        raise ConfigurationError(f"data: {name!r} is not a name")
    head, colon, rest = name.partition(":")
    if head + PATH in registry.names("data"):
        if not rest:
            raise ConfigurationError(f"data: {name!r} lacks its path; write {head}{PATH}")
        return registry.find("data", head + PATH), {"path": rest}
    options: dict[str, Any] = {}
    if "(" in name:
        head, options = registry.parse("data", name)
        colon = ""
    try:
        part, fields = registry.match("data", head)
    except ConfigurationError:
        raise _unknown(name, head) from None
    given = {**fields, **options}
    if colon:
        if "count" not in inspect.signature(part).parameters:
            raise ConfigurationError(f"data: {head} takes no count of training examples, so not {name!r}")
        if not re.fullmatch(r"\d+", rest):
            raise ConfigurationError(f"data: {name!r}: {rest!r} is not a number of training examples")
        given["count"] = int(rest)
    for option in given:
        if option not in inspect.signature(part).parameters:
            raise unknown(f"data {head}", option, [p for p in inspect.signature(part).parameters if p != "seed"])
    return part, given


def _unknown(name: str, head: str) -> ConfigurationError:
    if os.path.exists(name):
        kind = {".csv": "csv", ".npz": "npz"}.get(os.path.splitext(name)[1], "text")
        kind = "folder" if os.path.isdir(name) else kind
        return ConfigurationError(f"data: {name!r} is a path; say how to read it, as in '{kind}:{name}'")
    return unknown("data", head, [known.removesuffix(PATH) for known in names()])
