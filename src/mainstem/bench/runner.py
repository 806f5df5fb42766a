"""Where jobs run: one process each from a fork server, or this process.

A runner takes jobs and gives back an outcome for each, whatever became of it: a job that raised, or whose process was
killed, is an outcome too. It knows nothing of tuning, arms or stores, so that another one can take its place.
"""

from __future__ import annotations

import collections
import functools
import multiprocessing
import os
import pickle
import signal
import sys
import threading
import traceback
import types
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from multiprocessing import forkserver
from multiprocessing.connection import Connection, wait
from multiprocessing.context import ForkServerContext
from multiprocessing.process import BaseProcess
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import cloudpickle

from .. import registry
from ..errors import ConfigurationError, DivergedError

# What workers find imported: what every job needs (optimisers import torch._dynamo), and what most networks need.
PRELOAD = ("mainstem.bench.worker", "torch._dynamo", "mainstem.nn.stages")
PATIENCE = 5.0  # seconds that a worker has to end after it sent its outcome


class Key(NamedTuple):
    """Which run of a study: `kind` is "cost", "tune" or "final"; `number` the trial's index or the final's seed."""

    arm: str
    kind: str
    number: int


@dataclass(frozen=True)
class Job:
    """One run: everything that a worker needs to know.

    `setting` is what tuning proposed; `recipe` is complete, with that setting in it; `data` is a file that
    `mainstem.bench.worker.write_data` wrote (with `augment`, which a file cannot hold), or a `Data`.
    """

    key: Key
    arm: Any
    setting: dict[str, Any]
    seed: int
    recipe: Any = None
    data: Any = None
    augment: Callable[..., Any] | None = None
    device: str = "cpu"


@dataclass(frozen=True)
class Outcome:
    """What became of a job. `status` is "ok", "diverged", "error" or "lost"; `reason` says why it is not "ok".

    `value` is the metric and `scores` its value per example (float32 bytes), on the validation split for a tuning
    trial and on the test split for a final run; `curve` is the history of `fit`; `cost` is a cost job's answer.
    """

    status: str = "ok"
    reason: str | None = None
    value: float | None = None
    loss: float | None = None
    steps: int = 0
    seconds: float = 0.0
    curve: list[dict[str, Any]] = field(default_factory=list)
    scores: bytes | None = None
    cost: dict[str, Any] | None = None


class Finished(NamedTuple):
    """A finished run: the setting that it had, and what became of it."""

    setting: dict[str, Any]
    outcome: Outcome


Run = Callable[[Job], Outcome]


class Runner(Protocol):
    """Runs jobs, some at a time. Jobs may be submitted while `results` is being read."""

    workers: int

    def submit(self, job: Job) -> None:
        """Take a job. Raises ConfigurationError if it cannot be sent to where it would run."""

    def results(self) -> Iterator[tuple[Job, Outcome]]:
        """Every job with its outcome, as they finish, until none is left."""

    def close(self) -> None:
        """End what is still running."""


def attempt(work: Callable[[], Outcome]) -> Outcome:
    """What `work` returns; if it raises, an outcome with the reason."""
    try:
        return work()
    except DivergedError as error:
        return Outcome("diverged", str(error), steps=error.step)
    except Exception as error:  # whatever a user's network raises is that arm's result, not the end of the others
        return Outcome("error", explain(error))


def explain(error: BaseException) -> str:
    """What was raised, and the last two lines of the caller's own code on the way there."""
    every = [frame for frame in traceback.extract_tb(error.__traceback__) if frame.filename != __file__]
    frames = [frame for frame in every if "site-packages" not in frame.filename] or every
    where = [f"{Path(f.filename).name}:{f.lineno} in {f.name}: {f.line}" for f in frames[-2:]]
    return "\n".join(["".join(traceback.format_exception_only(error)).strip(), *where])


class InProcessRunner:
    """Runs jobs here, one after another, when `results` asks for them."""

    workers = 0

    def __init__(self, run: Run):
        self._run, self._queue = run, collections.deque[Job]()

    def submit(self, job: Job) -> None:
        self._queue.append(job)

    def results(self) -> Iterator[tuple[Job, Outcome]]:
        while self._queue:
            job = self._queue.popleft()
            yield job, attempt(functools.partial(self._run, job))

    def close(self) -> None:
        self._queue.clear()


