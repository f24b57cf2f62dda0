"""Training session: build the parts of a run, and train in the loop of Lightning's Trainer.

The steps of a session, and the function or class that does each:

    build env, algorithm and collector, with seeds          build_run
    build the Trainer and its callbacks                     trainer.build_trainer
    restore a checkpoint, if the run is continued           runs.checkpoint_io.FolderCheckpointIO.load_checkpoint
    until the run is complete or asked to stop:             (Trainer.fit)
        collect a rollout: T steps in N envs                collectors.loader.CollectorLoader.__next__
        make all updates that are due after the rollout     Algorithm.training_step
        update the running statistics with the rollout      callbacks.Statistics
        stop if complete, on a signal, or on NaN or inf     callbacks.Budget, guards.Preemption, guards.FiniteGuard
        evaluate the policy in separate envs                evaluation.Evaluation         (each `eval.every`)
        write a row of metrics                              callbacks.Metrics             (each `log_every`)
        save a checkpoint                                   checkpointing.Checkpointing   (each `checkpoint.every`)
    if complete: evaluate once more, write the last row     evaluation.Evaluation, callbacks.Metrics

Everything after `training_step` is a callback. `trainer.build_trainer` sets the order in which they run.
"""

from collections.abc import Iterator
from contextlib import contextmanager, suppress
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from lightning.pytorch.loggers import Logger
from omegaconf import DictConfig

from levin.algorithms.base import Algorithm
from levin.collectors.factory import make_loader
from levin.collectors.loader import CollectorLoader
from levin.core import rng
from levin.core.errors import CheckpointError, ConfigError, Interrupted, RunError, one_line
from levin.core.omega import to_plain
from levin.core.process import keep_freed_memory, print_line, release_cores, silence_libraries
from levin.envs.config import EnvConfig
from levin.envs.factory import describe_env, make_env
from levin.envs.vector import SeededVectorEnv
from levin.runs import checkpoint, provenance
from levin.runs import folder as run_folder
from levin.runs.load import algorithm_class
from levin.training import guards, hooks, loggers, video
from levin.training import trainer as lightning_trainer
from levin.training.distributed import sharding


def train(cfg: DictConfig, run: Path, ckpt_path: Path | None = None) -> float | None:
    """Train a run in its folder, and return the mean return of the last evaluation (None without one).

    Args:
        cfg: Checked config of the run.
        run: Run folder; created if missing.
        ckpt_path: Checkpoint to continue from; None starts a new run.

    Raises:
        RunError: The run can't continue. It can be resumed from its newest checkpoint, if it has one.
        ConfigError: The folder holds a run with checkpoints, and `ckpt_path` is None.
    """
    start = perf_counter()
    silence_libraries()
    keep_freed_memory()
    algorithm, rollouts = build_run(cfg)
    worker_rollouts = partial(make_rollouts, cfg, algorithm)
    trainer, budget, evaluation = lightning_trainer.build_trainer(
        cfg, run, rollouts.env.config, worker_rollouts, ckpt_path
    )
    lightning_trainer.check_dtypes(trainer, algorithm)
    hooks.check_hooks(algorithm, evaluation.others)
    hooks.connect_update_hooks(trainer, algorithm, evaluation.others)
    facts = provenance.collect_provenance()
    evaluation.open()
    if ckpt_path is None:
        loggers.check_login(cfg.logger)
    with run_folder.lock(run), run_folder.report_failure(run):
        checkpoint.remove_partial(run / "checkpoints")  # a full disk has room again
        if ckpt_path is None and checkpoint.list_checkpoints(run / "checkpoints"):
            raise run_folder.exists_error(run)
        run_folder.create(run, cfg, facts, resumed=ckpt_path is not None)
        print_line(f"{cfg.name}, seed {cfg.seed}: {run}")
        _print_what_is_unusual(cfg)
        trainer.loggers = loggers.make_loggers(cfg.logger, run, to_plain(cfg), facts["git_sha"], ckpt_path)
        loggers.use_clock(trainer.loggers, algorithm)
        ended = interrupted = False
        try:
            try:
                with _explain_restore(algorithm, ckpt_path), suppress(Interrupted):
                    trainer.fit(algorithm, rollouts, ckpt_path=ckpt_path, weights_only=True)  # the loop
            finally:
                rollouts.collector.shutdown()
                guards.preemption_of(trainer).restore()
            interrupted = not budget.complete and guards.is_interrupted(trainer)
            ended = not interrupted
            if not budget.complete:
                reached = f"stopped and saved at {algorithm.env_steps} of {cfg.total_env_steps} env steps"
                if not algorithm.clock:
                    reached = "stopped before the end of the first iteration"
                print_line(f"{reached}; to continue: make resume RUN={run}")
            run_folder.record_end(
                run,
                perf_counter() - start,
                algorithm.env_steps if budget.complete else None,
                cfg.total_env_steps if ended else None,
            )
            if cfg.upload and budget.complete:
                loggers.upload_checkpoint(trainer.loggers, run)
                _upload_video(trainer.loggers, run)
        finally:
            loggers.close(trainer.loggers, ended=ended, interrupted=interrupted)
    if evaluation.return_mean is not None:
        print_line(f"eval/return_mean {evaluation.return_mean} at {evaluation.env_steps} env steps: {run}")
    if not budget.complete:
        guards.forward_sigusr1(trainer)
    return evaluation.return_mean


