"""How layers join the stream, and the networks that introduced it."""

from .preact_resnet import (
    ConvShortcut,
    DropoutShortcut,
    ExclusiveGate,
    ScaledShortcut,
    ShortcutGate,
    preact_resnet,
)
from .resnet import resnet
from .rezero import ReZero
from .stochastic_depth import StochasticDepth

__all__ = [
    "ConvShortcut",
    "DropoutShortcut",
    "ExclusiveGate",
    "ReZero",
    "ScaledShortcut",
    "ShortcutGate",
    "StochasticDepth",
    "preact_resnet",
    "resnet",
]
