"""An effect that nobody can measure here."""

from mainstem.claims import Claim, NotTested

from .design import exact

claim = Claim(exact=exact, effect=NotTested("It needs a thousand GPUs."))
