"""What happens between iterations, on the clock of env steps.

Lightning calls them in list order at the end of a batch: `Budget` decides whether this is the last iteration,
`Throughput` stops its watch, `Evaluation` adds to the row, `Metrics` writes it, `Checkpointing` saves and
`ProgressBar` shows.
"""

import sys
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.loggers import WandbLogger
from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeRemainingColumn

from levin import envs
from levin.algorithms.base import Algorithm
from levin.checkpoint import STATE, FolderCheckpointIO, rng_state, set_rng_state
from levin.collectors import CollectorLoader
from levin.envs import EnvConfig
from levin.episodes import evaluate
from levin.hints import NonNegativeInt, PositiveInt
from levin.loggers import CSVMetrics


class Clock:
    """Rings once for every `every` env steps, however far one iteration goes."""

    def __init__(self, every: int) -> None:
        self.every, self.rung = every, 0

    def rings(self, env_steps: int) -> bool:
        """Whether a multiple of `every` has been passed since it last rang."""
        if env_steps // self.every > self.rung:
            self.rung = env_steps // self.every
            return True
        return False


class Budget(Callback):
    """Ends the run at `total_env_steps`, at the end of an iteration."""

    def __init__(self, total_env_steps: int) -> None:
        self.total_env_steps = total_env_steps

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if cast(Algorithm, pl_module).env_steps >= self.total_env_steps:
            trainer.should_stop = True


