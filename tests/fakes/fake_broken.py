"""Code that does not compute what it should."""

from mainstem.claims import Check

from .design import fake


def exact():
    yield Check("the identity", 0.0)
    yield Check("the gap", 0.3, 1e-6)
    yield Check("not a number", float("nan"), 1e-6)


claim = fake(gain=1.0, scrambled=0.0, exact=exact)
