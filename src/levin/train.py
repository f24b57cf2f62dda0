"""Train an algorithm: compose -> seed -> build -> `Trainer.fit`. `python -m levin.train algo=sac env=pendulum`."""

import sys
from pathlib import Path
from time import perf_counter

import torch
from omegaconf import DictConfig

from levin import callbacks, checkpoint, collectors, config, envs, loggers, play, provenance, runs, schema
from levin import trainer as lightning_trainer
from levin.algorithms.base import Algorithm
from levin.collectors import CollectorLoader
from levin.errors import one_sentence


def train(cfg: DictConfig, run: Path, ckpt_path: Path | None = None) -> float | None:
    """Train in the run folder, from a checkpoint if one is given. Returns the mean of the last evaluation."""
    start = perf_counter()
    runs.quiet()
    runs.keep_freed_memory()
    algorithm, loader = build(cfg)
    metrics = callbacks.Metrics(cfg.log_every)
    evaluation = callbacks.Evaluation(**cfg.eval, env=loader.env.config, metrics=metrics)
    trainer = lightning_trainer.build(
        cfg,
        [
            callbacks.Budget(cfg.total_env_steps),
            callbacks.Throughput(metrics),
            evaluation,
            metrics,
            callbacks.Checkpointing(**cfg.checkpoint, run=run, evaluation=evaluation),
            callbacks.ProgressBar(cfg.total_env_steps, metrics),
        ],
    )
    facts = provenance.collect()
    runs.create(run, cfg, facts, resumed=ckpt_path is not None)
    print(f"{cfg.name}, seed {cfg.seed}: {run}", flush=True)
    wandb_id = None if ckpt_path is None else checkpoint.wandb_id(ckpt_path)
    trainer.loggers = loggers.make(cfg.logger, run, schema.plain(cfg), facts["git_sha"], wandb_id)
    trainer.fit(algorithm, loader, ckpt_path=ckpt_path, weights_only=True)
    loader.collector.shutdown()
    runs.finish(run, seconds=perf_counter() - start)
    if cfg.upload:
        play.play(run=str(run))
        loggers.upload(trainer.loggers, run)
    loggers.close(trainer.loggers)
    print(f"eval/return_mean {evaluation.return_mean} at {algorithm.env_steps} env steps: {run}")
    return evaluation.return_mean


def build(cfg: DictConfig) -> tuple[Algorithm, CollectorLoader]:
    """Seed, and make the env, the algorithm and what collects for it."""
    if cfg.trainer.threads:
        torch.set_num_threads(cfg.trainer.threads)
    checkpoint.seed_everything(cfg.seed, rank=0)
    env = envs.make(envs.EnvConfig(**schema.plain(cfg.env)), seed=cfg.seed, copy=cfg.collector != "vector")
    values = {key: value for key, value in schema.plain(cfg.algo).items() if key != "_target_"}
    algorithm = schema.algorithm_class(cfg)(env=envs.describe(env), **values)
    return algorithm, collectors.make_loader(cfg.collector, env, algorithm)


def main() -> None:
    """Compose the config from the command line and train."""
    with one_sentence():
        cfg = config.compose(sys.argv[1:])
        train(cfg, runs.folder(cfg))


if __name__ == "__main__":
    main()
