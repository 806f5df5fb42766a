"""What a comparison found, as the JSON of `result.json` and as a table."""

from __future__ import annotations

import os
import platform
from pathlib import Path
from typing import TYPE_CHECKING, Any

import numpy as np

from ..errors import DamagedFileError
from ..files import read_json
from .experiment import Arm
from .plan import Plan, Runs
from .runner import Finished, Key

if TYPE_CHECKING:
    import pandas

SCHEMA = 1
FILE = "result.json"
COSTS = ("parameters", "flops", "step_seconds", "peak_bytes")


def assemble(plan: Plan, runs: Runs) -> dict[str, Any]:
    """The part of the result that follows from the experiment and its finished runs."""
    from .statistics import summarise  # SciPy, which workers do without

    experiment = plan.experiment
    finals = {arm.name: _scored(plan.finals(arm, runs)) for arm in experiment.arms}
    summary = summarise(
        finals, experiment.baseline_name, plan.higher_is_better, crossed=experiment.data_seeds == "fixed"
    )
    arms = [{**_arm(plan, arm, runs), **summary[arm.name]} for arm in experiment.arms]
    return {
        "experiment": experiment.to_json(),
        "baseline": experiment.baseline_name,
        "arms": arms,
        "notes": [note for arm, entry in zip(experiment.arms, arms, strict=True) for note in _notes(plan, arm, entry)],
    }


def _scored(finals: dict[int, Finished]) -> list[dict[str, Any]]:
    return [
        {
            "seed": seed,
            "value": run.outcome.value if run.outcome.status == "ok" else None,
            "scores": None if run.outcome.scores is None else np.frombuffer(run.outcome.scores, "<f4"),
        }
        for seed, run in finals.items()
    ]


def _arm(plan: Plan, arm: Arm, runs: Runs) -> dict[str, Any]:
    trials = sorted(plan.trials(arm, runs).items())
    finals = plan.finals(arm, runs)
    ended = [run.outcome for run in finals.values()] or [run.outcome for _, run in trials]
    failed = [outcome for outcome in ended if outcome.status != "ok"]
    good = sum(run.outcome.status == "ok" for run in finals.values())
    cost = runs[Key(arm.name, "cost", 0)].outcome.cost or {}
    return {
        "name": arm.name,
        "description": arm.description,
        "status": "failed" if not good else "partial" if failed else "ok",
        "reason": failed[0].reason if failed else None,
        "setting": plan.best(arm, runs),
        "trials": [
            {"k": k, "setting": run.setting, **_fields(run, "status", "reason", "value", "seconds")}
            for k, run in trials
        ],
        "finals": [
            {"seed": seed, **_fields(run, "status", "reason", "value", "loss", "steps", "seconds", "curve")}
            for seed, run in finals.items()
        ],
        "cost": {name: cost.get(name) for name in COSTS},
    }


def _fields(run: Finished, *names: str) -> dict[str, Any]:
    return {name: getattr(run.outcome, name) for name in names}


def _notes(plan: Plan, arm: Arm, entry: dict[str, Any]) -> list[str]:
    """What a reader has to know before believing the arm's numbers."""
    notes = []
    total, good = len(entry["finals"]), sum(run["status"] == "ok" for run in entry["finals"])
    if entry["status"] == "partial":
        notes.append(
            f"{arm.name}: {total - good} of {total} final runs failed; its mean is over the {good} that did not."
        )
    if entry["status"] == "failed" and not total:
        notes.append(f"{arm.name}: every tuning trial failed, so it has no final runs.")
    tried = [trial["setting"] for trial in entry["trials"] if trial["status"] == "ok"]
    for key, value in (entry["setting"] or {}).items():
        numbers = {setting[key] for setting in tried if isinstance(setting[key], int | float)}
        if len(numbers) > 2 and value in (min(numbers), max(numbers)):
            end = "smallest" if value == min(numbers) else "largest"
            notes.append(
                f"{arm.name}: the best {key} is the {end} that finished ({value:.3g}); a wider range may do better."
            )
    return notes


def hardware(device: str, threads: int, workers: int) -> dict[str, Any]:
    """What the comparison ran on."""
    return {
        "cpu": _cpu(),
        "cores": cores(),
        "device": _device(device),
        "threads": threads,
        "workers": workers,
    }


def cores() -> int:
    """The cores that this process may use."""
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:  # not Linux
        return platform.processor() or platform.machine()
    names = (line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    return next(names, platform.machine())


def _device(device: str) -> str:
    if not device.startswith("cuda"):
        return device
    import torch

    return f"{device} ({torch.cuda.get_device_name(device)})"


def table(result: dict[str, Any]) -> pandas.DataFrame:
    """One row an arm: its value, interval, difference to the baseline, verdict and cost."""
    import pandas

    rows = []
    for arm in result["arms"]:
        difference = arm["difference"] or {}
        rows.append(
            {
                "arm": arm["name"],
                "value": arm["mean"],
                "low": arm["low"],
                "high": arm["high"],
                "difference": difference.get("mean"),
                "difference_low": difference.get("low"),
                "difference_high": difference.get("high"),
                "p": difference.get("p_holm"),
                "verdict": difference.get("verdict"),
                "status": arm["status"],
                **arm["cost"],
            }
        )
    frame = pandas.DataFrame(rows).set_index("arm")
    frame.attrs["result"] = result
    return frame


def read_result(path: str | Path) -> dict[str, Any]:
    """A comparison's result from its folder or its `result.json`.

    Raises DamagedFileError, naming the file, if it is truncated or is not a result.
    """
    path = Path(path)
    path = path / FILE if path.is_dir() else path
    result = read_json(path)
    if not isinstance(result, dict) or result.get("schema") != SCHEMA or "arms" not in result:
        raise DamagedFileError(f"{path} is not the result of a comparison (schema {SCHEMA})")
    return result
