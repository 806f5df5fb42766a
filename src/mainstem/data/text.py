"""Text as characters: given a window of them, say the next one at every position."""

from __future__ import annotations

import functools
from pathlib import Path

import numpy as np

from ..errors import ConfigurationError
from ..registry import register
from .core import Data, build, draws, fewer, whole

UNKNOWN = "\ufffd"  # token 0: a character that the training part does not hold
SHARES = {"val": 0.1, "test": 0.1}


@functools.lru_cache(maxsize=1)
def _topics() -> str:
    """The manual's topics in order of their keys. Many repeat parts of others, so each paragraph is taken once."""
    from pydoc_data.topics import topics

    paragraphs = (paragraph for key in sorted(topics) for paragraph in topics[key].split("\n\n"))
    return "\n\n".join({" ".join(paragraph.split()): paragraph for paragraph in paragraphs}.values())


@register("data", "prose")
def prose(*, seed: int | None = None, count: int | None = None, window: int = 128) -> Data:
    """English prose: the characters of Python's own reference manual, `pydoc_data.topics` (about 370 000 of them).

    Its topics repeat parts of each other; here every paragraph stands once. The text differs a little between versions
    of Python, and the hash with it. Splits are contiguous: the first 80 % train, then 10 % validation, then 10 % test;
    a seed puts the validation and test part elsewhere. Inputs are windows side by side, `[N, window]`; the target at
    each position is the following character, and every position is scored. The vocabulary is that of the training
    part, after token 0 for any other character.

    Args:
        count: this many of the training windows.
        window: characters in a window.
    """
    return _characters("prose", _topics(), seed, count, window)


@register("data", "text:PATH")
def text(path: str | Path, *, seed: int | None = None, count: int | None = None, window: int = 128) -> Data:
    """The characters of a UTF-8 text file, split and cut into windows as `prose` is, with the same options.

    Raises ConfigurationError for a file that is not UTF-8, or too short for one window in each split.
    """
    return _characters(f"text:{path}", read_text(path), seed, count, window, where=str(path))


def read_text(path: str | Path) -> str:
    """The text of a UTF-8 file, line ends as "\\n"."""
    try:
        return Path(path).read_text(encoding="utf-8")
    except FileNotFoundError:
        raise ConfigurationError(f"no such file: {path}") from None
    except IsADirectoryError:
        raise ConfigurationError(f"{path} is a folder, not a text file") from None
    except UnicodeDecodeError as error:
        raise ConfigurationError(f"{path} is not UTF-8 text (byte {error.start}); save it as UTF-8") from None


def encode(text: str, characters: list[str]) -> np.ndarray:
    """Token numbers `[T]` of a text, 0 for a character that is not among `characters`."""
    codes = np.frombuffer(text.encode("utf-32-le"), dtype=np.uint32)
    known = np.array([ord(c) for c in characters], dtype=np.uint32)  # ascending, after the first
    place = np.searchsorted(known[1:], codes) + 1
    place[place == len(known)] = 0
    return np.where(known[place] == codes, place, 0).astype(np.int64)


def _characters(
    name: str, text: str, seed: int | None, count: int | None, window: int, where: str | None = None
) -> Data:
    window = whole("window", window)
    n = len(text)
    held = {role: int(share * n) for role, share in SHARES.items()}
    if min(held.values()) < window + 1:
        raise ConfigurationError(
            f"{where or name}: {n} characters are too few for a window of {window} in each split; "
            f"at least {10 * (window + 1)} are needed"
        )
    first = n - sum(held.values())
    start = first if seed is None else int(draws(seed, "split").randint(first + 1))
    cuts = [start, start + held["val"], start + held["val"] + held["test"]]
    pieces = {"train": [text[: cuts[0]], text[cuts[2] :]], "val": [text[cuts[0] : cuts[1]]]}
    pieces["test"] = [text[cuts[1] : cuts[2]]]
    characters = [UNKNOWN, *sorted(set("".join(pieces["train"])) - {UNKNOWN})]
    splits = {}
    for role, parts in pieces.items():
        windows = np.concatenate([_windows(encode(part, characters), window) for part in parts])
        if role == "train":
            windows = windows[fewer(np.arange(len(windows)), count, seed, name=name)]
        splits[role] = windows[:, :-1], windows[:, 1:]
    meta = {"characters": characters, "window": window}
    return build(name, "next-token", "tokens", splits, outputs=len(characters), meta=meta)


def _windows(tokens: np.ndarray, window: int) -> np.ndarray:
    """Windows side by side, each with the token that follows it: `[N, window + 1]`."""
    n = max(0, (len(tokens) - 1) // window)
    return tokens[np.arange(n)[:, None] * window + np.arange(window + 1)]
