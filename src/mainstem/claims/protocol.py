"""A claim in two halves: checks that hold exactly, and an effect that is measured and judged.

    claim = Claim(exact=exact, effect=Effect(expected=..., contrasts=(...), measure=measure, seconds=90))

`exact()` yields checks. `measure(lab)` returns, for each contrast, one value a seed `[S]`, or one a seed and example
`[S, E]`, whose mean is tested. The verdicts come from the 95 % interval of that mean:

    an effect contrast   holds: the interval lies wholly beyond the threshold   fails: wholly short of it
    a control contrast   holds: the interval lies wholly short of the threshold fails: wholly beyond it
    the claim            holds: every contrast holds    fails: any fails    else undecided

so that a control which shows the effect fails the claim. The design (contrasts, thresholds, seeds) is data, written
before it is run.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from ..errors import ConfigurationError, unknown

if TYPE_CHECKING:
    from numpy.typing import ArrayLike

    from .lab import Lab

HOLDS, FAILS, UNDECIDED, NOT_TESTED = "holds", "fails", "undecided", "not tested"
VERDICTS = (HOLDS, FAILS, UNDECIDED, NOT_TESTED)


@dataclass(frozen=True)
class Check:
    """Something that must hold exactly: `error` is at most `tolerance`. A NaN does not pass."""

    name: str
    error: float
    tolerance: float = 0.0

    @property
    def passed(self) -> bool:
        return self.error <= self.tolerance

    @classmethod
    def equal(cls, name: str, given: Any, expected: Any, tolerance: float = 0.0) -> Check:
        """That two numbers, arrays or tensors differ by at most `tolerance` anywhere.

        Shapes must agree, unless one is a single number; otherwise, or where nothing is compared, the error is Inf.
        """
        a, b = _array(given), _array(expected)
        fits = a.size and b.size and (a.shape == b.shape or 0 in (a.ndim, b.ndim))
        return cls(name, float(abs(a - b).max()) if fits else math.inf, tolerance)

    @classmethod
    def that(cls, name: str, condition: Any) -> Check:
        """That a condition is true; the error is 0 or 1."""
        return cls(name, 0.0 if condition else 1.0)

    def to_json(self) -> dict[str, Any]:
        return {"name": self.name, "passed": self.passed, "error": _finite(self.error), "tolerance": self.tolerance}


@dataclass(frozen=True)
class Contrast:
    """One mean that is tested against a threshold.

    Attributes:
        name: what the values are, for instance "steps saved by rezero".
        threshold: what the effect has to clear, in `unit`; for a control, what it must stay short of.
        beyond: the side of the threshold on which the effect lies.
        role: "effect", or "control": the mechanism disabled or scrambled, which must not show the effect.
    """

    name: str
    threshold: float = 0.0
    beyond: Literal["above", "below"] = "above"
    role: Literal["effect", "control"] = "effect"
    unit: str = ""

    def __post_init__(self) -> None:
        for field, valid in (("beyond", ("above", "below")), ("role", ("effect", "control"))):
            if getattr(self, field) not in valid:
                raise unknown(f"contrast {self.name}: {field}", getattr(self, field), valid)

    def judge(self, values: ArrayLike) -> Measured:
        """The mean of `values`, `[S]` or `[S, E]`, its 95 % interval and the verdict on this contrast."""
        from ..bench.statistics import interval, verdict

        mean, low, high, _ = interval(values)
        if self.beyond == "above":
            found = verdict(low, high, self.threshold)
        else:
            found = verdict(None if high is None else -high, None if low is None else -low, -self.threshold)
        if self.role == "control":
            found = {HOLDS: FAILS, FAILS: HOLDS}.get(found, found)
        return Measured(self, _finite(mean), low, high, found)


@dataclass(frozen=True)
class Measured:
    """A contrast with what was measured; the numbers are None where a run without a value leaves none."""

    contrast: Contrast
    mean: float | None
    low: float | None
    high: float | None
    verdict: str

    def to_json(self) -> dict[str, Any]:
        own = {"mean": self.mean, "low": self.low, "high": self.high, "verdict": self.verdict}
        return {**vars(self.contrast), **own}


@dataclass(frozen=True)
class Effect:
    """A paper's headline as a comparison.

    Attributes:
        expected: in a sentence, what the paper's claim lets one expect here.
        contrasts: what is tested.
        measure: runs the comparison on `lab.seeds` and returns the values of each contrast, by its name.
        seconds: about how long that takes with the default seeds, on two cores.
        seeds: those of the committed result; anyone can take others.
    """

    expected: str
    contrasts: Sequence[Contrast]
    measure: Callable[[Lab], Mapping[str, ArrayLike]]
    seconds: float
    seeds: Sequence[int] = (0, 1, 2, 3, 4)

    def __post_init__(self) -> None:
        names = [contrast.name for contrast in self.contrasts]
        if len(set(names)) < len(names):
            raise ConfigurationError(f"contrasts: two have the same name, among {', '.join(names)}")
        if all(contrast.role == "control" for contrast in self.contrasts):
            raise ConfigurationError("contrasts: there is no effect to test, only controls")

    def judge(self, lab: Lab) -> list[Measured]:
        """Measure on the seeds of `lab`. Raises `ConfigurationError` if `measure` does not return what was declared."""
        import numpy as np

        values = self.measure(lab)
        names = {contrast.name for contrast in self.contrasts}
        if set(values) != names:
            raise ConfigurationError(f"measure: it returned {sorted(values)} for the contrasts {sorted(names)}")
        for name, given in values.items():
            shape = np.shape(given)
            if len(shape) not in (1, 2) or shape[0] != len(lab.seeds):
                raise ConfigurationError(f"measure: {name!r} has shape {shape}, for {len(lab.seeds)} seeds")
        return [contrast.judge(values[contrast.name]) for contrast in self.contrasts]


@dataclass(frozen=True)
class NotTested:
    """In place of an effect: why it cannot be tested here, in a sentence that a reader accepts."""

    reason: str


@dataclass(frozen=True)
class Claim:
    """One paper's claim; each `claims/<area>/<id>.py` has one, called `claim`."""

    exact: Callable[[], Iterable[Check]]
    effect: Effect | NotTested


def overall(measured: Iterable[Measured]) -> str:
    """The verdict on a claim, from those on its contrasts."""
    found = {each.verdict for each in measured}
    return FAILS if FAILS in found else HOLDS if found == {HOLDS} else UNDECIDED


def _array(value: Any) -> Any:
    import numpy as np

    if hasattr(value, "detach"):  # a tensor, of any type and on any device
        value = value.detach().cpu()
        value = (value.cfloat() if value.is_complex() and value.itemsize < 8 else value).resolve_conj()
        value = value.double() if value.is_floating_point() else value
        value = value.resolve_neg().numpy()
    array = np.asarray(value)
    return array.astype(np.complex128 if np.iscomplexobj(array) else np.float64)


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None
