"""Fair comparisons: arms and seeds under one budget, tuned alike, tested over seeds and examples, with their cost."""

from .compare import compare as compare
from .compare import run as run
from .estimate import estimate as estimate
from .experiment import Arm as Arm
from .experiment import Experiment as Experiment
from .result import read_result as read_result

__all__ = ["Arm", "Experiment", "compare", "estimate", "read_result", "run"]
