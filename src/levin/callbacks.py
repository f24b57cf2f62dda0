"""What happens between iterations, on the clock of the algorithm, which is that of env steps but where none pass.

Lightning calls them in list order at the end of a batch: `Statistics` takes in the rollout, `Budget` decides whether
this is the last iteration, `Throughput` stops its watch, `Evaluation` adds to the row, `Metrics` writes it,
`ProgressBar` shows, then the user's own come, and `Checkpointing` saves. A run that is stopped and continued writes
what an uninterrupted one writes: a stop adds no evaluation and no row. A run that is complete adds both, after its last
checkpoint.
"""

from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
from lightning import Callback, LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning.pytorch.loggers import WandbLogger

from levin import checkpoint, envs, loggers, ranks
from levin.algorithms.base import Algorithm
from levin.checkpoint import STATE
from levin.envs import EnvConfig
from levin.episodes import evaluate
from levin.errors import ConfigError
from levin.hints import NonNegativeInt, PositiveInt
from levin.loader import CollectorLoader
from levin.rng import rng_state, set_rng_state
from levin.statistics import ObservationNormalizer
from levin.vector_env import SeededVectorEnv


class Clock:
    """Rings once for every `every` of what it counts, however far one iteration goes."""

    def __init__(self, every: int) -> None:
        self.every, self.rung = every, 0

    def rings(self, count: int) -> bool:
        """Whether a multiple of `every` has been passed since it last rang."""
        if count // self.every > self.rung:
            self.rung = count // self.every
            return True
        return False


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


class Statistics(Callback):
    """Lets the observation normaliser take in a rollout, when the iteration that it was collected for is over."""

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        normalizer = cast(Algorithm, pl_module).observation_normalizer
        if isinstance(normalizer, ObservationNormalizer):
            normalizer.update(batch["observation"])


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
        if self.clock.rings(algorithm.clock) or "eval/return_mean" in self.row:
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
        row |= self.row | algorithm.take() | loader.take()
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
        budget: A run that has spent it is evaluated once more.
        run: The run folder, for what algorithms draw.
    """

    def __init__(
        self,
        *,
        every: PositiveInt,
        episodes: PositiveInt,
        seed: NonNegativeInt,
        env: EnvConfig,
        metrics: Metrics,
        budget: Budget,
        run: Path,
    ) -> None:
        self.episodes, self.seed, self.env, self.metrics, self.budget = episodes, seed, env, metrics, budget
        self.pictures = run / "pictures"
        self.clock = Clock(every)
        self.vector_env: SeededVectorEnv | None = None
        self.return_mean: float | None = None  # of the last evaluation
        self.at, self.env_steps = 0, 0  # when it was, by the clock and in env steps

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.rung = cast(Algorithm, pl_module).clock // self.clock.every
        if trainer.is_global_zero:
            num_envs = min(self.episodes, 10)
            self.vector_env = envs.make(self.env, seed=self.seed, purpose=envs.EVALUATION, num_envs=num_envs)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        algorithm = cast(Algorithm, pl_module)
        if self.clock.rings(algorithm.clock):
            self.evaluate(trainer, algorithm)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        algorithm = cast(Algorithm, pl_module)
        if self.budget.spent and self.at != algorithm.clock:
            self.evaluate(trainer, algorithm)
        self.close()

    def on_exception(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the envs."""
        if self.vector_env is not None:
            self.vector_env.close()

    def evaluate(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Add the results of the policy as it is now to the row. The other ranks wait for them."""
        row, start = {}, perf_counter()
        if self.vector_env is not None:
            returns, lengths = evaluate(algorithm.policy(deterministic=True), self.vector_env, self.episodes)
            row = {"eval/return_mean": float(np.mean(returns)), "eval/return_std": float(np.std(returns))}
            row |= {"eval/length_mean": float(np.mean(lengths)), **algorithm.on_evaluation(self.pictures)}
            loggers.show(trainer.loggers, self.pictures, algorithm.clock)
            row["time/evaluate"] = perf_counter() - start
        row = ranks.broadcast(row)
        self.return_mean, self.at, self.env_steps = row["eval/return_mean"], algorithm.clock, algorithm.env_steps
        self.metrics.row |= row

    def state_dict(self) -> dict[str, Any]:
        return {"return_mean": self.return_mean, "env_steps": self.env_steps, "at": self.at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.return_mean, self.env_steps = state_dict["return_mean"], state_dict["env_steps"]
        self.at = state_dict.get("at", self.env_steps)  # checkpoints of before it was counted have none


class Checkpointing(Checkpoint):
    """Saves `checkpoints/<clock>/` at the end of an iteration, and keeps the newest and the best.

    Being a `Checkpoint`, it comes after all other callbacks, and so knows of every wish to stop (`max_time`). Only here
    a state can be continued exactly: from one of a closed epoch, Lightning resumes with a batch less.

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
        self._rng: dict[str, Any] | None = None

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.folder = ranks.broadcast(self.folder)
        if trainer.is_global_zero:
            self.folder.mkdir(exist_ok=True)
            checkpoint.clean(self.folder)
        self.clock.rung = cast(Algorithm, pl_module).clock // self.clock.every
        if self._rng is not None:
            set_rng_state(self._rng)

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        algorithm = cast(Algorithm, pl_module)
        trainer.should_stop = ranks.agree(trainer.should_stop)
        if self.clock.rings(algorithm.clock) or trainer.should_stop:
            self.save(trainer, algorithm)

    def save(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Save now, and remove what need not be kept."""
        name = str(algorithm.clock)
        if self.evaluation.at == algorithm.clock and self.evaluation.return_mean is not None:
            self.returns[name] = self.evaluation.return_mean
        for logger in trainer.loggers:
            if isinstance(logger, loggers.CSVMetrics):
                logger.sync()
        trainer.save_checkpoint(self.folder / name / STATE)
        if trainer.is_global_zero:
            self._prune()

    def _prune(self) -> None:
        folders = {each.name: each for each in checkpoint.numbered(self.folder)}
        self.returns = {name: self.returns[name] for name in folders if name in self.returns}
        best = max(self.returns, key=lambda name: self.returns[name], default=None)
        for name in list(folders)[: -self.keep]:
            if name != best:
                checkpoint.discard(folders[name])

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        checkpoint["rng"] = rng_state()
        checkpoint["ranks"] = ranks.size()
        for key in [key for key in checkpoint["callbacks"] if key.startswith(Timer.__name__)]:
            del checkpoint["callbacks"][key]  # `max_time` is that of one session: a run that used it up can go on
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                checkpoint["wandb_id"] = logger.experiment.id

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        saved = checkpoint.get("ranks", 1)
        if saved != ranks.size():
            raise ConfigError(
                f"the checkpoint is of {saved} ranks, and this run has {ranks.size()}: trainer.devices={saved}"
            )
        # Drawn numbers are taken back last, when everything is built: see `on_train_start`.
        self._rng = checkpoint["rng"]

    def state_dict(self) -> dict[str, Any]:
        return {"returns": dict(self.returns)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.returns = dict(state_dict["returns"])
