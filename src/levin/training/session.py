"""Train an algorithm: compose -> seed -> build -> `Trainer.fit`. `python -m levin.train algo=sac env=pendulum`."""

from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from omegaconf import DictConfig

from levin.algorithms.base import Algorithm
from levin.collectors import loader
from levin.collectors.factory import make_loader
from levin.core import rng
from levin.core.omega import plain
from levin.core.process import keep_freed_memory, say, silence_libraries
from levin.envs.config import EnvConfig
from levin.envs.factory import describe, make_env
from levin.envs.vector import SeededVectorEnv
from levin.runs import folder as run_folder
from levin.runs import provenance
from levin.runs.load import algorithm_class
from levin.training import guards, loggers, video
from levin.training import trainer as lightning_trainer
from levin.training.distributed import sharding


def train(cfg: DictConfig, run: Path, ckpt_path: Path | None = None) -> float | None:
    """Train in the run folder, from a checkpoint if one is given. Returns the mean of the last evaluation.

    Raises:
        RunError: The run can't go on; its newest checkpoint is whole.
    """
    start = perf_counter()
    silence_libraries()
    keep_freed_memory()
    algorithm, rollouts = build(cfg)
    others = partial(make_rollouts, cfg, algorithm)
    trainer, budget, evaluation = lightning_trainer.build(cfg, run, rollouts.env.config, others, ckpt_path)
    facts = provenance.collect()
    with run_folder.lock(run), run_folder.survivable(run):
        run_folder.create(run, cfg, facts, resumed=ckpt_path is not None)
        say(f"{cfg.name}, seed {cfg.seed}: {run}")
        trainer.loggers = loggers.make(cfg.logger, run, plain(cfg), facts["git_sha"], ckpt_path)
        try:
            trainer.fit(algorithm, rollouts, ckpt_path=ckpt_path, weights_only=True)
        finally:
            rollouts.collector.shutdown()
        run_folder.finish(run, perf_counter() - start, algorithm.env_steps if budget.spent else None)
        if cfg.upload and budget.spent:
            video.play(run=str(run))
            loggers.upload(trainer.loggers, run)
        loggers.close(trainer.loggers)
    if evaluation.return_mean is not None:
        say(f"eval/return_mean {evaluation.return_mean} at {evaluation.env_steps} env steps: {run}")
    if not budget.spent:
        guards.pass_on(trainer)
    return evaluation.return_mean


def follow(cfg: DictConfig, run: Path, ckpt_path: Path | None = None) -> None:
    """Train as one of the further ranks of a run: the first of them has the folder, evaluates and logs."""
    silence_libraries()
    keep_freed_memory()
    algorithm, rollouts = build(cfg)
    trainer, *_ = lightning_trainer.build(cfg, run, rollouts.env.config, partial(make_rollouts, cfg, algorithm))
    try:
        trainer.fit(algorithm, rollouts, ckpt_path=ckpt_path, weights_only=True)
    finally:
        rollouts.collector.shutdown()


def build(cfg: DictConfig) -> tuple[Algorithm, loader.CollectorLoader]:
    """Seed, and make the env, the algorithm and what collects for it, all as this rank has it."""
    together, rank, cfg = sharding.planned(cfg), sharding.of_this_process(cfg), sharding.share(cfg)
    if cfg.trainer.threads or together > 1:
        torch.set_num_threads(cfg.trainer.threads or max(1, torch.get_num_threads() // together))
    rng.seed_everything(cfg.seed, rank=0)
    env = make_training_env(cfg, rank=0)
    values = {key: value for key, value in plain(cfg.algo).items() if key != "_target_"}
    algorithm = algorithm_class(cfg)(env=describe(env), **values)
    algorithm.random_env_steps = -(-algorithm.random_env_steps // together)  # as a collector counts them
    if rank:
        env.close()
        return algorithm, make_rollouts(cfg, algorithm, rank, env_steps=0)
    return algorithm, make_training_loader(cfg, env, algorithm)


def make_rollouts(cfg: DictConfig, algorithm: Algorithm, rank: int, env_steps: int) -> loader.CollectorLoader:
    """Seed this process as one of a run's workers, and make what collects for it.

    Nothing is drawn again when the run resumes: the numbers of episodes begin at `env_steps`, of which each takes one
    or more.
    """
    rng.seed_everything(cfg.seed, rank=rank, env_steps=env_steps)
    env = make_training_env(cfg, rank)
    env.episodes = [env_steps - 1] * env.num_envs
    return make_training_loader(cfg, env, algorithm)


def make_training_loader(cfg: DictConfig, env: SeededVectorEnv, algorithm: Algorithm) -> loader.CollectorLoader:
    """What collects for an algorithm."""
    return make_loader(cfg.collector, env, algorithm, seed=cfg.seed, workers=cfg.get("collector_workers", 2))


def make_training_env(cfg: DictConfig, rank: int) -> SeededVectorEnv:
    """The vector env of one process of a run."""
    config = EnvConfig(**plain(cfg.env))
    return make_env(config, seed=cfg.seed, rank=rank, copy=cfg.collector != "vector")
