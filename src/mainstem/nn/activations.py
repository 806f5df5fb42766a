"""Activations by name: `activation("relu")()`. Each registered factory takes no feature size."""

from __future__ import annotations

from collections.abc import Callable

from torch import nn

from .. import registry


def activation(spec: str | Callable[..., nn.Module]) -> Callable[..., nn.Module]:
    """The factory `() -> module` that `spec` names."""
    return registry.factory("activation", spec)


@registry.register("activation", "relu")
def relu() -> nn.Module:
    return nn.ReLU()


@registry.register("activation", "leaky-relu")
def leaky_relu(slope: float = 0.01) -> nn.Module:
    return nn.LeakyReLU(slope)


@registry.register("activation", "gelu")
def gelu(approximate: str = "none") -> nn.Module:
    return nn.GELU(approximate)


@registry.register("activation", "silu")
def silu() -> nn.Module:
    return nn.SiLU()


@registry.register("activation", "mish")
def mish() -> nn.Module:
    return nn.Mish()


@registry.register("activation", "elu")
def elu(alpha: float = 1.0) -> nn.Module:
    return nn.ELU(alpha)


@registry.register("activation", "tanh")
def tanh() -> nn.Module:
    return nn.Tanh()


@registry.register("activation", "none")
def none() -> nn.Module:
    return nn.Identity()
