"""Residual multilayer perceptrons: `mlp-<layers>x<width>`."""

from __future__ import annotations

from typing import Any

from torch import Tensor, nn

from ..errors import ConfigurationError
from ..network import Network, takes
from ..nn import activation as activation_layer
from ..nn import norm as norm_layer
from ..registry import register
from ..stream import ConnectionSpec, Layer, Stream
from ..stream import connection as connect


class LinearBranch(nn.Module):
    """activation(linear(norm(x))): `[..., width] -> [..., width]`."""

    def __init__(self, width: int, norm: Any, activation: Any):
        super().__init__()
        self.norm = norm_layer(norm)(width, dim=-1)
        self.linear = nn.Linear(width, width)
        self.activation = activation_layer(activation)()

    def forward(self, x: Tensor) -> Tensor:
        return self.activation(self.linear(self.norm(x)))


@register("network", "mlp-<layers>x<width>")
@takes("vector")
def mlp(
    *,
    layers: int,
    width: int,
    classes: int,
    in_channels: int,
    connection: ConnectionSpec = None,
    norm: Any = "layer",
    activation: Any = "relu",
    placement: str = "pre",
    checkpoint: bool = False,
) -> Network:
    """A residual MLP: a linear stem, `layers` layers `x + activation(linear(norm(x)))`, a linear read-out.

    Args:
        layers: number of residual layers, each with one linear map.
        width: features of the stream.
        in_channels: number of input features; images are flattened.
        placement: of the norm: "pre" (on the branch's input, and once before the read-out) or "post" (after the
            addition).
        connection, norm, activation, checkpoint: as for `network`. ReZero's fully connected networks are
            `connection="rezero", norm="none"`; the plain network is `connection="plain", norm="none"`.

    Shapes: `[N, ...]` with `in_channels` numbers an example `-> [N, classes]`.
    Raises: `ConfigurationError` for an unknown placement.
    """
    if placement not in ("pre", "post"):
        raise ConfigurationError(f"placement: {placement!r} is neither 'pre' nor 'post'")
    make_connection = connect(connection)
    post = placement == "post"
    branches = [LinearBranch(width, "none" if post else norm, activation) for _ in range(layers)]
    stack = [
        Layer(
            branch,
            make_connection(width, index=index, depth=layers, dim=-1),
            after=norm_layer(norm)(width, dim=-1) if post else None,
        )
        for index, branch in enumerate(branches)
    ]
    model = Network(
        nn.Sequential(nn.Flatten(), nn.Linear(in_channels, width)),
        Stream(stack, checkpoint=checkpoint),
        nn.Sequential(nn.Identity() if post else norm_layer(norm)(width, dim=-1), nn.Linear(width, classes)),
        inputs="vector",
    )
    for branch in branches:  # variance-preserving under ReLU
        nn.init.kaiming_normal_(branch.linear.weight, nonlinearity="relu")
        nn.init.zeros_(branch.linear.bias)
    return model
