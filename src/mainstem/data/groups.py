"""State tracking: the word problem of a finite group."""

from __future__ import annotations

import functools
import itertools
import re

import numpy as np

from ..errors import ConfigurationError
from ..registry import register
from .core import Data, choice, whole
from .generated import generate
from .sequences import UNSCORED, tokens

LARGEST = {"Z": 1000, "S": 6, "A": 6}


def elements(group: str) -> list[tuple[int, ...]]:
    """The elements of `Z<n>` (as rotations), `S<n>` or `A<n>` as permutations of 0 to n-1; the identity comes first."""
    found = re.fullmatch(r"([ZSA])(\d+)", str(group))
    if not found or not 2 <= int(found[2]) <= LARGEST[found[1]]:
        largest = ", ".join(f"{letter}2 to {letter}{n}" for letter, n in LARGEST.items())
        raise ConfigurationError(f"group: {group!r} is none that is known ({largest}); Z2 is parity")
    n = int(found[2])
    if found[1] == "Z":
        return [tuple((i + k) % n for i in range(n)) for k in range(n)]
    everything = list(itertools.permutations(range(n)))
    if found[1] == "S":
        return everything
    inversions = [sum(p[i] > p[j] for i in range(n) for j in range(i + 1, n)) for p in everything]
    return [p for p, odd in zip(everything, inversions, strict=True) if odd % 2 == 0]


@functools.lru_cache(maxsize=8)
def table(group: str) -> np.ndarray:
    """The multiplication table `[G, G]`: entry (a, b) is the number of "first a, then b"."""
    listed = np.array(elements(group))
    if group.startswith("Z"):
        shifts = np.arange(len(listed))
        return (shifts[:, None] + shifts) % len(listed)
    n = listed.shape[1]
    products = listed[np.arange(len(listed))[None, :, None], listed[:, None, :]]  # [a, b, i] -> b[a[i]]
    weights = n ** np.arange(n)
    codes = listed @ weights
    order = np.argsort(codes)
    return order[np.searchsorted(codes[order], products @ weights)]


@register("data", "state-tracking")
def state_tracking(
    *,
    seed: int | None = None,
    count: int = 4000,
    val: int = 500,
    test: int = 1000,
    group: str = "S5",
    length: int = 32,
    test_length: int | None = None,
    scored: str = "all",
) -> Data:
    """Elements of a group, one after the other: at each step say the product of all so far.

    Tokens number the elements in the order of `elements(group)`, drawn evenly; 0 is the identity. The product of a and
    b is "first a, then b". Z2 is parity; S5 and A5 are not solvable, which makes their word problem as hard as any
    computation of logarithmic depth (NC1), while that of Z<n> is not. Guessing gives 1/|G|; the right answer follows
    from the input (`meta["ideal"]`).

    Args:
        count, val, test: numbers of examples.
        group: `Z<n>`, `S<n>` or `A<n>`.
        length: of a sequence, `T`.
        test_length: of the test sequences; None is `length`.
        scored: "all" positions, or only the "last".
    """
    product = table(group)
    length = whole("length", length)
    longer = length if test_length is None else whole("test_length", test_length)
    choice("scored", scored, ("all", "last"))

    def draw_of(steps: int):
        def draw(rng: np.random.RandomState, n: int) -> tuple[np.ndarray, np.ndarray]:
            x = rng.randint(len(product), size=(n, steps)).astype(np.int64)
            y = x.copy()
            for t in range(1, steps):
                y[:, t] = product[y[:, t - 1], x[:, t]]
            if scored == "last":
                y[:, :-1] = UNSCORED
            return x, y

        return draw

    splits = generate(draw_of(length), seed, count=count, val=val, test=test, name="state-tracking")
    if longer != length:
        splits["test"] = generate(draw_of(longer), seed, count=1, val=1, test=test, name="state-tracking")["test"]
    return tokens("state-tracking", splits, len(product), group=group, length=length, test_length=longer, scored=scored)
