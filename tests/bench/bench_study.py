"""What the coordinator does, on jobs that need no training; a script, so that it can be killed."""

from __future__ import annotations

import sys
from pathlib import Path

from bench_jobs import ARMS, run

from mainstem.bench.experiment import Experiment
from mainstem.bench.plan import Plan, execute
from mainstem.bench.result import assemble
from mainstem.bench.runner import ForkServerRunner, InProcessRunner, closing
from mainstem.bench.store import Store, locked

PRELOAD = ["mainstem.bench.runner", "numpy"]


def experiment(**changes) -> Experiment:
    return Experiment.parse({"arms": ARMS, "data": "none", "seeds": 3, "tune": 5, "tune_batch": 2, **changes})


def timeless(value):
    """A result without what differs between two runs of the same thing."""
    if isinstance(value, dict):
        return {k: timeless(v) for k, v in value.items() if k not in ("seconds", "step_seconds")}
    return [timeless(v) for v in value] if isinstance(value, list) else value


def study(folder: Path, workers: int, **changes) -> dict:
    """What the coordinator does, without data and torch; the result without timings."""
    plan = Plan(experiment(**changes))
    with locked(folder):
        store = Store(folder, {"experiment": plan.experiment.to_json()})
        print("ready", flush=True)
        runner = InProcessRunner(run) if workers == 0 else ForkServerRunner(workers, run, PRELOAD)
        with closing(runner):
            execute(plan, store, runner)
        store.close()
        return timeless(assemble(plan, store.runs))


if __name__ == "__main__":
    study(Path(sys.argv[1]), int(sys.argv[2]))
