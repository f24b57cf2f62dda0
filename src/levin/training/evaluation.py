"""Callback that evaluates the policy in separate envs."""

from collections.abc import Callable
from pathlib import Path
from time import perf_counter
from typing import Any, cast

import numpy as np
import torch
from lightning import Callback, LightningModule, Trainer

from levin.algorithms.base import Algorithm
from levin.collectors.episodes import evaluate, mean_numbers
from levin.collectors.loader import CollectorLoader
from levin.core import distributed
from levin.core.errors import Interrupted
from levin.core.rng import Generators
from levin.core.types import NonNegativeInt, PositiveInt
from levin.envs.config import EVALUATION, EnvConfig
from levin.envs.factory import make_env
from levin.envs.vector import SeededVectorEnv
from levin.training import loggers
from levin.training.callbacks import Budget, Clock, Metrics
from levin.training.hooks import call_evaluation_hook, observes_start


class Evaluation(Callback):
    """Evaluates the deterministic policy in separate envs, with the same seeds every time.

    Args:
        every: Env steps between two evaluations, counted by `Algorithm.clock`.
        episodes: Episodes per evaluation.
        seed: Seed of the evaluation envs, independent of the run's seed.
        at_start: Whether to evaluate also before the first env step.
        env: Env config of the run. Evaluations use the running statistics of the training envs and do not update them.
        metrics: Metrics callback; the results are added to its row.
        budget: Budget callback. A complete run is evaluated once more.
        run: Run folder. Algorithms write their pictures to its `pictures/`.
        stop: Function that returns whether a signal asks to stop. Then an evaluation is abandoned, the run is saved and
            stops, and the evaluation is made first when the run resumes.
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
        stop: Callable[[], bool],
        at_start: bool = False,  # default for configs of runs older than this key
    ) -> None:
        self.episodes, self.seed, self.env, self.metrics, self.budget = episodes, seed, env, metrics, budget
        self.pictures, self.stop, self.at_start = run / "pictures", stop, at_start
        self.clock = Clock(every)
        self.others: list[Callback] = []  # callbacks of the user, whose hooks of a validation are called
        self.vector_env: SeededVectorEnv | None = None
        self.return_mean: float | None = None  # result of the last evaluation
        self.evaluated_at, self.env_steps = 0, 0  # clock and env steps of the last evaluation

    def open(self) -> None:
        """Build the envs. Rank 0 does this before the run begins, so that nothing is written if they can't be built."""
        num_envs = min(self.episodes, 10)
        self.vector_env = make_env(self.env, seed=self.seed, purpose=EVALUATION, num_envs=num_envs)

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        self.clock.periods = cast(Algorithm, pl_module).clock // self.clock.every

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        algorithm = cast(Algorithm, pl_module)
        if self.clock.is_due(algorithm.clock):
            self.evaluate(trainer, algorithm)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        algorithm = cast(Algorithm, pl_module)
        if self.budget.complete:
            cast(CollectorLoader, trainer.train_dataloader).begin()  # a run that was killed here restores attributes
            if self.evaluated_at != algorithm.clock:
                self.evaluate(trainer, algorithm)
        self.close()

    def on_exception(self, *_: Any) -> None:
        self.close()

    def close(self) -> None:
        """Close the envs."""
        if self.vector_env is not None:
            self.vector_env.close()
            self.vector_env = None

    def is_due_at_start(self, algorithm: Algorithm) -> bool:
        """Return whether an evaluation is due before the first iteration."""
        return self.metrics.waits or (self.at_start and not algorithm.clock)

    def begin(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Make the evaluation that is due before the first iteration, if there is one, and write its row of metrics.

        It is the one before the first env step, or one that a signal had ended.
        """
        if self.is_due_at_start(algorithm):
            self.evaluate(trainer, algorithm)
            if not self.metrics.waits:
                self.metrics.write(trainer, algorithm)

    def evaluate(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Evaluate the current policy on rank 0, and add the results to the row of metrics on every rank."""
        for name in ("on_validation_start", "on_validation_epoch_start"):
            call_evaluation_hook(trainer, algorithm, self.others, name)
        row: dict[str, float] | None = {}
        if self.vector_env is not None:
            row = self._play(trainer, algorithm)
        row = distributed.broadcast_object(row)
        self.metrics.waits = row is None
        if row is None:  # a signal has ended the evaluation
            trainer.should_stop, self.budget.complete = True, False
            return
        self.return_mean, self.env_steps = row["eval/return_mean"], algorithm.env_steps
        self.evaluated_at = algorithm.clock
        self.metrics.row |= row
        # Monitors, such as EarlyStopping, read these at the end of a validation, which an evaluation is.
        trainer.callback_metrics.update(
            {name: torch.tensor(value) for name, value in row.items() if name.startswith("eval/")}
        )
        for name in ("on_validation_epoch_end", "on_validation_end"):
            call_evaluation_hook(trainer, algorithm, self.others, name)

    def _play(self, trainer: Trainer, algorithm: Algorithm) -> dict[str, float] | None:
        """Play the episodes, and return the row of metrics; None if a signal has ended the evaluation."""
        assert self.vector_env is not None
        start, policy, generators = perf_counter(), algorithm.policy(deterministic=True), Generators()
        training = [each for each in policy.modules() if each.training]
        policy.eval()  # no dropout, and no change of batch statistics
        try:
            # A callback that has seen the beginning, such as one that swaps the weights, must see the end.
            stop = (lambda: False) if observes_start(self.others, algorithm) else self.stop
            returns, lengths = evaluate(policy, self.vector_env, self.episodes, stop)
        except Interrupted:
            generators.restore()
            return None
        finally:
            for module in training:
                module.training = True
        row = {"eval/return_mean": float(np.mean(returns)), "eval/return_std": float(np.std(returns))}
        row |= {f"eval/{name}": value for name, value in mean_numbers(self.vector_env.ended).items()}
        row |= {"eval/length_mean": float(np.mean(lengths)), **algorithm.on_evaluation(self.pictures)}
        loggers.log_pictures(trainer.loggers, self.pictures, clock=algorithm.clock, env_steps=algorithm.env_steps)
        row["time/evaluate"] = perf_counter() - start
        return row

    def state_dict(self) -> dict[str, Any]:
        return {"return_mean": self.return_mean, "env_steps": self.env_steps, "at": self.evaluated_at}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.return_mean, self.env_steps = state_dict["return_mean"], state_dict["env_steps"]
        self.evaluated_at = state_dict["at"]
