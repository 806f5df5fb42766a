"""An effect, and a control without it."""

from .design import fake

claim = fake(gain=1.0, scrambled=0.0)
