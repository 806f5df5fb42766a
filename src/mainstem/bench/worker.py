"""What a worker does: build an arm's network, train it, measure it."""

from __future__ import annotations

import contextlib
import copy
import dataclasses
import functools
import json
import math
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.numpy import save_file
from safetensors.torch import load_file
from torch import nn

from ..data import Data, Split
from ..data.core import ROLES
from ..errors import ConfigurationError, MainstemError
from ..files import replacing
from ..fit import evaluate, fit
from ..network import network_for
from ..pairing import paired
from ..recipe import Budget, Recipe
from . import cost
from .experiment import Arm
from .runner import Job, Outcome


def run_job(job: Job) -> Outcome:
    """Train and measure, on the validation split for a tuning trial and on the test split for a final run; or, for a
    cost job, measure what a training step costs.

    Raises whatever the network, the recipe or the data raise; DivergedError where the loss or the metric is not finite.
    """
    with _threads(job.recipe.threads):
        data = read_data(job.data, job.augment) if isinstance(job.data, Path) else job.data
        network = paired(functools.partial(build, job.arm, data, job.setting), job.seed)
        own = copy.deepcopy(job.recipe)  # its methods may have a state
        if job.key.kind == "cost":
            return Outcome(cost=cost.measure(network, data, own, job.device))
        recipe = in_steps(own, network, data)
        run = fit(network, data, recipe, device=job.device, progress=False)
        split = data.val if job.key.kind == "tune" else data.test
        found = evaluate(run.network, split, data, recipe, device=job.device, precision=run.choice["precision"])
    outcome = Outcome(
        value=float(found.metric),
        loss=float(found.loss),
        steps=run.steps,
        seconds=run.seconds,
        curve=[dict(entry) for entry in run.history],
        scores=None if found.scores is None else found.scores.astype("<f4").tobytes(),
    )
    if math.isfinite(found.metric):
        return outcome
    return dataclasses.replace(outcome, status="diverged", reason=f"the metric is {found.metric}", value=None)


def build(arm: Arm, data: Data, setting: Mapping[str, Any] | None = None) -> nn.Module:
    """The arm's network for `data`, with the network options of a tuned setting.

    Raises ConfigurationError if it is not what `mainstem.network` knows, or a callable does not return a module.
    """
    tuned = {key: value for key, value in (setting or {}).items() if key not in Recipe.model_fields}
    options = {**arm.overrides, **tuned}
    if isinstance(arm.network, str):
        return network_for(arm.network, data, **options)
    if isinstance(arm.network, nn.Module):
        return copy.deepcopy(arm.network)
    module = arm.network(**options)
    if not isinstance(module, nn.Module):
        raise ConfigurationError(f"arm {arm.name}: its callable returned {type(module).__name__}, not a torch module")
    return module


def in_steps(recipe: Recipe, network: nn.Module, data: Data) -> Recipe:
    """`recipe`, a budget in FLOPs turned into steps (a backward pass counting as two forward ones)."""
    if recipe.budget.unit != "flops":
        return recipe
    forward = cost.flops(network, torch.as_tensor(data.train.x[0])[None])
    if forward is None:
        raise ConfigurationError("budget: this network's FLOPs cannot be counted; give steps, epochs or seconds")
    steps = round(recipe.budget.amount / (3 * forward * min(recipe.batch_size, len(data.train))))
    return recipe.but(budget=Budget(steps=max(1, steps)))


def in_memory(data: Data) -> bool:
    """Whether all of `data` is tensors, which can be shared as a file."""
    return all(isinstance(getattr(data, role).x, torch.Tensor) for role in ROLES)


def write_data(data: Data, path: Path) -> None:
    """Write the tensors of `data` to a file that workers map into memory; all but its augmentation."""
    splits = {role: getattr(data, role) for role in ROLES}
    arrays = {f"{role}.{name}": getattr(s, name).contiguous().numpy() for role, s in splits.items() for name in "xy"}
    fields = {f.name: getattr(data, f.name) for f in dataclasses.fields(data) if f.name not in (*ROLES, "augment")}
    try:
        with replacing(path) as temporary:
            save_file(arrays, temporary, {"data": json.dumps(fields)})
    except SafetensorError as error:
        raise MainstemError(f"{path} cannot be written: {error}") from None


def read_data(path: Path, augment: Any = None) -> Data:
    """What `write_data` wrote, without copying it into memory."""
    with safe_open(path, "pt") as opened:
        fields = json.loads(opened.metadata()["data"])
    tensors = load_file(path)
    splits = {role: Split(tensors[f"{role}.x"], tensors[f"{role}.y"]) for role in ROLES}
    return Data(**{**fields, "shape": tuple(fields["shape"]), **splits, "augment": augment})


@contextlib.contextmanager
def _threads(count: int | None) -> Iterator[None]:
    before = torch.get_num_threads()
    if count is not None:
        torch.set_num_threads(count)
    try:
        yield
    finally:
        torch.set_num_threads(before)