def start_server(preload: Sequence[str] = PRELOAD) -> ForkServerContext:
    """Start the server that workers fork from; it imports `preload` while the caller goes on. Once is enough."""
    context = multiprocessing.get_context("forkserver")
    context.set_forkserver_preload(list(preload))
    forkserver.ensure_running()
    return context


class ForkServerRunner:
    """Runs up to `workers` jobs at once, each in a process of its own, forked from a server that imported `preload`.

    A process costs some 0.04 s, and whatever kills it costs one job. Workers end when this process does, however it
    ends. Functions and classes of the caller's script travel by value, so that the script is not imported again and
    needs no `if __name__ == "__main__":`.
    """

    def __init__(self, workers: int, run: Run, preload: Sequence[str] = PRELOAD):
        self.workers = workers
        self._run = run
        self._context = start_server(preload)
        self._queue: collections.deque[tuple[Job, bytes]] = collections.deque()
        self._running: dict[Connection, tuple[Job, BaseProcess]] = {}

    def submit(self, job: Job) -> None:
        self._queue.append((job, pack(self._run, job)))

    def results(self) -> Iterator[tuple[Job, Outcome]]:
        while self._queue or self._running:
            while self._queue and len(self._running) < self.workers:
                self._start(*self._queue.popleft())
            ready = wait([end for c, (_, process) in self._running.items() for end in (c, process.sentinel)])
            for connection, (job, process) in list(self._running.items()):
                if connection in ready or process.sentinel in ready:
                    del self._running[connection]
                    yield job, _receive(connection, process)

    def close(self) -> None:
        self._queue.clear()
        for connection, (_, process) in self._running.items():
            process.kill()
            process.join()
            connection.close()
        self._running.clear()

    def _start(self, job: Job, payload: bytes) -> None:
        ours, theirs = self._context.Pipe(duplex=False)
        process = self._context.Process(target=_work, args=(theirs, payload), daemon=True)
        with theirs, _another_main():
            process.start()
        self._running[ours] = (job, process)


def pack(run: Run, job: Job) -> bytes:
    """A job as bytes, with the parts that were registered outside of mainstem."""
    try:
        return cloudpickle.dumps((registry.own(), run, job))
    except (pickle.PicklingError, TypeError, AttributeError, ValueError) as error:
        raise ConfigurationError(
            f"arm {job.key.arm}: it cannot be sent to a worker process ({error}); give a function that builds the "
            f"module instead of holding open files, locks or generators, or run in this process with workers=0"
        ) from None


def _receive(connection: Connection, process: BaseProcess) -> Outcome:
    """What a worker sent before it ended, or that it ended without."""
    with connection:
        try:
            outcome = pickle.loads(connection.recv_bytes()) if connection.poll() else None
        except (EOFError, OSError):  # ended before or while sending
            outcome = None
    process.join(timeout=PATIENCE)
    if process.is_alive():  # a thread of the job's own keeps it from ending
        process.kill()
        process.join()
    if outcome is not None:
        return outcome
    code = process.exitcode or 0
    ended = f"was killed by {signal.Signals(-code).name}" if code < 0 else f"ended with exit status {code}"
    hint = "; was there enough memory?" if code == -signal.SIGKILL else ""
    return Outcome("lost", f"the worker process {ended} before it finished{hint}")


@contextmanager
def _another_main() -> Iterator[None]:
    """Processes started here do not import the caller's script again, which they have no need of."""
    main = sys.modules["__main__"]
    sys.modules["__main__"] = types.ModuleType("__main__")
    try:
        yield
    finally:
        sys.modules["__main__"] = main


def _work(connection: Connection, payload: bytes) -> None:
    """The life of a worker process."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the coordinator's to handle
    threading.Thread(target=_end_with_parent, daemon=True).start()
    connection.send_bytes(pickle.dumps(attempt(functools.partial(_unpack_and_run, payload))))
    connection.close()


def _unpack_and_run(payload: bytes) -> Outcome:
    parts, run, job = pickle.loads(payload)
    registry.adopt(parts)
    return run(job)


def _end_with_parent() -> None:
    parent = multiprocessing.parent_process()
    assert parent is not None
    wait([parent.sentinel])
    os._exit(1)


@contextmanager
def closing(runner: Runner) -> Iterator[Runner]:
    """`runner`, closed at the end of a `with` block."""
    try:
        yield runner
    finally:
        runner.close()
