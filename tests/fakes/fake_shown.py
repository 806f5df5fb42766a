"""A control that shows the effect too."""

from .design import fake

claim = fake(gain=1.0, scrambled=1.0)
