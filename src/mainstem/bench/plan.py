"""What an experiment still has to run, as a function of what has finished."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from .experiment import Arm, Experiment
from .runner import Finished, Job, Key, Runner

if TYPE_CHECKING:
    from .store import Store

Runs = Mapping[Key, Finished]


def first_of_batch(k: int, batch: int) -> int:
    """The number of results that trial `k` may depend on: those of the batches before its own."""
    return k // batch * batch


@dataclass(frozen=True)
class Plan:
    """An experiment with what a job needs besides it.

    Attributes:
        higher_is_better: of the metric.
        data: what a job needs to have the data, by data seed (None: the fixed splits).
        augment: the data's augmentation, if it has one.
        device: where jobs run.
    """

    experiment: Experiment
    higher_is_better: bool = True
    data: Mapping[int | None, Any] = field(default_factory=dict)
    augment: Callable[..., Any] | None = None
    device: str = "cpu"

    def ready(self, runs: Runs, taken: Collection[Key] = ()) -> Iterator[Job]:
        """The jobs, apart from those in `taken`, that have not finished and whose prerequisites have; arm by turn.

        Costs come first and one at a time: a training step is timed while nothing else runs.
        """
        for job in self.costs(runs):
            if job.key not in taken:
                yield job
            return
        waiting = [[key for key in self._waiting(arm, runs) if key not in taken] for arm in self.experiment.arms]
        for turn in itertools.zip_longest(*waiting):
            for arm, key in zip(self.experiment.arms, turn, strict=True):
                if key is not None:
                    yield self.job(arm, key, self._setting(arm, key, runs))

    def costs(self, runs: Runs) -> Iterator[Job]:
        """The jobs that measure what a step of each arm costs, those in `runs` left out."""
        for arm in self.experiment.arms:
            key = Key(arm.name, "cost", 0)
            if key not in runs:
                yield self.job(arm, key, self.experiment.default(arm))

    def _waiting(self, arm: Arm, runs: Runs) -> Iterator[Key]:
        keys: list[Key] = []
        tune, done = self.experiment.tune, self.trials(arm, runs)
        if len(done) < tune:
            batch = self.experiment.tune_batch
            open_ = (k for k in range(tune) if all(i in done for i in range(first_of_batch(k, batch))))
            keys += [Key(arm.name, "tune", k) for k in open_]
        elif self.best(arm, runs) is not None:
            keys += [Key(arm.name, "final", seed) for seed in self.experiment.final_seeds]
        return (key for key in keys if key not in runs)

    def _setting(self, arm: Arm, key: Key, runs: Runs) -> dict[str, Any]:
        if key.kind == "final":
            return self.best(arm, runs) or {}
        from .proposals import propose  # Optuna, which workers do without

        trials = self.trials(arm, runs)
        known = [trials[i] for i in range(first_of_batch(key.number, self.experiment.tune_batch))]
        return propose(
            self.experiment.space_of(arm),
            self.experiment.default(arm),
            key.number,
            [(run.setting, run.outcome.value if run.outcome.status == "ok" else None) for run in known],
            seed=self.experiment.seed,
            arm=arm.name,
            higher_is_better=self.higher_is_better,
        )

    def job(self, arm: Arm, key: Key, setting: dict[str, Any]) -> Job:
        """One run of `arm`."""
        experiment = self.experiment
        seed = key.number if key.kind == "final" else experiment.tuning_seed
        return Job(
            key=key,
            arm=arm,
            setting=setting,
            seed=seed,
            recipe=experiment.recipe_of(arm, setting, seed),
            data=self.data.get(seed if experiment.data_seeds == "redrawn" else None),
            augment=self.augment,
            device=self.device,
        )

    def trials(self, arm: Arm, runs: Runs) -> dict[int, Finished]:
        """The arm's finished tuning trials, by index."""
        return {key.number: run for key, run in runs.items() if key[:2] == (arm.name, "tune")}

    def finals(self, arm: Arm, runs: Runs) -> dict[int, Finished]:
        """The arm's finished final runs, by seed, in the experiment's order."""
        keys = (Key(arm.name, "final", seed) for seed in self.experiment.final_seeds)
        return {key.number: runs[key] for key in keys if key in runs}

    def best(self, arm: Arm, runs: Runs) -> dict[str, Any] | None:
        """The setting that tuning found best, the earlier of equals; None if every trial failed."""
        if self.experiment.tune == 0:
            return self.experiment.default(arm)
        ended = sorted(self.trials(arm, runs).items())
        done = [run for _, run in ended if run.outcome.status == "ok" and run.outcome.value is not None]
        sign = 1 if self.higher_is_better else -1
        return max(done, key=lambda run: sign * (run.outcome.value or 0.0)).setting if done else None

    def total(self, runs: Runs) -> int:
        """How many runs the study has in all, as far as is known."""
        given_up = sum(
            len(self.trials(arm, runs)) == self.experiment.tune and self.best(arm, runs) is None
            for arm in self.experiment.arms
        )
        finals = len(self.experiment.final_seeds)
        return len(self.experiment.arms) * (1 + self.experiment.tune + finals) - given_up * finals


def execute(plan: Plan, store: Store, runner: Runner, finished: Callable[[Key], None] = lambda _: None) -> None:
    """Run whatever `store` lacks; `finished` is called after each run is recorded."""
    submitted: set[Key] = set()

    def submit() -> None:
        for job in plan.ready(store.runs, submitted):
            submitted.add(job.key)
            runner.submit(job)

    submit()
    for job, outcome in runner.results():
        store.add(job.key, job.setting, outcome)
        finished(job.key)
        submit()
