"""Which setting an arm tries next: a pure function of the seed, the arm, the trial's index and earlier results.

Optuna proposes; nothing of its own is kept between calls, so that a killed comparison goes on as if it had not been,
and the number of workers makes no difference. In a space with ranges the first trials spread evenly (a scrambled Halton
sequence), and later ones follow the results (a tree-structured Parzen estimator).
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

from .experiment import Choices, Space

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
    random.Random(f"{seed}/{arm}").shuffle(others)
    if k <= len(others):
        return others[k - 1]
    distributions = {name: _distribution(entry, default[name]) for name, entry in sorted(space.items())}
    spread = k < SPREAD
    stream = int.from_bytes(hashlib.sha256(f"{seed}/{arm}/{0 if spread else k}".encode()).digest()[:4], "big")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", optuna.exceptions.ExperimentalWarning)
        sampler: optuna.samplers.BaseSampler = (
            optuna.samplers.QMCSampler(qmc_type="halton", scramble=True, seed=stream)
            if spread
            else optuna.samplers.TPESampler(n_startup_trials=1, multivariate=True, seed=stream)
        )
    verbosity = optuna.logging.get_verbosity()
    optuna.logging.set_verbosity(optuna.logging.WARNING)
    try:
        study = optuna.create_study(direction="maximize" if higher_is_better else "minimize", sampler=sampler)
    finally:
        optuna.logging.set_verbosity(verbosity)
    finite = [value for _, value in results if value is not None]
    worst = (min if higher_is_better else max)(finite, default=0.0)
    history = [(default, 0.0)] if spread else results
    for setting, value in history:
        params = {name: _encode(space[name], setting[name]) for name in distributions}
        study.add_trial(
            optuna.trial.create_trial(
                params=params, distributions=distributions, value=worst if value is None else value
            )
        )
    for _ in range(k if spread else 1):  # the k-th point of the sequence
        trial = study.ask(distributions)
    return {name: _decode(space[name], trial.params[name]) for name in space}


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
