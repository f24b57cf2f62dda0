"""Build Lightning's Trainer for a run."""

from collections.abc import Callable
from contextlib import nullcontext
from pathlib import Path
from typing import Any

import torch
from hydra.utils import instantiate
from lightning import Callback, Trainer
from lightning.pytorch.callbacks import EarlyStopping, ModelCheckpoint, StochasticWeightAveraging, WeightAveraging
from lightning.pytorch.plugins.environments import LightningEnvironment
from lightning.pytorch.profilers import PassThroughProfiler
from lightning.pytorch.utilities import rank_zero_only
from omegaconf import DictConfig

from levin.algorithms.base import Algorithm
from levin.collectors.loader import CollectorLoader
from levin.core.errors import ConfigError, one_line
from levin.core.omega import to_plain
from levin.envs.config import EnvConfig
from levin.runs.checkpoint_io import FolderCheckpointIO
from levin.training.callbacks import Budget, Metrics, Statistics, Throughput
from levin.training.checkpointing import Checkpointing
from levin.training.distributed import sharding
from levin.training.distributed.data_parallel import DataParallel
from levin.training.distributed.hogwild import Hogwild, Workers
from levin.training.evaluation import Evaluation
from levin.training.guards import FiniteGuard, Preemption
from levin.training.progress import ProgressBar

NOTHING = nullcontext()


class NoProfiler(PassThroughProfiler):
    """Profiler that measures nothing. Lightning's enters a generator around every hook of every callback."""

    def profile(self, action_name: str) -> Any:
        return NOTHING


def build_trainer(
    cfg: DictConfig,
    run: Path,
    env: EnvConfig,
    make_rollouts: Callable[[int, int], CollectorLoader],
    ckpt_path: Path | None = None,
) -> tuple[Trainer, Budget, Evaluation]:
    """Build the Trainer with Levin's callbacks and the user's. Loggers are set later: they need the run folder.

    Args:
        cfg: Config of the run.
        run: Run folder.
        env: Config of the training envs.
        make_rollouts: Builds the rollout loader of another worker: (rank, env steps so far) -> loader.
        ckpt_path: Checkpoint to continue from; passed to the ranks that this process starts.

    Returns:
        The Trainer, and its Budget and Evaluation callbacks.

    Raises:
        ConfigError: The Trainer refuses an argument, or a callback can't be built.
    """
    budget = Budget(cfg.total_env_steps)
    metrics = Metrics(cfg.log_every, budget)
    hogwild = cfg.trainer.strategy == "hogwild"
    ranks = sharding.configured_world_size(cfg)
    preemption = Preemption(alone=not hogwild and ranks == 1)
    # Workers of Hogwild must have ended before the last checkpoint, so an evaluation is not abandoned.
    stop = (lambda: False) if hogwild else (lambda: preemption.received is not None)
    evaluation = Evaluation(**cfg.eval, env=env, metrics=metrics, budget=budget, run=run, stop=stop)
    callbacks = [
        *(Statistics(), budget, preemption, FiniteGuard(), Throughput(metrics), evaluation, metrics),
        Checkpointing(**cfg.checkpoint, run=run, evaluation=evaluation),
    ]
    if not sharding.process_rank(cfg):
        bar = cfg.trainer.get("enable_progress_bar", True)
        callbacks.append(ProgressBar(cfg.total_env_steps, metrics, bar=bar))
    options = {key: value for key, value in to_plain(cfg.trainer).items() if key not in ("threads", "workers")}
    if cfg.trainer.accelerator == "auto":  # Lightning would also take Apple's GPUs, which have no float64
        options["accelerator"] = "cuda" if torch.cuda.is_available() else "cpu"
    if hogwild:
        options |= {"strategy": (strategy := Hogwild(cfg.trainer.workers, make_rollouts)), "accelerator": "cpu"}
        callbacks.insert(callbacks.index(evaluation), Workers(strategy))
    if ranks > 1:
        options["strategy"] = DataParallel(cfg, run, ckpt_path)
    elif cfg.trainer.strategy == "ddp":
        options["strategy"] = "auto"
    defaults = {
        "max_epochs": -1,
        "num_sanity_val_steps": 0,
        "logger": False,
        "profiler": NoProfiler(),
        "enable_model_summary": False,
        "use_distributed_sampler": False,
    }
    options["enable_progress_bar"] = False  # Lightning's own
    plugins: list[Any] = [FolderCheckpointIO(run / "checkpoints")]
    if ranks == 1:  # each task of srun trains a run of its own, and is its rank 0
        plugins.append(LightningEnvironment())
        rank_zero_only.rank = 0  # type: ignore[attr-defined]
    try:
        added = [instantiate(section) for section in cfg.callbacks.values()]
        for name, callback in zip(cfg.callbacks, added, strict=True):
            _prepare_callback(str(name), callback)
        evaluation.others = added
        at = callbacks.index(metrics)  # the row of metrics has what they log
        callbacks[at:at] = added
        trainer = Trainer(**(defaults | options), plugins=plugins, callbacks=callbacks)  # type: ignore[arg-type]
    except ConfigError:
        raise
    except Exception as error:  # Lightning and the callbacks raise errors of many types
        raise ConfigError(f"the Trainer or a callback can't be built: {one_line(error)}") from error
    device = trainer.strategy.root_device.type
    on_gpu = ("vector",) if device == "mps" else ("vector", "batched")  # batched envs may hold float64
    if device != "cpu" and cfg.collector not in on_gpu:
        raise ConfigError(
            f"collector={cfg.collector} runs only on the CPU: set trainer.accelerator=cpu or collector=vector"
        )
    return trainer, budget, evaluation


def check_dtypes(trainer: Trainer, algorithm: Algorithm) -> None:
    """Check that the device has the dtypes of the algorithm.

    Raises:
        ConfigError: The running statistics are in float64, which Apple's GPUs do not have.
    """
    if trainer.strategy.root_device.type == "mps" and any(each.dtype == torch.float64 for each in algorithm.buffers()):
        raise ConfigError(
            f"trainer.accelerator=mps has no float64, which the running statistics of {type(algorithm).__name__} need: "
            "set trainer.accelerator=cpu"
        )


def _prepare_callback(name: str, callback: Any) -> None:
    """Let a callback of Lightning work at evaluations, which take the place of epochs here.

    Raises:
        ConfigError: It is no callback, or can't work here.
    """
    if not isinstance(callback, Callback):
        kind = f"{type(callback).__module__}.{type(callback).__name__}"
        raise ConfigError(
            f"callbacks.{name} is a {kind}, not a lightning.Callback: write `from lightning import Callback` and "
            "derive the class from it"
        )
    if isinstance(callback, ModelCheckpoint):
        raise ConfigError(
            "ModelCheckpoint counts Lightning's steps and epochs, which do not pass here: set checkpoint.every and "
            "checkpoint.keep (the checkpoint with the best evaluation is always kept), or call "
            "trainer.save_checkpoint(path) in a callback of your own"
        )
    if isinstance(callback, WeightAveraging | StochasticWeightAveraging):
        raise ConfigError(
            f"{type(callback).__name__} counts Lightning's steps and epochs, which do not pass here, so it would "
            "average nothing: average in a callback of your own, in on_train_batch_end"
        )
    if isinstance(callback, EarlyStopping):
        callback._check_on_train_epoch_end = False  # but after every evaluation: `Evaluation` calls on_validation_end
