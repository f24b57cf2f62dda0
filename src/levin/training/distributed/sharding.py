"""Divide a config among the ranks of a run, and find which rank this process is."""

import os
from collections.abc import Iterator
from contextlib import contextmanager

from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from omegaconf import DictConfig, OmegaConf

from levin.core.errors import ConfigError, one_line

# Values that the config gives for all ranks together; each rank gets an equal share.
SHARDED_KEYS = (
    *("env.num_envs", "algo.batch_size", "algo.buffer_size"),
    *("algo.transitions_per_update", "algo.episodes_per_update"),
)


def configured_world_size(config: DictConfig) -> int:
    """Return the number of ranks that the config asks for. Hogwild workers don't count: they are in one rank."""
    if config.trainer.strategy == "hogwild":
        return 1
    return config.trainer.devices * config.trainer.get("num_nodes", 1)


def process_rank(config: DictConfig) -> int:
    """Return the rank of this process from the environment variables of torchrun, srun or `RanksLauncher`.

    Needs no process group: it works before training starts.

    Raises:
        ConfigError: The number of processes that were started is not the one in the config.
    """
    ranks = configured_world_size(config)
    environment: ClusterEnvironment | None = None
    if TorchElasticEnvironment.detect():
        environment = TorchElasticEnvironment()
    elif ranks > 1 and SLURMEnvironment.detect():
        try:
            environment = SLURMEnvironment()
        except RuntimeError as error:  # as with --ntasks instead of --ntasks-per-node
            raise ConfigError(f"srun: {one_line(error)}") from error
    if environment is None:
        return int(os.environ.get("LOCAL_RANK", "0")) if ranks > 1 else 0
    if environment.world_size() != ranks:
        raise ConfigError(
            f"{environment.world_size()} processes were started, but trainer.devices={config.trainer.devices} "
            f"and trainer.num_nodes={config.trainer.get('num_nodes', 1)} need {ranks}"
        )
    return environment.global_rank()


@contextmanager
def explain_shares(ranks: int) -> Iterator[None]:
    """Explain in a ConfigError that its numbers are those of one rank, a share of those in the config."""
    try:
        yield
    except ConfigError as error:
        named = [key for key in SHARDED_KEYS if key.rpartition(".")[2] in str(error)]
        if ranks == 1 or not named:
            raise
        raise ConfigError(
            f"{error} (numbers of one rank: each of the {ranks} ranks gets 1/{ranks} of {' and '.join(named)})"
        ) from error


def shard_config(config: DictConfig) -> DictConfig:
    """Return the config of one rank: the values of `SHARDED_KEYS` are divided by the number of ranks.

    Raises:
        ConfigError: A value can't be divided equally.
    """
    ranks = configured_world_size(config)
    if ranks == 1:
        return config
    config = config.copy()
    OmegaConf.set_readonly(config, False)
    for key in SHARDED_KEYS:
        number = OmegaConf.select(config, key)
        if number is None:
            continue
        if number % ranks:
            raise ConfigError(
                f"{key}={number} can't be divided equally among {ranks} ranks: set {key}={-(-number // ranks) * ranks}"
            )
        OmegaConf.update(config, key, number // ranks)
    OmegaConf.set_readonly(config, True)
    return config
