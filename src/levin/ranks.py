"""The processes of one run that learn together, each from a share of the envs: what they add up and agree on.

A rank is one of them. All go through the same calls in the same order. Where a run has one process, or none of this has
begun, every function gives what it was given.
"""

import os
from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from lightning.fabric.plugins.environments import ClusterEnvironment, SLURMEnvironment, TorchElasticEnvironment
from omegaconf import DictConfig, OmegaConf
from torch import Tensor

from levin.errors import ConfigError, RunError

# What the config says of all ranks together, and each has an equal share of.
SHARED = (
    *("env.num_envs", "algo.batch_size", "algo.buffer_size"),
    *("algo.transitions_per_update", "algo.episodes_per_update"),
)


class RankLostError(RunError):
    """Another process of the run has ended."""


def size() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def total(value: Tensor) -> Tensor:
    """The sum over ranks of a tensor, which is the same on all of them; differentiable nowhere.

    Raises:
        RankLostError: One of them is gone.
    """
    if size() == 1:
        return value
    value = value.detach().clone().contiguous()
    _together(lambda: dist.all_reduce(value))
    return value


def total_number(number: float) -> float:
    """The sum over ranks of a number. Waits for the device where there are several."""
    return number if size() == 1 else float(total(torch.tensor(number, dtype=torch.float64, device=_device())))


def average(value: Tensor) -> Tensor:
    """The mean over ranks of a tensor."""
    return value if size() == 1 else total(value) / size()


def everything(value: Tensor) -> Tensor:
    """The values `[n]` of all ranks, one after the other; each has as many."""
    if size() == 1:
        return value
    found = [torch.empty_like(value) for _ in range(size())]
    _together(lambda: dist.all_gather(found, value.contiguous()))
    return torch.cat(found)


def weight(samples: int | Tensor) -> float:
    """What the mean over a rank's samples counts in the average over ranks, where others may have more or fewer."""
    if size() == 1:
        return 1.0
    return float(samples) * size() / total_number(float(samples))


def average_gradients(parameters: list[Tensor]) -> None:
    """Set the gradients to their mean over ranks, all by one message."""
    if size() == 1:
        return
    gradients = [each.grad for each in parameters if each.grad is not None]
    whole = average(torch.cat([each.flatten() for each in gradients]))
    for gradient, part in zip(gradients, whole.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def agree(wish: bool) -> bool:
    """Whether any of them wants to."""
    return total_number(wish) > 0


def gather(value: Any) -> list[Any]:
    """What each of them has, in their order."""
    if size() == 1:
        return [value]
    found = [None] * size()
    _together(lambda: dist.all_gather_object(found, value))
    return found


def broadcast(value: Any) -> Any:
    """What the first of them has."""
    if size() == 1:
        return value
    found = [value]
    _together(lambda: dist.broadcast_object_list(found))
    return found[0]


def barrier() -> None:
    """Wait until all of them are here."""
    if size() > 1:
        _together(dist.barrier)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _together(call: Callable[[], Any]) -> None:
    try:
        call()
    except RuntimeError as error:  # of the backend, in its own words
        raise RankLostError("another process of this run has ended") from error


def planned(config: DictConfig) -> int:
    """How many processes a run is to have."""
    if config.trainer.strategy == "hogwild":
        return 1
    return config.trainer.devices * config.trainer.get("num_nodes", 1)


def of_this_process(config: DictConfig) -> int:
    """Which rank this process is, before the run has begun: torchrun, srun and `levin.data_parallel` say so.

    Raises:
        ConfigError: They have started more or fewer than the config wants.
    """
    ranks = planned(config)
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


def share(config: DictConfig) -> DictConfig:
    """The config of one rank: numbers that are of all of them together are divided.

    Raises:
        ConfigError: One of them can't be.
    """
    ranks = planned(config)
    if ranks == 1:
        return config
    config = config.copy()
    OmegaConf.set_readonly(config, False)
    for key in SHARED:
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
