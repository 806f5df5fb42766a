"""Intervals, tests and verdicts over seeds and test examples.

A comparison asks about new seeds *and* new examples, so both are random. With one fixed test split of `E`
examples and `S` seeds, the paired differences between an arm and the baseline are

    d[s, e] = mean + seed[s] + example[e] + residual[s, e],

a two-way random-effects layout without replication. Its mean has the variance

    seed²/S + example²/E + residual²/(S E),  estimated by  (MS_seed + MS_example - MS_residual) / (S E),

where each MS is the mean square of the usual analysis of variance. A negative estimate of the seeds' or the
examples' component counts as zero, which can only widen an interval. Degrees of freedom are Satterthwaite's.
A t test over the seeds' means alone leaves out the examples' term, and finds differences that another test
split would not show.

Where each seed has its own test split, or the metric has no scores per example, the seeds' means carry all
the variation that can be seen, and the test is a paired t over seeds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, NamedTuple

import numpy as np
from numpy.typing import ArrayLike, NDArray
from scipy import optimize, stats

from ..errors import ConfigurationError, unknown

POWER = 0.8  # with which a "smallest detectable difference" would be found


class Estimate(NamedTuple):
    """A mean, its standard error, that error's degrees of freedom, and the number of distinct examples."""

    mean: float
    error: float
    df: float
    examples: int

    def quantile(self, alpha: float) -> float:
        """The half width of the `1 - alpha` interval, in standard errors."""
        return float(stats.t.ppf(1 - alpha / 2, self.df)) if self.error else 0.0

    @property
    def p(self) -> float:
        """The two-sided p value of "the mean is zero"."""
        if self.mean == 0:
            return 1.0
        if self.error == 0:  # the same difference everywhere: a sign test over the examples is what is left
            return min(1.0, 2.0 ** (1 - self.examples))
        return float(2 * stats.t.sf(abs(self.mean) / self.error, self.df))

    def detectable(self, alpha: float) -> float | None:
        """The smallest true mean that a test at `alpha` finds with 80 % power; None without spread."""
        if self.error == 0:
            return None
        t = self.quantile(alpha)
        if self.df > 100:  # the noncentral t is a shifted normal here, to 0.3 %
            return self.error * (t + float(stats.norm.ppf(POWER)))
        missing = lambda shift: float(stats.nct.sf(t, self.df, shift)) - POWER  # noqa: E731
        return self.error * float(optimize.brentq(missing, 0.0, 4 * t + 10))


def estimate(differences: ArrayLike) -> Estimate | None:
    """The mean of `differences`, `[S]` or `[S, E]`, and its error over seeds, or seeds and examples crossed.

    None where the seeds' spread cannot be seen: fewer than two seeds, or a value that is not finite.
    """
    d = np.asarray(differences, dtype=np.float64)
    if d.ndim not in (1, 2):
        raise ConfigurationError(f"differences: shape {d.shape} is neither [seeds] nor [seeds, examples]")
    if d.shape[0] < 2 or d.size == 0 or not np.isfinite(d).all():
        return None
    mean = float(d.mean())
    if d.ndim == 1 or d.shape[1] == 1:
        variance, df = float(d.var(ddof=1)) / d.shape[0], float(d.shape[0] - 1)
        examples = 1
    else:
        variance, df = _crossed(d)
        examples = d.shape[1]
    floor = 1e-9 * float(np.abs(d).max())  # below this, the spread is rounding
    error = math.sqrt(variance)
    if error <= floor:
        return Estimate(0.0 if abs(mean) <= floor else mean, 0.0, df, examples)
    return Estimate(mean, error, df, examples)


def _crossed(d: NDArray[np.float64]) -> tuple[float, float]:
    """The variance of the grand mean of `d`, `[S, E]`, and its degrees of freedom."""
    s, e = d.shape
    mean, by_seed, by_example = d.mean(), d.mean(1), d.mean(0)
    ms_seed = e * float(((by_seed - mean) ** 2).sum()) / (s - 1)
    ms_example = s * float(((by_example - mean) ** 2).sum()) / (e - 1)
    residual = d - by_seed[:, None] - by_example + mean
    df_residual = (s - 1) * (e - 1)
    ms_residual = float((residual**2).sum()) / df_residual
    total = max(ms_seed, ms_residual) + max(ms_example, ms_residual) - ms_residual
    spread = ms_seed**2 / (s - 1) + ms_example**2 / (e - 1) + ms_residual**2 / df_residual
    return total / (s * e), total**2 / spread if spread else float(s - 1)


def interval(differences: ArrayLike, alpha: float = 0.05) -> tuple[float, float | None, float | None, float | None]:
    """`(mean, low, high, df)` of the `1 - alpha` interval for the mean of `differences`, `[S]` or `[S, E]`.

    Low, high and df are None where fewer than two seeds leave no interval.
    """
    found = estimate(differences)
    if found is None:
        return float(np.mean(np.asarray(differences, dtype=np.float64))), None, None, None
    half = found.quantile(alpha) * found.error
    return found.mean, found.mean - half, found.mean + half, found.df


