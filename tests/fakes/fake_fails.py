"""No effect."""

from .design import fake

claim = fake(gain=0.1, scrambled=0.0)
