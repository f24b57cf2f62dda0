"""Train an algorithm: compose -> seed -> build -> `Trainer.fit`. `python -m levin.train algo=sac env=pendulum`."""

import sys
from functools import partial
from pathlib import Path
from time import perf_counter

import torch
from omegaconf import DictConfig

from levin import config, envs, guards, loader, loggers, play, provenance, ranks, resume, rng, runs, schema, slurm
from levin import trainer as lightning_trainer
from levin.algorithms.base import Algorithm
from levin.errors import one_sentence
from levin.vector_env import SeededVectorEnv


def train(cfg: DictConfig, run: Path, ckpt_path: Path | None = None) -> float | None:
    """Train in the run folder, from a checkpoint if one is given. Returns the mean of the last evaluation.

    Raises:
        RunError: The run can't go on; its newest checkpoint is whole.
    """
    start = perf_counter()
    runs.quiet()
    runs.keep_freed_memory()
    algorithm, rollouts = build(cfg)
    others = partial(make_rollouts, cfg, algorithm)
    trainer, budget, evaluation = lightning_trainer.build(cfg, run, rollouts.env.config, others, ckpt_path)
    facts = provenance.collect()
    with runs.lock(run), runs.survivable(run):
        runs.create(run, cfg, facts, resumed=ckpt_path is not None)
        runs.say(f"{cfg.name}, seed {cfg.seed}: {run}")
        trainer.loggers = loggers.make(cfg.logger, run, schema.plain(cfg), facts["git_sha"], ckpt_path)
        try:
            trainer.fit(algorithm, rollouts, ckpt_path=ckpt_path, weights_only=True)
        finally:
            rollouts.collector.shutdown()
        runs.finish(run, perf_counter() - start, algorithm.env_steps if budget.spent else None)
        if cfg.upload and budget.spent:
            play.play(run=str(run))
            loggers.upload(trainer.loggers, run)
        loggers.close(trainer.loggers)
    if evaluation.return_mean is not None:
        runs.say(f"eval/return_mean {evaluation.return_mean} at {evaluation.env_steps} env steps: {run}")
    if not budget.spent:
        guards.pass_on(trainer)
    return evaluation.return_mean


def follow(cfg: DictConfig, run: Path, ckpt_path: Path | None = None) -> None:
    """Train as one of the further ranks of a run: the first of them has the folder, evaluates and logs."""
    runs.quiet()
    runs.keep_freed_memory()
    algorithm, rollouts = build(cfg)
    trainer, *_ = lightning_trainer.build(cfg, run, rollouts.env.config, partial(make_rollouts, cfg, algorithm))
    try:
        trainer.fit(algorithm, rollouts, ckpt_path=ckpt_path, weights_only=True)
    finally:
        rollouts.collector.shutdown()


def build(cfg: DictConfig) -> tuple[Algorithm, loader.CollectorLoader]:
    """Seed, and make the env, the algorithm and what collects for it, all as this rank has it."""
    together, rank, cfg = ranks.planned(cfg), ranks.of_this_process(cfg), ranks.share(cfg)
    if cfg.trainer.threads or together > 1:
        torch.set_num_threads(cfg.trainer.threads or max(1, torch.get_num_threads() // together))
    rng.seed_everything(cfg.seed, rank=0)
    env = make_env(cfg, rank=0)
    values = {key: value for key, value in schema.plain(cfg.algo).items() if key != "_target_"}
    algorithm = schema.algorithm_class(cfg)(env=envs.describe(env), **values)
    algorithm.random_env_steps = -(-algorithm.random_env_steps // together)  # as a collector counts them
    if rank:
        env.close()
        return algorithm, make_rollouts(cfg, algorithm, rank, env_steps=0)
    return algorithm, make_loader(cfg, env, algorithm)


def make_rollouts(cfg: DictConfig, algorithm: Algorithm, rank: int, env_steps: int) -> loader.CollectorLoader:
    """Seed this process as one of a run's workers, and make what collects for it.

    Nothing is drawn again when the run resumes: the numbers of episodes begin at `env_steps`, of which each takes one
    or more.
    """
    rng.seed_everything(cfg.seed, rank=rank, env_steps=env_steps)
    env = make_env(cfg, rank)
    env.episodes = [env_steps - 1] * env.num_envs
    return make_loader(cfg, env, algorithm)


def make_loader(cfg: DictConfig, env: SeededVectorEnv, algorithm: Algorithm) -> loader.CollectorLoader:
    """What collects for an algorithm."""
    return loader.make(cfg.collector, env, algorithm, seed=cfg.seed, workers=cfg.get("collector_workers", 2))


def make_env(cfg: DictConfig, rank: int) -> SeededVectorEnv:
    """The vector env of one process of a run."""
    config = envs.EnvConfig(**schema.plain(cfg.env))
    return envs.make(config, seed=cfg.seed, rank=rank, copy=cfg.collector != "vector")


def main() -> None:
    """Compose the config from the command line and train; many of them with `-m`, as jobs with `launcher=`."""
    with one_sentence():
        words = sys.argv[1:]
        if any(word in ("-m", "--multirun") or word.startswith("launcher=") for word in words):
            from levin.sweep import sweep

            sweep(words)
            return
        slurm.requeue_on_signal()
        cfg = config.compose(words)
        if (before := runs.of_this_job(cfg)) is not None:
            resume.resume(run=str(before))
        elif ranks.of_this_process(cfg):
            follow(cfg, Path(cfg.run or "runs"))
        else:
            train(cfg, runs.folder(cfg))


if __name__ == "__main__":
    main()
