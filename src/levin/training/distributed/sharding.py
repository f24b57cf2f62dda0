"""Divide a config among the ranks of a run, and find which rank this process is."""

import os

from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from omegaconf import DictConfig, OmegaConf

from levin.core.errors import ConfigError

# What the config says of all ranks together, and each has an equal share of.
SHARDED_KEYS = (
    *("env.num_envs", "algo.batch_size", "algo.buffer_size"),
    *("algo.transitions_per_update", "algo.episodes_per_update"),
)


def configured_world_size(config: DictConfig) -> int:
    """How many processes a run is to have."""
    if config.trainer.strategy == "hogwild":
        return 1
    return config.trainer.devices * config.trainer.get("num_nodes", 1)


def process_rank(config: DictConfig) -> int:
    """Which rank this process is, before the run has begun: torchrun, srun and `data_parallel.RanksLauncher` say so.

    Raises:
        ConfigError: They have started more or fewer than the config wants.
    """
    ranks = configured_world_size(config)
    environment: ClusterEnvironment | None = None
    if TorchElasticEnvironment.detect():
        environment = TorchElasticEnvironment()
    elif ranks > 1 and SLURMEnvironment.detect():
        environment = SLURMEnvironment()
    if environment is None:
        return int(os.environ.get("LOCAL_RANK", "0")) if ranks > 1 else 0
    if environment.world_size() != ranks:
        raise ConfigError(
            f"{environment.world_size()} processes were started for trainer.devices={config.trainer.devices} "
            f"times trainer.num_nodes={config.trainer.get('num_nodes', 1)}"
        )
    return environment.global_rank()


def shard_config(config: DictConfig) -> DictConfig:
    """The config of one rank: numbers that are of all of them together are divided.

    Raises:
        ConfigError: One of them can't be.
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
                f"{key}={number} is of all {ranks} ranks together and can't be divided: "
                f"set {key}={-(-number // ranks) * ranks}"
            )
        OmegaConf.update(config, key, number // ranks)
    OmegaConf.set_readonly(config, True)
    return config
