"""The coordinator: validate, tune, train the finals, write the result."""

from __future__ import annotations

import contextlib
import dataclasses
import datetime
import platform
import shlex
import sys
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .. import __version__
from ..errors import ConfigurationError, DamagedFileError, MainstemError
from ..files import write_json
from ..recipe import Budget, Recipe
from .experiment import SHARED, Arm, Experiment
from .plan import Plan, execute
from .progress import Display
from .result import FILE, SCHEMA, assemble, cores, hardware, table
from .runner import ForkServerRunner, InProcessRunner, Job, Key, Runner, closing, pack, start_server

if TYPE_CHECKING:
    import pandas

    from ..data import Data
    from ..metrics import Metric
    from .store import Store

REPORT = "report.html"


def compare(
    arms: Any,
    data: Any,
    *,
    baseline: str | None = None,
    seeds: int | list[int] = 5,
    tune: int = 4,
    budget: str | dict | Budget | None = None,
    metric: Any = None,
    recipe: Recipe | Mapping[str, Any] | None = None,
    space: Mapping[str, Any] | None = None,
    device: str | None = None,
    workers: int | None = None,
    out: str | Path | None = None,
    store: str | None = None,
    progress: bool | None = None,
    dry_run: bool = False,
    **fields: Any,
) -> pandas.DataFrame:
    """Compare networks under one budget, fairly: equal tuning for each, fresh seeds, one look at the test split.

        mainstem.compare(["plain-20", "resnet-20", "resnet-20+connection=rezero+norm=none"], "digits")
        mainstem.compare({"mine": MyNetwork, "resnet": "resnet-20"}, (x, y), budget="steps=500", seeds=3)

    Args:
        arms: a list of names with options (`resnet-20+norm=none+lr=0.05`), mappings of the fields of `Arm`, or arms;
            or a dict of name -> any of these, a callable that returns a module, or a module.
        data: a data set's name, a `Data`, a pair `(x, y)` of arrays (split 60/20/20), or train, validation and test
            data as a triple or a dict of `(x, y)` pairs or loaders; or a function of a seed that returns any of these,
            called with None, or with `data_seeds="redrawn"` for every seed.
        baseline: the arm that the others are compared with; None: the first.
        seeds: the final runs of each arm: how many, or which seeds.
        tune: tuning trials per arm; 0: none.
        budget: of every run: "epochs=10", "steps=N", "seconds=N" or "flops=N".
        metric: a name, or a function `(output, y) -> one value an example`; None: the task's.
        recipe: what all arms share; None: the defaults.
        space: what is tuned, as `{"lr": {"low": 0.01, "high": 1, "log": True}}`; None: the learning rate, a factor of
            ten either side of its default.
        workers: processes; None: as many as there are cores (one on a GPU); 0: this process.
        out: the folder; None: a new one in `runs/`. A comparison that was ended early goes on when it is called again
            with its folder, repeating nothing.
        store: a database's URL for finished runs; None: a SQLite file in the folder.
        progress: True shows a bar, False is silent, None shows a bar on a terminal and plain lines elsewhere.
        dry_run: only say what would run, and about how long it would take.
        fields: further fields of `Experiment`: data_options, data_seeds, target, precision, layout, threads, seed, ...

    Returns:
        A table with one row an arm; `.attrs["result"]` is what `result.json` holds and `.attrs["folder"]` its folder.

    Raises:
        ConfigurationError: before anything runs, for a value that cannot be used.
        MainstemError: the folder is in use, damaged or cannot be written to.
    """
    given = {"budget": budget, "metric": metric, "device": device, **fields}
    if isinstance(recipe, Recipe):
        chosen = {name: getattr(recipe, name) for name in recipe.model_fields_set}
        given |= {name: chosen.pop(name) for name in SHARED if name in chosen and given.get(name) is None}
        recipe = chosen
    experiment = Experiment.parse(
        {
            "arms": arms,
            "data": data,
            "baseline": baseline,
            "seeds": seeds,
            "tune": tune,
            "recipe": dict(recipe or {}),
            "space": dict(space or {}),
            **{name: value for name, value in given.items() if value is not None},
        },
        "compare",
    )
    if dry_run:
        from .estimate import estimate, estimate_table

        return estimate_table(estimate(experiment, workers))
    result, folder = run(experiment, out=out, workers=workers, store=store, progress=progress)
    frame = table(result)
    frame.attrs["folder"] = str(folder)
    return frame


