"""Callback that saves checkpoints and deletes old ones."""

import math
from contextlib import suppress
from pathlib import Path
from typing import Any, cast

import torch
from lightning import LightningModule, Trainer
from lightning.pytorch.callbacks import Checkpoint, Timer
from lightning.pytorch.loggers import WandbLogger

from levin.algorithms.base import Algorithm
from levin.collectors.loader import CollectorLoader
from levin.core import distributed, files
from levin.core.errors import CheckpointError, ConfigError, Interrupted, RunError
from levin.core.rng import rng_state, set_rng_state
from levin.core.types import PositiveInt
from levin.runs import checkpoint
from levin.runs.checkpoint import STATE
from levin.runs.checkpoint_io import FolderCheckpointIO
from levin.runs.extra_state import ExtraState
from levin.training import loggers
from levin.training.callbacks import Clock
from levin.training.evaluation import Evaluation

# Keys of a checkpoint that are not from callbacks.
CHECKPOINT_KEYS = ("state_dict", "optimizer_states", "lr_schedulers", "loops", "callbacks", "hyper_parameters")


class Checkpointing(Checkpoint):
    """Saves `checkpoints/<clock>/` at the end of an iteration, and keeps the newest and the best.

    Lightning calls subclasses of `Checkpoint` after all other callbacks, so a request to stop by any of them, such as
    `max_time`, is known here. A state must be saved within an epoch to be continued exactly: from a checkpoint of a
    finished epoch Lightning resumes with one batch less.

    Args:
        every: Env steps between two checkpoints, counted by `Algorithm.clock`. The last iteration is always saved.
        keep: Number of newest checkpoints to keep. The one with the best evaluation is kept in addition; the link
            `best` points to it.
        run: Run folder.
        evaluation: Evaluation callback; its result ranks the checkpoint of the same iteration.
    """

    def __init__(self, *, every: PositiveInt, keep: PositiveInt, run: Path, evaluation: Evaluation) -> None:
        self.keep, self.folder, self.evaluation = keep, run / "checkpoints", evaluation
        self.clock = Clock(every)
        self.returns: dict[str, float] = {}  # checkpoint folder -> mean return of its evaluation
        self._rng: dict[str, Any] | None = None
        self.extra_state: ExtraState | None = None  # from `on_train_start` on
        self._extra: dict[str, Any] = {}  # of the checkpoint that is continued
        self._wandb_id: str | None = None  # of this session, or of the checkpoint that is continued

    def on_train_start(self, trainer: Trainer, pl_module: LightningModule) -> None:
        algorithm, loader = cast(Algorithm, pl_module), cast(CollectorLoader, trainer.train_dataloader)
        extra = self.extra_state = ExtraState(algorithm, trainer)
        if self.evaluation.is_due_at_start(algorithm):
            algorithm.restore_buffer()
            with suppress(CheckpointError):  # attributes may be missing that `on_train_start` of the algorithm makes
                extra.restore(self._extra)

        def restore() -> None:
            extra.note_initial_values()
            extra.restore(self._extra)
            if self._extra and algorithm.buffer is not None:  # attributes of a user's buffer are restored only now
                algorithm.buffer.restart(torch.as_tensor(loader.not_replayed))
            self._extra = {}

        loader.before_first = restore
        self.folder = distributed.broadcast_object(self.folder)
        plugin = trainer.strategy.checkpoint_io
        assert isinstance(plugin, FolderCheckpointIO)
        plugin.folder = self.folder  # on the other ranks, too
        if trainer.is_global_zero:
            files.subfolder(self.folder.parent, self.folder.name)
        self.clock.periods = algorithm.clock // self.clock.every
        if self._rng is not None:
            set_rng_state(self._rng)
        for callback in self.evaluation.others:
            _check_loadable(callback.state_key, callback.state_dict())
        # After all other hooks and with the restored generators: as if the run had not been interrupted.
        self.evaluation.begin(trainer, algorithm)
        self._rank(algorithm)
        if trainer.is_global_zero:
            self._prune()

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        algorithm = cast(Algorithm, pl_module)
        trainer.should_stop = distributed.any_rank(trainer.should_stop)
        if self.clock.is_due(algorithm.clock) or trainer.should_stop:
            self.save(trainer, algorithm)

    def on_train_end(self, trainer: Trainer, pl_module: LightningModule) -> None:
        """Link the best checkpoint again: a complete run is evaluated once more after its last checkpoint.

        Nothing is deleted: a resumed run drops this evaluation, and then the best is again the one before.
        """
        self._rank(cast(Algorithm, pl_module))
        if trainer.is_global_zero:
            self._link_best(checkpoint.list_checkpoints(self.folder))

    def on_exception(self, trainer: Trainer, pl_module: LightningModule, exception: BaseException) -> None:
        """Save the state before a rollout that a signal has ended."""
        algorithm = cast(Algorithm, pl_module)
        saved = (self.folder / str(algorithm.clock) / STATE).exists()
        if isinstance(exception, Interrupted) and algorithm.clock and not saved:
            self.save(trainer, algorithm)

    def save(self, trainer: Trainer, algorithm: Algorithm) -> None:
        """Save a checkpoint, and delete those that need not be kept."""
        self._rank(algorithm)
        for logger in trainer.loggers:
            if isinstance(logger, loggers.CSVMetrics):
                logger.sync()
        trainer.save_checkpoint(self.folder / str(algorithm.clock) / STATE)
        if trainer.is_global_zero:
            self._prune()

    def _rank(self, algorithm: Algorithm) -> None:
        """Rank the checkpoint of this iteration by its evaluation, if it has one."""
        if self.evaluation.evaluated_at == algorithm.clock and self.evaluation.return_mean is not None:
            self.returns[str(algorithm.clock)] = self.evaluation.return_mean

    def _link_best(self, folders: list[Path]) -> str | None:
        """Point the link `best` at the checkpoint with the best evaluation, and return its name (None: no such)."""
        names = [folder.name for folder in folders]
        self.returns = {name: self.returns[name] for name in names if name in self.returns}
        finite = {name: value for name, value in self.returns.items() if math.isfinite(value)}
        best = max(finite, key=lambda name: finite[name], default=None)
        checkpoint.relink(self.folder / checkpoint.BEST, best)
        return best

    def _prune(self) -> None:
        folders = checkpoint.list_checkpoints(self.folder)
        best = self._link_best(folders)
        for folder in folders[: -self.keep]:
            if folder.name != best:
                checkpoint.discard(folder)

    def on_save_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        self._check_state(checkpoint)
        if self.extra_state is not None and (extra := self.extra_state.save()):
            checkpoint["extra"] = extra
        checkpoint["rng"] = rng_state()
        checkpoint["ranks"] = distributed.world_size()
        for callback in trainer.callbacks:  # type: ignore[attr-defined]
            if type(callback) is Timer:  # `max_time` limits one session, not the run: resuming starts it anew
                checkpoint["callbacks"].pop(callback.state_key, None)
        for logger in trainer.loggers:
            if isinstance(logger, WandbLogger):
                self._wandb_id = logger.experiment.id
        if self._wandb_id is not None:  # also in a session without Weights & Biases: a later one goes on with that run
            checkpoint["wandb_id"] = self._wandb_id

    def _check_state(self, saved: dict[str, Any]) -> None:
        """Check that a resumed run can load what the user's callbacks keep in a checkpoint.

        Raises:
            RunError: It can't.
        """
        if not self.evaluation.others:
            return
        states = {key: value for key, value in saved.items() if key not in CHECKPOINT_KEYS}
        for name, state in {**states, **saved["callbacks"]}.items():
            _check_loadable(name, state)

    def on_load_checkpoint(self, trainer: Trainer, pl_module: LightningModule, checkpoint: dict[str, Any]) -> None:
        ranks = checkpoint["ranks"]
        if ranks != distributed.world_size():
            raise ConfigError(
                f"the checkpoint was saved by {ranks} ranks, but this run has {distributed.world_size()}: "
                f"set trainer.devices={ranks}"
            )
        # Restored in `on_train_start`: building the rest of the run still samples random numbers.
        self._rng = checkpoint["rng"]
        self._extra = checkpoint.get("extra", {})
        self._wandb_id = checkpoint.get("wandb_id")

    def state_dict(self) -> dict[str, Any]:
        return {"returns": dict(self.returns)}

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        self.returns = {str(name): float(value) for name, value in state_dict["returns"].items()}


def _check_loadable(name: str, state: Any) -> None:
    """Raise a RunError if the state that a callback keeps in checkpoints could not be loaded again."""
    try:
        files.check_loadable(state)
    except ValueError as error:
        raise RunError(
            f"the state that a callback keeps in checkpoints as {name} can't be loaded again: {error}; use tensors, "
            "numbers, texts, lists and dicts"
        ) from error
