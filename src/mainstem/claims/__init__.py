"""Papers' claims as experiments: `claims/<area>/<id>.py` holds one `claim`, in the words of `protocol.py`."""

from __future__ import annotations

import importlib

from ..catalogue import paper
from ..errors import ConfigurationError
from .lab import Lab, Runs
from .protocol import Check, Claim, Contrast, Effect, NotTested

__all__ = ["Check", "Claim", "Contrast", "Effect", "Lab", "NotTested", "Runs", "find", "module_of"]


def module_of(id: str) -> str:
    """The module in which the claim of a paper stands. Raises `ConfigurationError` for an unknown id."""
    return f"{__name__}.{paper(id)['area']}.{id.replace('-', '_')}"


def find(id: str) -> Claim:
    """The claim of a paper.

    Raises `ConfigurationError` for a paper that is not in the catalogue (with the nearest ids), has no claim yet, or
    whose claim needs a package that is not installed.
    """
    name = module_of(id)
    try:
        return importlib.import_module(name).claim
    except ModuleNotFoundError as error:
        if name == error.name or name.startswith(f"{error.name}."):
            raise ConfigurationError(f"paper {id}: it has no claim yet ({name})") from None
        if (error.name or "").split(".")[0] == "mainstem":
            raise
        extras = ",".join(paper(id)["needs"])
        remedy = f"pip install 'mainstem[{extras}]'" if extras else f"install {error.name}"
        raise ConfigurationError(f"paper {id}: its claim needs {error.name}; {remedy}") from None
