"""Shows a comparison as it goes on: a bar on a terminal, a line for every finished run elsewhere."""

from __future__ import annotations

import sys
from types import TracebackType
from typing import Any

from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from .runner import Finished, Key


class Display:
    """`shown` is True, False, or None for a bar only where standard error is a terminal."""

    def __init__(self, unit: str = "", shown: bool | None = None):
        self._unit = unit
        self._silent = shown is False
        console = Console(stderr=True)
        self._bar: Progress | None = None
        if not self._silent and (console.is_terminal or shown):
            self._bar = Progress(
                TextColumn("{task.description}", markup=False),
                BarColumn(),
                MofNCompleteColumn(),
                TimeElapsedColumn(),
                TimeRemainingColumn(),
                console=console,
                transient=True,
            )
        self._task: Any = None

    def __enter__(self) -> Display:
        if self._bar is not None:
            self._bar.start()
            self._task = self._bar.add_task("starting", total=None)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if self._bar is not None:
            self._bar.stop()

    def finished(self, key: Key, run: Finished, done: int, total: int) -> None:
        """A run has ended, the `done`-th of `total`."""
        if self._silent:
            return
        line = self._line(key, run)
        if self._bar is None:
            print(f"[{done}/{total}] {line}", file=sys.stderr, flush=True)
            return
        self._bar.update(self._task, completed=done, total=total, description=line[:60])
        if run.outcome.status != "ok":
            self._bar.console.print(line, style="yellow", markup=False, highlight=False)

    def note(self, text: str) -> None:
        """Say something in a line of its own."""
        if not self._silent:
            print(text, file=sys.stderr, flush=True)

    def _line(self, key: Key, run: Finished) -> str:
        if key.kind == "cost":
            return f"{key.arm}: cost" + (f": {run.outcome.reason.splitlines()[0]}" if run.outcome.reason else "")
        setting = " ".join(f"{name}={_short(value)}" for name, value in run.setting.items())
        what = f"{key.arm}: " + (f"trial {key.number} {setting}" if key.kind == "tune" else f"seed {key.number}")
        if run.outcome.status != "ok" or run.outcome.value is None:
            reason = (run.outcome.reason or "no value").splitlines()[0]
            return f"{what}: {run.outcome.status}: {reason}"
        return f"{what}: {run.outcome.value:.4g} {self._unit} in {run.outcome.seconds:.1f} s"


def _short(value: Any) -> str:
    return f"{value:.3g}" if isinstance(value, float) else str(value)
