"""Collective operations between the ranks of a run: all-reduce, all-gather, broadcast.

A rank is one of the data-parallel processes of a run; each has its share of the envs. All ranks must make the same
calls in the same order. In a run with one process, and before the process group is initialised, nothing is sent: every
function treats its argument as the value of the only rank.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from levin.core.errors import RunError


class RankLostError(RunError):
    """Another rank of the run has ended."""


def world_size() -> int:
    """Return the number of ranks."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Return the index of this rank, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce_sum(value: Tensor) -> Tensor:
    """Return the sum of a tensor over ranks, equal on all of them. With several ranks the sum has no gradient.

    Raises:
        RankLostError: Another rank has ended.
    """
    if world_size() == 1:
        return value
    value = value.detach().clone().contiguous()
    call_collective(lambda: dist.all_reduce(value))
    return value


def all_reduce_number(number: float) -> float:
    """Return the sum of a number over ranks. With several ranks this waits for the device."""
    return (
        number
        if world_size() == 1
        else float(all_reduce_sum(torch.tensor(number, dtype=torch.float64, device=_device())))
    )


def all_reduce_mean(value: Tensor) -> Tensor:
    """Return the mean of a tensor over ranks."""
    return value if world_size() == 1 else all_reduce_sum(value) / world_size()


def all_gather(value: Tensor) -> Tensor:
    """Return the values `[n]` of all ranks, concatenated in rank order; n must be the same on every rank."""
    if world_size() == 1:
        return value
    gathered = [torch.empty_like(value) for _ in range(world_size())]
    call_collective(lambda: dist.all_gather(gathered, value.contiguous()))
    return torch.cat(gathered)


def rank_weight(samples: int | Tensor) -> float:
    """Return the weight of this rank's mean in the average over ranks, when ranks have different numbers of samples."""
    if world_size() == 1:
        return 1.0
    return float(samples) * world_size() / all_reduce_number(float(samples))


def average_gradients(parameters: list[Tensor]) -> None:
    """Set the gradients to their mean over ranks, with a single all-reduce."""
    if world_size() == 1:
        return
    gradients = [each.grad for each in parameters if each.grad is not None]
    mean = all_reduce_mean(torch.cat([each.flatten() for each in gradients]))
    for gradient, part in zip(gradients, mean.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def any_rank(flag: bool) -> bool:
    """Return whether the flag is true on any rank."""
    return all_reduce_number(flag) > 0


def gather_objects(value: Any) -> list[Any]:
    """Return the objects of all ranks, in rank order."""
    if world_size() == 1:
        return [value]
    gathered = [None] * world_size()
    call_collective(lambda: dist.all_gather_object(gathered, value))
    return gathered


def broadcast_object(value: Any) -> Any:
    """Return the object of rank 0."""
    if world_size() == 1:
        return value
    objects = [value]
    call_collective(lambda: dist.broadcast_object_list(objects))
    return objects[0]


def barrier() -> None:
    """Wait until all ranks have made this call."""
    if world_size() > 1:
        call_collective(dist.barrier)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def call_collective(call: Callable[[], Any]) -> Any:
    """Return the result of a collective operation.

    Raises:
        RankLostError: Another rank has ended.
    """
    try:
        return call()
    except RuntimeError as error:  # raised by the backend when a peer is lost
        raise RankLostError("another process of this run has ended") from error
