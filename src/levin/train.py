"""Train an algorithm: compose -> seed -> build -> `Trainer.fit`. `python -m levin.train algo=sac env=pendulum`."""

import sys
from pathlib import Path
from time import perf_counter

import torch
from hydra.utils import get_class, instantiate
from lightning import Trainer
from omegaconf import DictConfig

from levin import callbacks, checkpoint, collectors, config, envs, loggers, play, provenance, runs
from levin.algorithms.base import Algorithm
from levin.collectors import CollectorLoader
from levin.errors import one_sentence


def train(cfg: DictConfig, run: Path, ckpt_path: Path | None = None) -> float | None:
    """Train in the run folder, from a checkpoint if one is given. Returns the mean of the last evaluation."""
    start = perf_counter()
    runs.quiet()
    runs.keep_freed_memory()
    algorithm, loader, trainer_options = build(cfg)
    facts = provenance.collect()
    runs.create(run, cfg, facts, resumed=ckpt_path is not None)
    print(f"{cfg.name}, seed {cfg.seed}: {run}", flush=True)
    wandb_id = None if ckpt_path is None else checkpoint.wandb_id(ckpt_path)
    logger = loggers.make(cfg.logger, run, config.plain(cfg), facts["git_sha"], wandb_id)
    metrics = callbacks.Metrics(cfg.log_every)
    evaluation = callbacks.Evaluation(**cfg.eval, env=loader.env_config, metrics=metrics)
    trainer = Trainer(
        **trainer_options,
        logger=logger,
        callbacks=[
            callbacks.Budget(cfg.total_env_steps),
            callbacks.Throughput(metrics),
            evaluation,
            metrics,
            callbacks.Checkpointing(**cfg.checkpoint, run=run, evaluation=evaluation),
            callbacks.ProgressBar(cfg.total_env_steps, metrics),
            *(instantiate(each) for each in cfg.callbacks.values()),
        ],
    )
    trainer.fit(algorithm, loader, ckpt_path=ckpt_path, weights_only=True)
    loader.collector.shutdown()
    runs.finish(run, seconds=perf_counter() - start)
    if cfg.upload:
        play.play(run=str(run))
        loggers.upload(logger, run)
    loggers.close(logger)
    print(f"eval/return_mean {evaluation.return_mean} at {algorithm.env_steps} env steps: {run}")
    return evaluation.return_mean


def build(cfg: DictConfig) -> tuple[Algorithm, CollectorLoader, dict]:
    """Everything that can be refused, before anything is written."""
    options = dict(config.plain(cfg.trainer))
    threads = options.pop("threads")
    if threads:
        torch.set_num_threads(threads)
    checkpoint.seed_everything(cfg.seed, rank=0)
    env = envs.make(envs.EnvConfig(**config.plain(cfg.env)), seed=cfg.seed, copy=cfg.collector != "vector")
    values = config.plain(cfg.algo)
    algorithm: Algorithm = get_class(values.pop("_target_"))(env=envs.describe(env), **values)
    loader = collectors.make_loader(cfg.collector, env, algorithm)
    plugins = [checkpoint.FolderCheckpointIO()]
    fixed = {"max_epochs": -1, "enable_checkpointing": False, "enable_progress_bar": False}
    quiet = {"enable_model_summary": False, "num_sanity_val_steps": 0, "use_distributed_sampler": False}
    return algorithm, loader, {**fixed, **quiet, "plugins": plugins, **options}


def main() -> None:
    """Compose the config from the command line and train."""
    with one_sentence():
        cfg = config.compose(sys.argv[1:])
        train(cfg, runs.folder(cfg))


if __name__ == "__main__":
    main()