def run(
    experiment: Experiment,
    *,
    out: str | Path | None = None,
    workers: int | None = None,
    store: str | None = None,
    command: str | None = None,
    progress: bool | None = None,
) -> tuple[dict[str, Any], Path]:
    """Run `experiment`, or the rest of it; write `result.json` and `report.html`; return the result and its folder.

    `command` is what the report says would do it again; None: this process's command line. Arguments and errors are
    those of `compare`.
    """
    if workers != 0:
        start_server()  # it imports what workers need while this process does the same
    from .report import write
    from .store import FILE as RUNS
    from .store import Store, locked
    from .worker import run_job

    prepared = prepare(experiment, workers)
    device = prepared.device
    workers = default_workers(device, experiment.threads) if workers is None else workers
    if workers < 0:
        raise ConfigurationError(f"workers: {workers} is negative")
    folder = Path(out) if out is not None else _new_folder()
    with locked(folder), _files_explained(folder):
        if store is None and (folder / FILE).exists() and not (folder / RUNS).exists():
            raise DamagedFileError(f"{folder} holds a {FILE} but no {RUNS} to go on from; choose another folder")
        opened = Store(folder, prepared.fingerprint, store)
        with contextlib.closing(opened), prepared.shared(folder / ".data") as plan:
            display = Display(prepared.metric.unit or prepared.metric.name, progress)
            if any(True for _ in plan.ready(opened.runs)):
                runner = InProcessRunner(run_job) if workers == 0 else ForkServerRunner(workers, run_job)
                _run(plan, opened, runner, display, folder)
            result = {
                "schema": SCHEMA,
                "command": command or shlex.join([Path(sys.argv[0]).name, *sys.argv[1:]]),
                "created": opened.created,
                "versions": prepared.versions,
                "hardware": hardware(device, experiment.threads, workers),
                "data": prepared.about_data,
                "metric": prepared.about_metric,
                **assemble(plan, opened.runs),
            }
        write_json(folder / FILE, result)
        write(result, folder / REPORT)
    return result, folder


def _run(plan: Plan, store: Store, runner: Runner, display: Display, folder: Path) -> None:
    """Run what is left of `plan`; Ctrl-C ends it with a word on how to go on."""

    def finished(key: Key) -> None:
        display.finished(key, store.runs[key], len(store.runs), plan.total(store.runs))

    try:
        with closing(runner), display:
            execute(plan, store, runner, finished)
    except KeyboardInterrupt:
        display.note(
            f"\nStopped. {len(store.runs)} finished runs are kept in {folder}; "
            f"the same command with that folder (--out {folder}) goes on from there."
        )
        raise


@dataclasses.dataclass(frozen=True)
class Prepared:
    """An experiment that has been validated, its layout decided, with its data loaded."""

    experiment: Experiment
    data: dict[int | None, Data]
    metric: Metric
    device: str

    @property
    def first(self) -> Data:
        return next(iter(self.data.values()))

    @property
    def versions(self) -> dict[str, str]:
        import torch

        return {"mainstem": __version__, "torch": torch.__version__, "python": platform.python_version()}

    @property
    def fingerprint(self) -> dict[str, Any]:
        """What has to be equal for a comparison to go on: seeds and settings give the same numbers only then."""
        return {
            "experiment": self.experiment.to_json(),
            "data": {"sha256": {str(seed): data.sha256 for seed, data in self.data.items()}},
            "device": self.device,
            "versions": {name: self.versions[name] for name in ("mainstem", "torch")},
        }

    @property
    def about_data(self) -> dict[str, Any]:
        data = self.first
        sizes = {name: len(getattr(data, name)) for name in ("train", "val", "test")}
        return {"name": data.name, "task": data.task, "sha256": data.sha256, "sizes": sizes}

    @property
    def about_metric(self) -> dict[str, Any]:
        metric = self.metric
        return {"name": metric.name, "unit": metric.unit, "higher_is_better": metric.higher_is_better}

    @contextlib.contextmanager
    def shared(self, folder: Path) -> Iterator[Plan]:
        """The plan, while the data lie in `folder` for workers to map (where they fit into memory)."""
        from .worker import in_memory, write_data

        shared: dict[int | None, Any] = dict(self.data)
        for seed, data in self.data.items():
            if in_memory(data):
                shared[seed] = folder / f"{'data' if seed is None else seed}.safetensors"
                write_data(data, shared[seed])
        yield Plan(self.experiment, self.metric.higher_is_better, shared, self.first.augment, self.device)
        for path in shared.values():
            if isinstance(path, Path):
                path.unlink()
        with contextlib.suppress(OSError):  # there was none, or something else lies in it
            folder.rmdir()


