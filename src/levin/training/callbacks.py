"""Trainer callbacks that run after each iteration, scheduled by `Algorithm.clock`.

The clock counts env steps, plus updates or dream episodes in stages without env steps. Lightning calls the callbacks in
list order at the end of an iteration: `Statistics` updates the running statistics, `Budget` decides whether this was
the last iteration, those of `guards.py` stop the run on a signal, NaN or inf, `Throughput` records the time,
`Evaluation` adds its results to the row of metrics, the user's own callbacks run, `Metrics` writes the row,
`ProgressBar` shows the progress, and `Checkpointing` saves.

A run that is stopped and continued writes the same rows as an uninterrupted one, because a stop adds no evaluation and
no row. A complete run adds at most one of each, after its last checkpoint.
"""

from time import perf_counter
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer

from levin.algorithms.base import Algorithm
from levin.collectors.loader import CollectorLoader
from levin.nn.normalizers import ObservationNormalizer, VectorNormalizer
from levin.training import loggers


class Clock:
    """Schedule of an action that is due once per `every` clock units; several units may pass in one iteration."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.periods = 0  # number of whole periods of `every` that have passed

    def is_due(self, count: int) -> bool:
        """Return whether the count has passed a multiple of `every` since the action was last due."""
        if count // self.every > self.periods:
            self.periods = count // self.every
            return True
        return False


class Statistics(Callback):
    """Updates the observation normaliser with a rollout, after the iteration that trained on it."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        normalizer = cast(Algorithm, pl_module).observation_normalizer
        if isinstance(normalizer, ObservationNormalizer | VectorNormalizer):
            normalizer.update(batch["observation"])


class Budget(Callback):
    """Stops the run at the end of the iteration that completes it."""

    def __init__(self, total_env_steps: int) -> None:
        self.total_env_steps = total_env_steps
        self.complete = False  # stays false if a signal or `max_time` stops the run before its end

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that was killed in its last evaluation has all its env steps: it is only evaluated.
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if cast(Algorithm, pl_module).finished(self.total_env_steps):
            trainer.should_stop = self.complete = True


class Throughput(Callback):
    """Measures the seconds of an iteration without collecting: updates, running statistics, and the check for NaN.

    GPU work is asynchronous: its time is counted where the CPU waits for a result.
    """

    def __init__(self, metrics: "Metrics") -> None:
        self.metrics = metrics

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        row = self.metrics.row
        row["time/iteration"] = row.get("time/iteration", 0.0) + perf_counter() - self.start


class Metrics(Callback):
    """Collects a row of metrics, and writes it to every logger each `every` env steps, which `Algorithm.clock` counts.

    It also writes one after each evaluation, and at the end of the run.
    """

    def __init__(self, every: int, budget: Budget) -> None:
        self.budget = budget
        self.clock = Clock(every)
        self.row: dict[str, float] = {}
        self.csv: loggers.CSVMetrics | None = None  # None on other ranks than 0
        self.waits = False  # whether the row waits for an evaluation that a signal has ended
        self.last_return: float | None = None
        self.log_seconds = 0.0

    def setup(self, trainer: Trainer, *_: Any, **__: Any) -> None:
        self.csv = next((each for each in trainer.loggers if isinstance(each, loggers.CSVMetrics)), None)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        algorithm = cast(Algorithm, pl_module)
        self.clock.periods = algorithm.clock // self.clock.every
        self._last_write = (perf_counter(), algorithm.env_steps, algorithm.updates)
        self._last_write_clock = algorithm.clock

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        algorithm = cast(Algorithm, pl_module)
        if not self.waits and (self.clock.is_due(algorithm.clock) or "eval/return_mean" in self.row):
            self.write(trainer, algorithm)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        algorithm = cast(Algorithm, pl_module)
        if self.budget.complete and (algorithm.clock > self._last_write_clock or "eval/return_mean" in self.row):
            self.write(trainer, algorithm)

    def write(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Write one row: the metrics collected since the last row, and the throughput."""
        start = perf_counter()
        loader = cast(CollectorLoader, trainer.train_dataloader)
        last_time, env_steps, updates = self._last_write
        seconds = start - last_time
        row = {**algorithm.pop_logged(), "env_steps": algorithm.env_steps, "updates": algorithm.updates}
        row |= {"env_frames": algorithm.env_steps * algorithm.env["action_repeat"]}
        if algorithm.dream_steps:
            row["dream_steps"] = algorithm.dream_steps
        row |= self.row | algorithm.pop_metrics() | loader.pop_metrics()
        if "time/iteration" in row:
            row["time/update"] = row.pop("time/iteration") - row["time/sample"]
        row["time/log"] = self.log_seconds
        row["time/env_steps_per_second"] = (algorithm.env_steps - env_steps) / seconds
        row["time/updates_per_second"] = (algorithm.updates - updates) / seconds
        self.last_return = row.get("episode/return", self.last_return)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=algorithm.clock)
        self.row = {}
        self._last_write, self._last_write_clock = (start, algorithm.env_steps, algorithm.updates), algorithm.clock
        self.log_seconds = perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        state = {"row": self.row, "rows": self.csv.count if self.csv else 0}
        return {**state, "waits": True} if self.waits else state

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.row = dict(state_dict["row"])
        if self.csv is not None:
            self.csv.truncate(state_dict["rows"])
        self.waits = state_dict.get("waits", False)
