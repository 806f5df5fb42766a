"""An effect as large as its threshold."""

from .design import fake

claim = fake(gain=0.5, scrambled=0.0)