def verdict(low: float | None, high: float | None, threshold: float) -> str:
    """A claim's verdict from its interval: `"holds"` wholly above `threshold`, `"fails"` wholly below, else
    `"undecided"`."""
    if low is None or high is None:
        return "undecided"
    if low > threshold:
        return "holds"
    return "fails" if high < threshold else "undecided"


def holm(p: Mapping[str, float]) -> dict[str, float]:
    """Holm's step-down adjustment of the p values of a family of tests, by name."""
    adjusted: dict[str, float] = {}
    largest = 0.0
    for rank, name in enumerate(sorted(p, key=lambda n: p[n])):
        largest = max(largest, min(1.0, (len(p) - rank) * p[name]))
        adjusted[name] = largest
    return adjusted


def summarise(
    finals: Mapping[str, Sequence[Mapping[str, Any]]],
    baseline: str,
    higher_is_better: bool,
    alpha: float = 0.05,
    crossed: bool = True,
) -> dict[str, dict[str, Any]]:
    """Each arm's mean and interval, and its paired difference to the baseline, Holm-corrected over arms.

    Args:
        finals: per arm, one `{"seed", "value", "scores"}` per final run: the metric on the test split, and its
            value per example (`[E]`) or None. A run whose value is None (it failed) is left out.
        baseline: the arm that the others are compared with.
        higher_is_better: whether a larger value is the better one.
        alpha: the family-wise level of the verdicts, and one minus the level of every interval.
        crossed: False where each seed has a test split of its own, so that examples do not match over seeds.

    Returns, per arm, `mean`, `low`, `high`, and `difference` (None for the baseline) with `mean`, `low`,
    `high`, `p`, `p_holm`, `verdict` ("better", "worse", "tie", or "unknown" where there is no test) and
    `detectable`: the smallest true difference that would have been found with 80 % power at the level that
    Holm grants every arm. Differences are arm minus baseline, over the seeds that both finished. Intervals
    are each at `1 - alpha`, uncorrected; the verdict is the one with the correction.
    """
    if baseline not in finals:
        raise unknown("baseline", baseline, finals)
    runs = {arm: {r["seed"]: r for r in rows if r["value"] is not None} for arm, rows in finals.items()}
    differences = {arm: _paired(runs[arm], runs[baseline], crossed) for arm in runs if arm != baseline}
    tests = {arm: found for arm, d in differences.items() if (found := estimate(d)) is not None}
    p = {arm: test.p for arm, test in tests.items()}
    p_holm = holm(p)
    summary: dict[str, dict[str, Any]] = {}
    for arm, rows in runs.items():
        summary[arm] = {**_bounds(_values(rows, sorted(rows), crossed), alpha), "difference": None}
        if arm == baseline:
            continue
        outcome = "unknown"
        if arm in tests:
            better = "better" if (tests[arm].mean > 0) == higher_is_better else "worse"
            outcome = better if p_holm[arm] < alpha else "tie"
        summary[arm]["difference"] = {
            **_bounds(differences[arm], alpha),
            "p": p.get(arm),
            "p_holm": p_holm.get(arm),
            "verdict": outcome,
            "detectable": tests[arm].detectable(alpha / len(tests)) if arm in tests else None,
        }
    return summary


def _bounds(values: NDArray[np.float64], alpha: float) -> dict[str, float | None]:
    if values.size == 0:
        return {"mean": None, "low": None, "high": None}
    mean, low, high, _ = interval(values, alpha)
    return {"mean": mean if math.isfinite(mean) else None, "low": low, "high": high}


def _paired(arm: Mapping[Any, Any], baseline: Mapping[Any, Any], crossed: bool) -> NDArray[np.float64]:
    """Arm minus baseline over their common seeds: `[S, E]` where examples match, else `[S]`."""
    seeds = sorted(arm.keys() & baseline.keys())
    ours, theirs = _values(arm, seeds, crossed), _values(baseline, seeds, crossed)
    if ours.shape != theirs.shape:
        ours, theirs = _values(arm, seeds, False), _values(baseline, seeds, False)
    return ours - theirs


def _values(runs: Mapping[Any, Any], seeds: Sequence[Any], crossed: bool) -> NDArray[np.float64]:
    """The runs' scores `[S, E]`, or their values `[S]` where scores are missing, not of one length, or not what
    the metric is the mean of."""
    values = np.array([runs[seed]["value"] for seed in seeds], dtype=np.float64)
    scores = [runs[seed].get("scores") for seed in seeds]
    if not crossed or not scores or any(s is None for s in scores) or len({len(s) for s in scores}) > 1:
        return values
    table = np.asarray(scores, dtype=np.float64)
    same = table.size > 0 and np.allclose(table.mean(1), values, rtol=1e-3, atol=1e-6)
    return table if same else values
