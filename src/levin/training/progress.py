"""Progress bar of a training run."""

import sys
from time import perf_counter
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn

from levin.algorithms.base import Algorithm
from levin.core.process import output_may_end, print_line
from levin.training.callbacks import Metrics


class ProgressBar(Callback):
    """Shows env steps, rates, the training return of the last row of metrics, and the time elapsed and left.

    Without a terminal, or with `bar=False`, it prints a line every 10 seconds.
    """

    def __init__(self, total_env_steps: int, metrics: Metrics, *, bar: bool = True) -> None:
        self.total, self.metrics = total_env_steps, metrics
        self.bar = Progress(
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} env steps"),
            BarColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeElapsedColumn(),
            TextColumn("elapsed,"),
            TimeRemainingColumn(),
            TextColumn("left"),
            disable=not (bar and sys.stdout.isatty()),
        )
        self.task: TaskID | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        env_steps = cast(Algorithm, pl_module).env_steps
        self._last_shown = (perf_counter(), env_steps, cast(Algorithm, pl_module).updates)
        if trainer.is_global_zero:
            self.task = self.bar.add_task("", total=self.total, completed=env_steps, rates="")
            self.bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        algorithm, now = cast(Algorithm, pl_module), perf_counter()
        last_time, env_steps, updates = self._last_shown
        period = 10.0 if self.bar.disable else 0.5
        if self.task is None or (now - last_time < period and not trainer.should_stop):
            return
        last = "" if self.metrics.last_return is None else f" · episode/return {self.metrics.last_return:.1f}"
        steps_rate, updates_rate = (
            (algorithm.env_steps - env_steps) / (now - last_time),
            (algorithm.updates - updates) / (now - last_time),
        )
        rates = f"{steps_rate:,.0f} steps/s · {updates_rate:,.0f} updates/s{last}{algorithm.status}"
        self._last_shown = (now, algorithm.env_steps, algorithm.updates)
        self.bar.update(self.task, completed=algorithm.env_steps, rates=rates)
        if self.bar.disable:
            print_line(f"{algorithm.env_steps:,}/{self.total:,} env steps · {rates}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self._stop()

    def on_exception(self, *_: Any) -> None:
        self._stop()

    def _stop(self) -> None:
        with output_may_end():
            self.bar.stop()
