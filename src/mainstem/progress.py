"""What a training run shows: a bar on a terminal, plain lines elsewhere, TensorBoard files on request."""

from __future__ import annotations

import sys
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .errors import ConfigurationError

if TYPE_CHECKING:
    from .fit import Run


class Reporter:
    """Follows one run; a context manager.

    Args:
        run: the run.
        tensorboard: folder for event files, or None.
        progress: True shows progress, False is silent, None shows a bar on a terminal and lines elsewhere.
    """

    def __init__(self, run: Run, tensorboard: Path | None, progress: bool | None):
        self.run, self.shown = run, progress is not False
        self.bar: Any = None
        self.task: Any = None
        self.writer = _writer(tensorboard) if tensorboard else None
        if self.shown and sys.stderr.isatty():
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

            self.bar = Progress(
                TextColumn("{task.description}"),
                BarColumn(),
                TextColumn("{task.percentage:3.0f} %"),
                TextColumn("{task.fields[loss]}"),
                TimeRemainingColumn(),
                console=Console(stderr=True),
            )

    def __enter__(self) -> Reporter:
        if self.bar:
            self.bar.start()
            self.task = self.bar.add_task(self.run.data.name, total=1.0, loss="")
        return self

    def __exit__(self, *error: Any) -> None:
        if self.bar:
            self.bar.stop()
        if self.writer:
            self.writer.close()

    def choice(self, resumed: bool) -> None:
        """Say which layout and precision the run uses, and how they were found."""
        choice = self.run.choice
        text = f"{choice['layout']}, {choice['precision']}, {choice['threads']} threads"
        if resumed:
            text = f"going on at step {self.run.steps}: {text}"
        elif choice.get("measured"):
            timed = ", ".join(f"{name} {1000 * s:.1f} ms" for name, s in choice["measured"].items())
            text += f" (picked by the time of a step: {timed})"
        self._say(text)

    def step(self) -> None:
        """After a look at the loss."""
        if self.bar:
            run = self.run
            mean = run.loss_sum / max(run.loss_count, 1)
            rate = run.steps * run.recipe.batch_size / max(run.seconds, 1e-9)
            metric = f"  {run.metric.name} {run.history[-1]['val_metric']:.4g}" if run.history else ""
            self.bar.update(self.task, completed=run.progress, loss=f"loss {mean:.4f}{metric}  {rate:,.0f}/s")

    def evaluation(self) -> None:
        """After a look at the validation split."""
        last = self.run.history[-1]
        rate = self.run.steps * self.run.recipe.batch_size / max(self.run.seconds, 1e-9)
        if not self.bar:
            self._say(
                f"step {last['step']:.0f} epoch {last['epoch']:.2f}  loss {last['train_loss']:.4f}  "
                f"validation loss {last['val_loss']:.4f} {self.run.metric.name} {last['val_metric']:.4g}  "
                f"{rate:,.0f} examples/s"
            )
        if self.writer:
            for name in ("train_loss", "val_loss", "val_metric", "lr"):
                self.writer.add_scalar(name, last[name], last["step"])

    def _say(self, text: str) -> None:
        if self.shown:
            (self.bar.console.print if self.bar else lambda t: print(t, file=sys.stderr, flush=True))(text)


def _writer(folder: Path) -> Any:
    try:
        from torch.utils.tensorboard import SummaryWriter
    except ImportError:
        raise ConfigurationError("tensorboard: not installed; pip install 'mainstem[tensorboard]'") from None
    return SummaryWriter(str(folder))
