"""Sequences that test memory: recall by content, copying of what matters, recall after a delay.

All give int64 tokens `[N, T]` and int64 targets `[N, T]` of -100 where nothing is asked. Each has a right answer that
follows from the input, so the best accuracy is 100 % and the best loss 0 nats (`meta["ideal"]`).
"""

from __future__ import annotations

import numpy as np

from ..errors import ConfigurationError
from ..registry import register
from .core import Data, Pairs, build, whole
from .generated import generate, sample

UNSCORED = -100
IDEAL = {"accuracy": 100.0, "nats": 0.0}


def tokens(name: str, splits: Pairs, vocabulary: int, **options: object) -> Data:
    """A data set of token sequences with known targets; the network's output may be any of the vocabulary."""
    meta = {"vocabulary": vocabulary, "ideal": IDEAL, "options": options}
    return build(name, "next-token", "tokens", splits, outputs=vocabulary, meta=meta)


@register("data", "associative-recall")
def associative_recall(
    *,
    seed: int | None = None,
    count: int = 4000,
    val: int = 500,
    test: int = 1000,
    pairs: int = 8,
    queries: int = 4,
    keys: int = 32,
    values: int = 32,
    gap: int = 0,
) -> Data:
    """Pairs of key and value, then keys alone: say the value that stood behind each (multi-query associative recall).

    A sequence is `k v k v ... | gap | k k ...`: `pairs` different keys with their values, `gap` blanks, and `queries`
    different ones of the keys, whose values are the targets there. Token 0 is the blank, then come the keys, then the
    values. Guessing among the values seen gives 1/pairs. `T = 2 * pairs + gap + queries`.

    Args:
        count, val, test: numbers of examples.
        pairs, queries: pairs in a sequence, and how many of them are asked for.
        keys, values: how many different ones there are.
        gap: blanks between the pairs and the queries.
    """
    pairs, keys, values = whole("pairs", pairs), whole("keys", keys), whole("values", values)
    queries, gap = whole("queries", queries), whole("gap", gap, 0)
    if pairs > keys:
        raise ConfigurationError(f"pairs: {pairs} is more than the {keys} different keys")
    if queries > pairs:
        raise ConfigurationError(f"queries: {queries} is more than the {pairs} pairs")

    def draw(rng: np.random.RandomState, n: int) -> tuple[np.ndarray, np.ndarray]:
        x = np.zeros((n, 2 * pairs + gap + queries), dtype=np.int64)
        y = np.full_like(x, UNSCORED)
        x[:, 0 : 2 * pairs : 2] = 1 + sample(rng, n, keys, pairs)
        x[:, 1 : 2 * pairs : 2] = 1 + keys + rng.randint(values, size=(n, pairs))
        asked = sample(rng, n, pairs, queries)
        x[:, -queries:] = np.take_along_axis(x[:, 0 : 2 * pairs : 2], asked, 1)
        y[:, -queries:] = np.take_along_axis(x[:, 1 : 2 * pairs : 2], asked, 1)
        return x, y

    name = "associative-recall"
    splits = generate(draw, seed, count=count, val=val, test=test, name=name)
    return tokens(name, splits, 1 + keys + values, pairs=pairs, queries=queries, keys=keys, values=values, gap=gap)


@register("data", "selective-copy")
def selective_copy(
    *,
    seed: int | None = None,
    count: int = 4000,
    val: int = 500,
    test: int = 1000,
    length: int = 64,
    items: int = 8,
    symbols: int = 8,
) -> Data:
    """Symbols at random places among blanks, then markers: repeat the symbols in order, one at each marker.

    Token 0 is the blank, 1 the marker, then come the symbols. Where the symbols stand differs from example to example,
    so that no fixed delay solves it. `T = length + items`.

    Args:
        count, val, test: numbers of examples.
        length: of the part that holds the symbols.
        items: symbols to repeat.
        symbols: how many different ones there are.
    """
    length, items, symbols = whole("length", length), whole("items", items), whole("symbols", symbols, 2)
    if items > length:
        raise ConfigurationError(f"items: {items} do not fit in a length of {length}")

    def draw(rng: np.random.RandomState, n: int) -> tuple[np.ndarray, np.ndarray]:
        x = np.zeros((n, length + items), dtype=np.int64)
        y = np.full_like(x, UNSCORED)
        shown = 2 + rng.randint(symbols, size=(n, items))
        np.put_along_axis(x, np.sort(sample(rng, n, length, items), axis=1), shown, 1)
        x[:, length:] = 1
        y[:, length:] = shown
        return x, y

    splits = generate(draw, seed, count=count, val=val, test=test, name="selective-copy")
    return tokens("selective-copy", splits, 2 + symbols, length=length, items=items, symbols=symbols)


@register("data", "delayed-recall")
def delayed_recall(
    *,
    seed: int | None = None,
    count: int = 4000,
    val: int = 500,
    test: int = 1000,
    length: int = 64,
    delay: int = 16,
    symbols: int = 8,
) -> Data:
    """A stream of random symbols: at each step say the one of `delay` steps ago.

    The first `delay` steps are not scored. A memory of `delay * log2(symbols)` bits is needed and enough; without one
    the best accuracy is 1/symbols. A delay of 0 asks for the symbol itself.

    Args:
        count, val, test: numbers of examples.
        length: of the stream, `T`.
        delay: steps, less than `length`.
        symbols: how many different ones there are.
    """
    length, symbols = whole("length", length), whole("symbols", symbols, 2)
    delay = whole("delay", delay, 0, length - 1)

    def draw(rng: np.random.RandomState, n: int) -> tuple[np.ndarray, np.ndarray]:
        x = rng.randint(symbols, size=(n, length)).astype(np.int64)
        y = np.full_like(x, UNSCORED)
        y[:, delay:] = x[:, : length - delay]
        return x, y

    splits = generate(draw, seed, count=count, val=val, test=test, name="delayed-recall")
    return tokens("delayed-recall", splits, symbols, length=length, delay=delay, symbols=symbols)