def prepare(experiment: Experiment, workers: int | None = None) -> Prepared:
    """Load the data and build every arm once, so that what cannot run is said before anything does.

    Raises ConfigurationError for a device, data set, metric, network, option, recipe or search range that cannot be
    used, and for an arm that cannot be sent to a worker, unless there are to be none.
    """
    from ..autopick import usable
    from ..data import load
    from ..metrics import metric
    from .given import data_of
    from .worker import run_job

    device = str(usable(experiment.device))
    data: dict[int | None, Data] = {}
    redrawn = experiment.data_seeds == "redrawn"
    for seed in [experiment.tuning_seed, *experiment.final_seeds] if redrawn else [None]:
        if isinstance(experiment.data, str):
            data[seed] = load(experiment.data, seed=seed, target=experiment.target, **experiment.data_options)
        else:
            data[seed] = data_of(experiment.data(seed) if callable(experiment.data) else experiment.data)
    for entry in data.values():
        for role in ("train", *(["val"] if experiment.tune else []), "test"):
            if not len(getattr(entry, role)):
                raise ConfigurationError(f"data: {entry.name} has no {role} examples, which the comparison needs")
    first = next(iter(data.values()))
    if experiment.layout == "auto":
        images = first.inputs == "image" and (device == "cpu" or experiment.precision == "bf16")
        experiment = experiment.model_copy(update={"layout": "channels-last" if images else "contiguous"})
    prepared = Prepared(experiment, data, metric(experiment.metric, first), device)
    for arm in experiment.arms:
        try:
            _check(experiment, arm, first)
        except ConfigurationError as error:
            raise ConfigurationError(f"arm {arm.name}: {error}") from None
        if workers != 0:
            setting = experiment.default(arm)
            job = Job(Key(arm.name, "tune", 0), arm, setting, 0, experiment.recipe_of(arm, setting))
            pack(run_job, dataclasses.replace(job, augment=first.augment))
    return prepared


def _check(experiment: Experiment, arm: Arm, data: Data) -> None:
    """See that the arm's recipe fits the data, and that its network can be built."""
    import torch

    from .. import registry
    from ..fit import loss_function
    from .worker import build

    setting = experiment.default(arm)
    recipe = experiment.recipe_of(arm, setting)
    loss_function(recipe, data)
    for method in recipe.methods:
        if isinstance(method, str | Mapping):
            registry.factory("method", method)()
    if isinstance(arm.network, str):
        try:
            with torch.device("meta"):
                build(arm, data, setting)
        except (TypeError, ValueError) as error:  # an option of the wrong type, or out of range
            raise ConfigurationError(str(error)) from None
        except (NotImplementedError, RuntimeError):  # needs values to be built, so its first run will tell
            pass


def default_workers(device: str, threads: int) -> int:
    """As many workers as the cores carry; one on a GPU."""
    return max(1, cores() // threads) if device == "cpu" else 1


def _new_folder() -> Path:
    stamp = datetime.datetime.now().strftime("%Y-%m-%d-%H%M%S")
    names = (Path("runs") / (stamp if not n else f"{stamp}-{n}") for n in range(1000))
    return next(path for path in names if not path.exists())


@contextlib.contextmanager
def _files_explained(folder: Path) -> Iterator[None]:
    """A full disk or a folder that went away, as an error that says what is kept."""
    try:
        yield
    except OSError as error:
        raise MainstemError(
            f"{error.filename or folder} cannot be written: {error.strerror or error}. Finished runs are kept; "
            f"once this is mended, the same command goes on from there."
        ) from None