def _print_what_is_unusual(cfg: DictConfig) -> None:
    """Print what a short run leaves out."""
    if cfg.eval.every > cfg.total_env_steps:
        print_line(f"eval.every={cfg.eval.every} is more than total_env_steps: the run is evaluated once, at its end")
    starts = cfg.algo.get("learning_starts") or 0
    if starts >= cfg.total_env_steps:
        print_line(f"algo.learning_starts={starts} is not less than total_env_steps: no update will be made")


def _upload_video(run_loggers: list[Logger], run: Path) -> None:
    """Record a video of the run and upload it; print why there is none if the env can't be rendered here."""
    try:
        video.record_video(run=str(run))
    except ConfigError as error:
        print_line(f"no video is uploaded: {error}")
    loggers.upload_videos(run_loggers, run)


@contextmanager
def _explain_restore(algorithm: Algorithm, ckpt_path: Path | None) -> Iterator[None]:
    """Turn an error in or before the first iteration of a continued run into a CheckpointError."""
    try:
        yield
    except (ConfigError, RunError, OSError):
        raise
    except Exception as error:  # values of the wrong type or size raise errors of many types
        if ckpt_path is None or algorithm.iterations_here > 1:
            raise
        when = ", or the first iteration after it failed" if algorithm.iterations_here else ""
        raise CheckpointError(
            f"{ckpt_path} can't be restored{when}: {type(error).__name__}: {one_line(error)}"
        ) from error


def build_run(cfg: DictConfig) -> tuple[Algorithm, CollectorLoader]:
    """Seed this process, and build its algorithm and its rollout loader, with this rank's share of the envs."""
    world_size, rank, cfg = sharding.configured_world_size(cfg), sharding.process_rank(cfg), sharding.shard_config(cfg)
    if cfg.trainer.threads or world_size > 1:
        # The cores of a node are shared by its ranks alone.
        torch.set_num_threads(cfg.trainer.threads or max(1, torch.get_num_threads() // cfg.trainer.devices))
    if world_size == 1:
        release_cores(torch.get_num_threads())
    with sharding.explain_shares(world_size):
        rng.seed_everything(cfg.seed, rank=0)
        env = make_training_env(cfg, rank=0)
        values = {key: value for key, value in to_plain(cfg.algo).items() if key != "_target_"}
        algorithm = algorithm_class(cfg)(env=describe_env(env), **values)
        # A collector counts its own rank's steps.
        algorithm.random_env_steps = -(-algorithm.random_env_steps // world_size)
        if rank:
            env.close()
            return algorithm, make_rollouts(cfg, algorithm, rank, env_steps=0)
        return algorithm, make_training_loader(cfg, env, algorithm)


def make_training_env(cfg: DictConfig, rank: int) -> SeededVectorEnv:
    """Build the training envs of one process of a run."""
    config = EnvConfig(**to_plain(cfg.env))
    return make_env(config, seed=cfg.seed, rank=rank, copy=cfg.collector != "vector")


def make_training_loader(cfg: DictConfig, env: SeededVectorEnv, algorithm: Algorithm) -> CollectorLoader:
    """Build the rollout loader of an algorithm, with the collector that the config names."""
    return make_loader(cfg.collector, env, algorithm, seed=cfg.seed, workers=cfg.get("collector_workers", 2))


def make_rollouts(cfg: DictConfig, algorithm: Algorithm, rank: int, env_steps: int) -> CollectorLoader:
    """Seed this process as a worker or rank of a run, and build its rollout loader.

    Episodes are seeded by their number. Numbers start at `env_steps`, the env steps of the run so far: every episode
    takes at least one step, so a resumed run never repeats an episode seed.
    """
    rng.seed_everything(cfg.seed, rank=rank, env_steps=env_steps)
    env = make_training_env(cfg, rank)
    env.episodes = [env_steps - 1] * env.num_envs
    return make_training_loader(cfg, env, algorithm)


def train_rank(cfg: DictConfig, run: Path, ckpt_path: Path | None = None) -> None:
    """Train as a rank other than rank 0. Only rank 0 creates the run folder, evaluates and logs."""
    silence_libraries()
    keep_freed_memory()
    algorithm, rollouts = build_run(cfg)
    worker_rollouts = partial(make_rollouts, cfg, algorithm)
    trainer, _, evaluation = lightning_trainer.build_trainer(cfg, run, rollouts.env.config, worker_rollouts)
    hooks.connect_update_hooks(trainer, algorithm, evaluation.others)
    try:
        trainer.fit(algorithm, rollouts, ckpt_path=ckpt_path, weights_only=True)
    finally:
        rollouts.collector.shutdown()
        guards.preemption_of(trainer).restore()
