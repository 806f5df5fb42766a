"""Pre-activation ResNet: with a clean identity path, very deep networks train faster; a scaled path does not train.

Design. Digits with all training images, five epochs, 110 layers, each arm with its own learning rate from three by
validation cross-entropy; the training loss is the mean over the last epoch, and contrasts are logarithms of its
ratios. The baseline is the original post-activation unit. The control moves norm and activation as well, but leaves a
norm on the identity path ("norm after addition"), at the same cost: it must not beat the original unit.
"""

from __future__ import annotations

import math
from collections.abc import Iterator

import numpy as np
import torch
from torch import nn

from ...network import network
from .. import Check, Claim, Contrast, Effect, Lab


def exact() -> Iterator[Check]:
    torch.manual_seed(0)
    model = network("preact-resnet-602", classes=10, in_channels=1, seed=0).eval()  # 100 blocks a stage
    stage = range(100)
    x = torch.randn(1, 16, 1, 1)
    outputs: list[torch.Tensor] = []
    handle = model.stream.register_layer_hook(lambda index, before, written, after: outputs.extend(written))
    with torch.no_grad():
        y = model.stream(x, order=stage)
    handle.remove()
    scale = float(y.abs().max())
    yield Check("the stream is its input plus the branches' outputs", _gap(y, x + sum(outputs)) / scale, 1e-5)

    for index in stage:
        nn.init.zeros_(model.stream[index].branch.get_parameter("body.conv2.weight"))
    flat = lambda v: model.stream(v.view(1, 16, 1, 1), order=stage).flatten()  # noqa: E731
    jacobian = torch.autograd.functional.jacobian(flat, x.flatten())
    yield Check.equal("100 zero-initialised blocks are the identity", flat(x.flatten()), x.flatten(), 1e-6)
    yield Check.equal("their Jacobian is I", jacobian, torch.eye(x.numel()), 1e-6)

    model.stream.reconnect("scaled-shortcut(scale=0.5)")
    jacobian = torch.autograd.functional.jacobian(flat, x.flatten())
    yield Check.equal("scaled by 0.5 it is 0.5^100 I", jacobian * 2.0**100, torch.eye(x.numel()), 1e-6)


def _gap(a: torch.Tensor, b: torch.Tensor) -> float:
    return float((a - b).abs().max())


def measure(lab: Lab) -> dict[str, np.ndarray]:
    runs = lab.compare(
        {
            "original": "resnet-110",
            "pre-activation": "preact-resnet-110",
            "norm after addition": "preact-resnet-110+order=norm-after-addition",
            "scaled shortcut": "preact-resnet-110+connection=scaled-shortcut(scale=0.5)",
        },
        "digits",
        lr=(0.1, 0.03, 0.01),
        budget="epochs=5",
        metric="nats",
        recipe={"evaluations": 5, "augment": False},
    )
    loss = {name: np.log(each.last("train_loss", failed=math.log(10))) for name, each in runs.items()}
    return {
        "pre-activation to original": loss["pre-activation"] - loss["original"],
        "scaled shortcut to pre-activation": loss["scaled shortcut"] - loss["pre-activation"],
        "norm after addition to original": loss["norm after addition"] - loss["original"],
    }


claim = Claim(
    exact=exact,
    effect=Effect(
        expected="At 110 layers and after five epochs, pre-activation's training loss lies below the "
        "original unit's; with "
        "shortcuts scaled by 0.5 it is at least twice as high.",
        contrasts=(
            Contrast("pre-activation to original", 0.0, "below", unit="ln loss ratio"),
            Contrast("scaled shortcut to pre-activation", math.log(2), "above", unit="ln loss ratio"),
            Contrast("norm after addition to original", 0.0, "below", role="control", unit="ln loss ratio"),
        ),
        measure=measure,
        seconds=220,
    ),
)
