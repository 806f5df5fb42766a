"""Which setting an arm tries next: a pure function of the seed, the arm, the trial's index and earlier results.

Nothing is kept between calls, so a killed comparison goes on as if it had not been, and the number of workers makes
no difference. In a space with ranges the first trials are spread evenly, the same way for every arm, and Optuna's
tree-structured Parzen estimator proposes the later ones from the results.
"""

from __future__ import annotations

import hashlib
import itertools
import math
import random
import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import optuna
from optuna.distributions import (
    BaseDistribution,
    CategoricalDistribution,
    FloatDistribution,
    IntDistribution,
)

from .experiment import Choices, Range, Space

GRID = 64  # so many settings are tried one after another
SPREAD = 8  # trials that are spread evenly before results guide the rest

Trial = tuple[dict[str, Any], float | None]  # a setting and its value, None if the run failed


def propose(
    space: Space,
    default: Mapping[str, Any],
    k: int,
    results: Sequence[Trial],
    *,
    seed: int,
    arm: str,
    higher_is_better: bool,
) -> dict[str, Any]:
    """The setting of an arm's trial `k`; trial 0 is the arm's `default`.

    A space of short lists is gone through, in random order, before anything is tried again. Else `results`, those of
    trials 0, 1, ... up to the start of the trial's batch, guide the search; a failed trial counts as the worst value
    seen.
    """
    if k == 0:
        return dict(default)
    others = [setting for setting in _grid(space) if setting != default]
    random.Random(seed).shuffle(others)
    if k <= len(others):
        return others[k - 1]
    if k < SPREAD:
        return _spread(space, default, k)
    distributions = {name: _distribution(entry, default[name]) for name, entry in sorted(space.items())}
    finite = [value for _, value in results if value is not None]
    worst = (min if higher_is_better else max)(finite, default=0.0)
    study = _study(higher_is_better, int(hashlib.sha256(f"{seed}/{arm}/{k}".encode()).hexdigest()[:8], 16))
    for setting, value in results:
        params = {name: _encode(space[name], setting[name]) for name in distributions}
        study.add_trial(
            optuna.trial.create_trial(
                params=params, distributions=distributions, value=worst if value is None else value
            )
        )
    params = study.ask(distributions).params
    return {name: _decode(space[name], params[name]) for name in space}


def _study(higher_is_better: bool, seed: int) -> optuna.Study:
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler = optuna.samplers.TPESampler(n_startup_trials=1, multivariate=True, seed=seed)
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        return optuna.create_study(direction="maximize" if higher_is_better else "minimize", sampler=sampler)
    finally:
        optuna.logging.set_verbosity(verbosity)


def _spread(space: Space, default: Mapping[str, Any], k: int) -> dict[str, Any]:
    """Point `k` of the additive sequence of the generalised golden ratio, whose point 0 is the default.

    Every prefix of it is spread evenly over the space, and no early point comes close to the default.
    """
    golden = 2.0
    for _ in range(64):  # the fixed point of g = (1 + g)^(1 / (d + 1))
        golden = (1 + golden) ** (1 / (len(space) + 1))
    return {
        name: _at(entry, default[name], (_position(entry, default[name]) + k * golden**-i) % 1)
        for i, (name, entry) in enumerate(space.items(), 1)
    }


def _position(entry: Range | Choices, value: Any) -> float:
    """Where `value` lies in its range, between 0 and 1."""
    if isinstance(entry, Choices):
        return (entry.choices.index(value) + 0.5) / len(entry.choices)
    low, high, value = (math.log(v) if entry.log else v for v in (entry.low, entry.high, value))
    return (value - low) / (high - low)


def _at(entry: Range | Choices, default: Any, position: float) -> Any:
    """The value at `position` of a range; an integer if the default is one."""
    if isinstance(entry, Choices):
        return entry.choices[int(position * len(entry.choices))]
    low, high = (math.log(v) if entry.log else v for v in (entry.low, entry.high))
    value = low + position * (high - low)
    value = min(max(math.exp(value) if entry.log else value, entry.low), entry.high)
    return round(value) if isinstance(default, int) else value


def _grid(space: Space) -> list[dict[str, Any]]:
    """Every setting of a space of short lists; none of a space with a range, or with more than `GRID` settings."""
    lists = [entry.choices for entry in space.values() if isinstance(entry, Choices)]
    short = len(lists) == len(space) and math.prod(map(len, lists)) <= GRID
    return [dict(zip(space, values, strict=True)) for values in (itertools.product(*lists) if short else ())]


def _distribution(entry: Any, default: Any) -> BaseDistribution:
    if isinstance(entry, Choices):
        return CategoricalDistribution(range(len(entry.choices)))
    if isinstance(default, int):
        return IntDistribution(round(entry.low), round(entry.high), log=entry.log)
    return FloatDistribution(entry.low, entry.high, log=entry.log)


def _encode(entry: Any, value: Any) -> Any:
    return entry.choices.index(value) if isinstance(entry, Choices) else value


def _decode(entry: Any, value: Any) -> Any:
    return entry.choices[value] if isinstance(entry, Choices) else value
