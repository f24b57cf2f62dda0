"""The progress bar."""

import sys
from pathlib import Path
from time import perf_counter
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from levin.algorithms.base import Algorithm
from levin.core.process import print_line
from levin.training.callbacks import Budget, Metrics


class ProgressBar(Callback):
    """Env steps done and to go, rates, last return, time left; a line per row of metrics where there is no terminal."""

    def __init__(self, run: Path, budget: Budget, metrics: Metrics) -> None:
        self.run, self.budget, self.total, self.metrics = run, budget, budget.total_env_steps, metrics
        self.bar = Progress(
            TextColumn("{task.completed:,.0f}/{task.total:,.0f} env steps"),
            BarColumn(),
            TextColumn("{task.fields[rates]}"),
            TimeRemainingColumn(),
            disable=not sys.stdout.isatty(),
        )
        self.task: TaskID | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        env_steps = cast(Algorithm, pl_module).env_steps
        self.seen = (perf_counter(), env_steps, cast(Algorithm, pl_module).updates)
        if trainer.is_global_zero:
            self.task = self.bar.add_task("", total=self.total, completed=env_steps, rates="")
            self.bar.start()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        algorithm, now = cast(Algorithm, pl_module), perf_counter()
        wall, env_steps, updates = self.seen
        period = 0.5 if sys.stdout.isatty() else 10.0
        if self.task is None or (now - wall < period and not trainer.should_stop):
            return
        last = "" if self.metrics.last_return is None else f" · return {self.metrics.last_return:.1f}"
        steps_rate, updates_rate = (
            (algorithm.env_steps - env_steps) / (now - wall),
            (algorithm.updates - updates) / (now - wall),
        )
        rates = f"{steps_rate:,.0f} steps/s · {updates_rate:,.0f} updates/s{last}{algorithm.status}"
        self.seen = (now, algorithm.env_steps, algorithm.updates)
        self.bar.update(self.task, completed=algorithm.env_steps, rates=rates)
        if self.bar.disable:
            print_line(f"{algorithm.env_steps:,}/{self.total:,} env steps · {rates}")

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.bar.stop()
        if trainer.is_global_zero and not self.budget.spent:
            env_steps = cast(Algorithm, pl_module).env_steps
            at = f"stopped and saved at {env_steps} of {self.total} env steps"
            print_line(f"{at}; to go on: make resume RUN={self.run}")

    def on_exception(self, *_: Any) -> None:
        self.bar.stop()