class Metrics(Callback):
    """Collects one row of metrics and writes it to every logger each `every` env steps."""

    def __init__(self, every: int) -> None:
        self.every = every
        self.clock = Clock(every)
        self.row: dict[str, float] = {}
        self.last_return: float | None = None
        self.log_seconds = 0.0

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        algorithm = cast(Algorithm, pl_module)
        self.clock.rung = algorithm.env_steps // self.every
        self._written = (perf_counter(), algorithm.env_steps, algorithm.updates)
        for logger in trainer.loggers:
            if isinstance(logger, CSVMetrics):
                logger.truncate(algorithm.env_steps)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        algorithm = cast(Algorithm, pl_module)
        if self.clock.rings(algorithm.env_steps) or trainer.should_stop or "eval/return_mean" in self.row:
            self.write(trainer, algorithm)

    def write(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Write what has come together since the last row."""
        start = perf_counter()
        loader = cast(CollectorLoader, trainer.train_dataloader)
        wall, env_steps, updates = self._written
        seconds = start - wall
        row = {"env_steps": algorithm.env_steps, "updates": algorithm.updates}
        row |= {"env_frames": algorithm.env_steps * algorithm.env["action_repeat"]}
        row |= self.row | algorithm.take() | loader.take()
        row["time/update"] = row["time/iteration"] - row["time/sample"]
        del row["time/iteration"]
        row["time/log"] = self.log_seconds
        row["time/env_steps_per_second"] = (algorithm.env_steps - env_steps) / seconds
        row["time/updates_per_second"] = (algorithm.updates - updates) / seconds
        self.last_return = row.get("episode/return", self.last_return)
        for logger in trainer.loggers:
            logger.log_metrics(row, step=algorithm.env_steps)
        self.row = {}
        self._written = (start, algorithm.env_steps, algorithm.updates)
        self.log_seconds = perf_counter() - start

    def state_dict(self) -> dict[str, Any]:
        return {"row": self.row}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.row = dict(state_dict["row"])


class Throughput(Callback):
    """Seconds spent in `training_step`. On a GPU work is queued, and the wait shows where the queue is read."""

    def __init__(self, metrics: Metrics) -> None:
        self.metrics = metrics

    def on_train_batch_start(self, *_: Any) -> None:
        self.start = perf_counter()

    def on_train_batch_end(self, *_: Any) -> None:
        row = self.metrics.row
        row["time/iteration"] = row.get("time/iteration", 0.0) + perf_counter() - self.start


class Evaluation(Callback):
    """Deterministic episodes on envs of their own, with the same seeds every time.

    Args:
        every: Env steps between two evaluations.
        episodes: Episodes of each.
        seed: Of the evaluation's envs; apart from the run's own.
        env: The env of the run. Its statistics are only read.
        metrics: Where the results go.
    """

    def __init__(
        self, *, every: PositiveInt, episodes: PositiveInt, seed: NonNegativeInt, env: EnvConfig, metrics: Metrics
    ) -> None:
        self.episodes, self.seed, self.env, self.metrics = episodes, seed, env, metrics
        self.clock = Clock(every)
        self.return_mean: float | None = None  # of the last evaluation
        self.env_steps = 0  # when it was

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.rung = cast(Algorithm, pl_module).env_steps // self.clock.every
        self.vector_env = envs.make(self.env, seed=self.seed, purpose=envs.EVALUATION, num_envs=min(self.episodes, 10))

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        algorithm = cast(Algorithm, pl_module)
        if trainer.is_global_zero and (self.clock.rings(algorithm.env_steps) or trainer.should_stop):
            start = perf_counter()
            returns, lengths = evaluate(algorithm.policy(deterministic=True), self.vector_env, self.episodes)
            self.return_mean, self.env_steps = float(np.mean(returns)), algorithm.env_steps
            self.metrics.row |= {
                "eval/return_mean": self.return_mean,
                "eval/return_std": float(np.std(returns)),
                "eval/length_mean": float(np.mean(lengths)),
                "time/evaluate": perf_counter() - start,
            }

    def on_train_end(self, *_: Any) -> None:
        self.vector_env.close()

    def state_dict(self) -> dict[str, Any]:
        return {"return_mean": self.return_mean}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.return_mean = state_dict["return_mean"]


class Checkpointing(Callback):
    """Saves `checkpoints/<env_steps>/` at the end of an iteration, and keeps the newest and the best.

    Args:
        every: Env steps between two checkpoints. The last iteration is always saved.
        keep: How many of the newest to keep; the one that evaluated best is kept beside them.
        run: The run folder.
        evaluation: Whose result a checkpoint of the same iteration is judged by.
    """

    def __init__(self, *, every: PositiveInt, keep: PositiveInt, run: Path, evaluation: Evaluation) -> None:
        self.keep, self.folder, self.evaluation = keep, run / "checkpoints", evaluation
        self.clock = Clock(every)
        self.returns: dict[str, float] = {}  # folder name -> its evaluation
        self.saved: int | None = None  # env steps of the newest
        self._rng: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.saved = cast(Algorithm, pl_module).env_steps
        self.clock.rung = self.saved // self.clock.every
        if self._rng is not None:
            set_rng_state(self._rng)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        algorithm = cast(Algorithm, pl_module)
        if self.clock.rings(algorithm.env_steps) or trainer.should_stop:
            self.save(trainer, algorithm)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        # Whoever stopped the run after our turn (`max_time`, a callback) left the last iteration unsaved.
        if self.saved != cast(Algorithm, pl_module).env_steps:
            self.save(trainer, cast(Algorithm, pl_module))

    def save(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Save now, and remove what need not be kept."""
        name = str(algorithm.env_steps)
        if self.evaluation.env_steps == algorithm.env_steps and self.evaluation.return_mean is not None:
            self.returns[name] = self.evaluation.return_mean
        self.saved = algorithm.env_steps
        trainer.save_checkpoint(self.folder / name / STATE)
        if trainer.is_global_zero:
            self._prune()

    def _prune(self) -> None:
        names = sorted((each.name for each in self.folder.iterdir() if each.name.isdigit()), key=int)
        best = max((name for name in names if name in self.returns), key=lambda name: self.returns[name], default=None)
        for name in names[: -self.keep]:
            if name != best:
                FolderCheckpointIO().remove_checkpoint(self.folder / name / STATE)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = rng_state()
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                checkpoint["wandb_id"] = logger.experiment.id

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        # Drawn numbers are taken back last, when everything is built: see `on_train_start`.
        self._rng = checkpoint["rng"]

    def state_dict(self) -> dict[str, Any]:
        return {"returns": dict(self.returns)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.returns = dict(state_dict["returns"])


class ProgressBar(Callback):
    """Env steps done and to go, rates, last return, time left; a line per row of metrics where there is no terminal."""

    def __init__(self, total_env_steps: int, metrics: Metrics) -> None:
        self.total, self.metrics = total_env_steps, metrics
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
        rates = f"{steps_rate:,.0f} steps/s · {updates_rate:,.0f} updates/s{last}"
        self.seen = (now, algorithm.env_steps, algorithm.updates)
        self.bar.update(self.task, completed=algorithm.env_steps, rates=rates)
        if self.bar.disable:
            print(f"{algorithm.env_steps:,}/{self.total:,} env steps · {rates}", flush=True)

    def on_train_end(self, *_: Any) -> None:
        self.bar.stop()

    def on_exception(self, *_: Any) -> None:
        self.bar.stop()
