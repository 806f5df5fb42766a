"""Time series: from a window of the past to the next values."""

from __future__ import annotations

import functools

import numpy as np

from ..errors import ConfigurationError
from ..registry import register
from .core import Data, build, draws, fewer, normalised, packaged, statistics, whole

SHARES = {"train": 0.7, "val": 0.15, "test": 0.15}


@functools.lru_cache(maxsize=1)
def _demand() -> np.ndarray:
    """Hourly demand in MW, `[3600]`. statsmodels keeps it beside the tests of its MSTL decomposition."""
    path = packaged("statsmodels", "tsa/stl/tests/results/mstl_elec_vic.csv", "electricity")
    return np.loadtxt(path, delimiter=",", skiprows=1, usecols=1)


@register("data", "electricity")
def electricity(
    *, seed: int | None = None, count: int | None = None, window: int = 168, horizon: int = 24, stride: int = 1
) -> Data:
    """Electricity demand of Victoria, hour by hour from January to May 2012: a week's values to the next day's.

    Inputs are `[N, window, 1]`, targets `[N, horizon]`, both in units of the training part's deviation from its mean;
    `meta["target"]` has these in MW. In time order the first 70 % of the 3600 hours train, 15 % are for validation and
    15 % for test. Every target lies in its own part, its window may reach back into the part before. A seed takes a
    stretch of 85 % of the hours at a random place and splits that. Neighbouring windows share most of their values.
    Linear regression reaches an mse of about 0.11, last week's values again 0.08, and yesterday's 0.30.

    Args:
        count: this many of the training windows.
        window, horizon: hours seen, and hours to forecast.
        stride: hours from one window to the next, in every split; `stride=horizon` gives targets that do not overlap.
    """
    window, horizon, stride = whole("window", window), whole("horizon", horizon), whole("stride", stride)
    demand = _demand()
    if seed is not None:
        length = int(0.85 * len(demand))
        start = int(draws(seed, "split").randint(len(demand) - length + 1))
        demand = demand[start : start + length]
    n = len(demand)
    train, val = int(SHARES["train"] * n), int((SHARES["train"] + SHARES["val"]) * n)
    first = {"train": np.arange(window, train - horizon + 1, stride)}  # hours at which forecasts begin
    first["val"] = np.arange(train, val - horizon + 1, stride)
    first["test"] = np.arange(val, n - horizon + 1, stride)
    if window > train or not all(len(hours) for hours in first.values()):
        raise ConfigurationError(
            f"window, horizon: {window} and {horizon} hours do not fit; the training part has {train} hours, the "
            f"validation part {val - train}"
        )
    first["train"] = fewer(first["train"], count, seed, name="electricity")
    mean, std = statistics(demand[:train, None], 0)
    values = normalised(demand[:, None], mean, std)[:, 0]
    splits = {
        role: (values[hours[:, None] + np.arange(-window, 0)][..., None], values[hours[:, None] + np.arange(horizon)])
        for role, hours in first.items()
    }
    meta = {"mean": mean, "std": std, "window": window, "target": {"name": "demand", "mean": mean, "std": std}}
    return build("electricity", "regression", "sequence", splits, outputs=horizon, meta=meta)
