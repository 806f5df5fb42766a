"""Data that the user hands over: arrays, splits or loaders, as a `Data`."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ..data import Data, Split
from ..errors import ConfigurationError
from ..files import sha256_of

SHARES = (0.6, 0.2)  # of a single pair of arrays, for training and validation; the rest is the test split
ROLES = ("train", "val", "test")


def data_of(given: Any) -> Data:
    """A `Data` from a `Data`, a pair `(x, y)`, or three splits as a triple or a dict of `train`, `val` and `test`.

    A split is a pair `(x, y)` of arrays or tensors, examples first, or a loader, which is read through once: random
    augmentation in a loader is drawn then, and not again. A single pair is shuffled (always alike) and split
    60/20/20. Values are taken as they are, without normalisation. Integer targets `[N]` are classes 0, 1, ...; integer
    targets `[N, T]` are next tokens; other targets are numbers to predict.

    Raises ConfigurationError for anything else, for NaN or Inf, and for lengths that differ.
    """
    if isinstance(given, Data):
        return given
    if isinstance(given, Mapping):
        if set(given) != set(ROLES):
            raise ConfigurationError(f"data: give train, val and test, not {', '.join(map(str, given)) or 'nothing'}")
        parts = {role: _split(given[role], role) for role in ROLES}
    elif isinstance(given, list | tuple) and len(given) == 3:
        parts = {role: _split(part, role) for role, part in zip(ROLES, given, strict=True)}
    elif isinstance(given, list | tuple) and len(given) == 2:
        parts = _shuffled(*_split(given, "all"))
    else:
        raise ConfigurationError(
            f"data: {type(given).__name__} is not data; give a name, a Data, (x, y), or train, val and test splits"
        )
    return _described(parts)


def _split(part: Any, role: str) -> tuple[Tensor, Tensor]:
    if not (isinstance(part, list | tuple) and len(part) == 2):
        try:
            batches = [(torch.as_tensor(x), torch.as_tensor(y)) for x, y in part]
            part = torch.cat([x for x, _ in batches]), torch.cat([y for _, y in batches])
        except (TypeError, ValueError, RuntimeError) as error:
            raise ConfigurationError(
                f"data: the {role} split is neither a pair (x, y) nor a loader of such pairs ({error})"
            ) from None
    x, y = (_tensor(value, f"{role} {name}") for value, name in zip(part, "xy", strict=True))
    if not len(x) or len(x) != len(y):
        raise ConfigurationError(f"data: the {role} split has {len(x)} inputs and {len(y)} targets")
    return x, y


def _tensor(value: Any, where: str) -> Tensor:
    try:
        tensor = value if isinstance(value, Tensor) else torch.as_tensor(np.asarray(value))
    except TypeError as error:
        raise ConfigurationError(f"data: {where} does not hold numbers ({error})") from None
    tensor = tensor.detach().cpu()
    if tensor.ndim == 0:
        raise ConfigurationError(f"data: {where} is a single number; examples come first")
    if not tensor.is_floating_point():
        return tensor.long()
    if not bool(torch.isfinite(tensor).all()):
        raise ConfigurationError(f"data: {where} holds NaN or Inf")
    return tensor.float()


def _shuffled(x: Tensor, y: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    order = torch.randperm(len(x), generator=torch.Generator().manual_seed(0))
    train, val = (round(share * len(x)) for share in SHARES)
    if train < 1 or val < 1 or len(x) - train - val < 1:
        raise ConfigurationError(f"data: {len(x)} examples are too few to split in three")
    pieces = order.split([train, val, len(x) - train - val])
    return {role: (x[piece], y[piece]) for role, piece in zip(ROLES, pieces, strict=True)}


def _described(parts: dict[str, tuple[Tensor, Tensor]]) -> Data:
    (x, y), shapes = parts["train"], {role: tuple(x.shape[1:]) for role, (x, _) in parts.items()}
    if len(set(shapes.values())) > 1:
        raise ConfigurationError(f"data: examples differ in shape between splits: {shapes}")
    tokens = not x.is_floating_point()
    if tokens and x.ndim != 2:
        parts = {role: (x.float(), y) for role, (x, y) in parts.items()}
        tokens = False
    inputs = "tokens" if tokens else {4: "image", 3: "sequence"}.get(x.ndim, "vector")
    if y.is_floating_point():
        task = "regression"
        parts = {role: (x, y.reshape(len(y), -1) if y.ndim < 2 else y) for role, (x, y) in parts.items()}
        outputs = parts["train"][1].shape[1]
    else:
        task = "classification" if y.ndim == 1 else "next-token"
        largest = [int(target.max()) for _, target in parts.values()]
        if tokens and task == "next-token":
            largest += [int(x.max()) for x, _ in parts.values()]
        outputs = max(largest) + 1
        if task == "classification" and min(int(target.min()) for _, target in parts.values()) < 0:
            raise ConfigurationError("data: classes are numbered 0, 1, 2, ...; there is a negative one")
    tensors = [tensor for role in ROLES for tensor in parts[role]]
    return Data(
        name="given",
        task=task,
        inputs=inputs,
        **{role: Split(*part) for role, part in parts.items()},
        shape=tuple(x.shape[1:]),
        outputs=outputs,
        labels=None,
        augment=None,
        meta={},
        sha256=sha256_of(*tensors),
    )
