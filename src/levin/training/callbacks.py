"""What happens between iterations, on the clock of the algorithm, which is that of env steps but where none pass.

Lightning calls them in list order at the end of a batch: `Statistics` takes in the rollout, `Budget` decides whether
this is the last iteration, `Throughput` stops its watch, `Evaluation` adds to the row, `Metrics` writes it,
`ProgressBar` shows, then the user's own come, and `Checkpointing` saves. A run that is stopped and continued writes
what an uninterrupted one writes: a stop adds no evaluation and no row. A run that is complete adds both, after its last
checkpoint.
"""

from time import perf_counter
from typing import Any, cast

from lightning import Callback, LightningModule, Trainer

from levin.algorithms.base import Algorithm
from levin.collectors.loader import CollectorLoader
from levin.nn.normalizers import ObservationNormalizer
from levin.training import loggers


class Clock:
    """Rings once for every `every` of what it counts, however far one iteration goes."""

    def __init__(self, every: int) -> None:
        self.every, self.rung = every, 0

    def is_due(self, count: int) -> bool:
        """Whether a multiple of `every` has been passed since it last rang."""
        if count // self.every > self.rung:
            self.rung = count // self.every
            return True
        return False


class Statistics(Callback):
    """Lets the observation normaliser take in a rollout, when the iteration that it was collected for is over."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        normalizer = cast(Algorithm, pl_module).observation_normalizer
        if isinstance(normalizer, ObservationNormalizer):
            normalizer.update(batch["observation"])


class Budget(Callback):
    """Ends the run when it is complete, at the end of an iteration."""

    def __init__(self, total_env_steps: int) -> None:
        self.total_env_steps = total_env_steps
        self.spent = False  # whether the run is complete, or was stopped by something else

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # A run that was killed in its last evaluation has nothing left to do but that.
        self.on_train_batch_end(trainer, pl_module)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if cast(Algorithm, pl_module).finished(self.total_env_steps):
            trainer.should_stop = self.spent = True


class Throughput(Callback):
    """Seconds spent in `training_step`. On a GPU work is queued, and the wait shows where the queue is read."""

    def __init__(self, metrics: "Metrics") -> None:
        self.metrics = metrics

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        row = self.metrics.row
        row["time/iteration"] = row.get("time/iteration", 0.0) + perf_counter() - self.start


class Metrics(Callback):
    """Collects one row of metrics and writes it to every logger each `every` env steps, and at the end of the run."""

    def __init__(self, every: int, budget: Budget) -> None:
        self.every, self.budget = every, budget
        self.clock = Clock(every)
        self.row: dict[str, float] = {}
        self.rows = 0  # written since the run began
        self.last_return: float | None = None
        self.log_seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        algorithm = cast(Algorithm, pl_module)
        self.clock.rung = algorithm.clock // self.every
        self._written = (perf_counter(), algorithm.env_steps, algorithm.updates)
        self._written_at = algorithm.clock
        for logger in trainer.loggers:
            if isinstance(logger, loggers.CSVMetrics):
                logger.truncate(self.rows)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        algorithm = cast(Algorithm, pl_module)
        if self.clock.is_due(algorithm.clock) or "eval/return_mean" in self.row:
            self.write(trainer, algorithm)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        algorithm = cast(Algorithm, pl_module)
        if self.budget.spent and (algorithm.clock > self._written_at or "eval/return_mean" in self.row):
            self.write(trainer, algorithm)

    def write(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Write what has come together since the last row."""
        start = perf_counter()
        loader = cast(CollectorLoader, trainer.train_dataloader)
        wall, env_steps, updates = self._written
        seconds = start - wall
        row = {"env_steps": algorithm.env_steps, "updates": algorithm.updates}
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
        self.rows += 1
        self._written, self._written_at = (start, algorithm.env_steps, algorithm.updates), algorithm.clock
        self.log_seconds = perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row, "rows": self.rows}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.row, self.rows = dict(state_dict["row"]), state_dict["rows"]
