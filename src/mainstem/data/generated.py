"""What all generators share: examples that differ from one another, split by split."""

from __future__ import annotations

import hashlib
from collections.abc import Callable

import numpy as np

from ..errors import ConfigurationError
from .core import Pairs, draws, whole

FRUITLESS = 20  # rounds without a new example, after which there are taken to be no more

Draw = Callable[[np.random.RandomState, int], tuple[np.ndarray, np.ndarray]]


def generate(draw: Draw, seed: int | None, *, count: int, val: int, test: int, name: str) -> Pairs:
    """Splits of `count`, `val` and `test` examples from `draw(rng, n) -> (x, y)`, no input twice.

    Each split has random numbers of its own, and test and validation come first: another number of training examples
    leaves them as they are.
    """
    sizes = {"test": whole("test", test), "val": whole("val", val), "train": whole("count", count)}
    seen: set[bytes] = set()
    splits: Pairs = {}
    for role, size in sizes.items():
        rng = draws(seed, role)
        parts: list[tuple[np.ndarray, np.ndarray]] = []
        missing, fruitless = size, 0
        while missing:
            x, y = draw(rng, size)
            fresh = _fresh(x, seen, missing)
            fruitless = 0 if len(fresh) else fruitless + 1
            if fruitless == FRUITLESS:
                raise ConfigurationError(
                    f"data {name}: {sum(sizes.values())} different examples are more than there are with these options "
                    f"(found {len(seen)}); ask for fewer or for longer ones"
                )
            parts.append((x[fresh], y[fresh]))
            missing -= len(fresh)
        splits[role] = np.concatenate([x for x, _ in parts]), np.concatenate([y for _, y in parts])
    return splits


def _fresh(x: np.ndarray, seen: set[bytes], most: int) -> np.ndarray:
    """Row numbers of the first `most` inputs that are not among `seen`, to which they are added."""
    rows = []
    for i, row in enumerate(x):
        key = hashlib.blake2b(row, digest_size=16).digest()
        if key not in seen:
            seen.add(key)
            rows.append(i)
            if len(rows) == most:
                break
    return np.array(rows, dtype=int)


def sample(rng: np.random.RandomState, n: int, size: int, count: int) -> np.ndarray:
    """`n` times `count` different numbers below `size`, in random order: `[n, count]`."""
    return rng.random_sample((n, size)).argsort(axis=1)[:, :count]
