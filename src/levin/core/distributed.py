"""The processes of one run that learn together, each from a share of the envs: what they add up and agree on.

A rank is one of them. All go through the same calls in the same order. Where a run has one process, or none of this has
begun, every function gives what it was given.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from levin.core.errors import RunError


class RankLostError(RunError):
    """Another process of the run has ended."""


def world_size() -> int:
    """How many there are."""
    return dist.get_world_size() if dist.is_initialized() else 1


def rank() -> int:
    """Which of them this is, from 0."""
    return dist.get_rank() if dist.is_initialized() else 0


def all_reduce_sum(value: Tensor) -> Tensor:
    """The sum over ranks of a tensor, which is the same on all of them; differentiable nowhere.

    Raises:
        RankLostError: One of them is gone.
    """
    if world_size() == 1:
        return value
    value = value.detach().clone().contiguous()
    _call_collective(lambda: dist.all_reduce(value))
    return value


def all_reduce_number(number: float) -> float:
    """The sum over ranks of a number. Waits for the device where there are several."""
    return (
        number
        if world_size() == 1
        else float(all_reduce_sum(torch.tensor(number, dtype=torch.float64, device=_device())))
    )


def all_reduce_mean(value: Tensor) -> Tensor:
    """The mean over ranks of a tensor."""
    return value if world_size() == 1 else all_reduce_sum(value) / world_size()


def all_gather(value: Tensor) -> Tensor:
    """The values `[n]` of all ranks, one after the other; each has as many."""
    if world_size() == 1:
        return value
    found = [torch.empty_like(value) for _ in range(world_size())]
    _call_collective(lambda: dist.all_gather(found, value.contiguous()))
    return torch.cat(found)


def rank_weight(samples: int | Tensor) -> float:
    """What the mean over a rank's samples counts in the average over ranks, where others may have more or fewer."""
    if world_size() == 1:
        return 1.0
    return float(samples) * world_size() / all_reduce_number(float(samples))


def average_gradients(parameters: list[Tensor]) -> None:
    """Set the gradients to their mean over ranks, all by one message."""
    if world_size() == 1:
        return
    gradients = [each.grad for each in parameters if each.grad is not None]
    whole = all_reduce_mean(torch.cat([each.flatten() for each in gradients]))
    for gradient, part in zip(gradients, whole.split([each.numel() for each in gradients]), strict=True):
        gradient.copy_(part.view_as(gradient))


def any_rank(wish: bool) -> bool:
    """Whether any of them wants to."""
    return all_reduce_number(wish) > 0


def gather_objects(value: Any) -> list[Any]:
    """What each of them has, in their order."""
    if world_size() == 1:
        return [value]
    found = [None] * world_size()
    _call_collective(lambda: dist.all_gather_object(found, value))
    return found


def broadcast_object(value: Any) -> Any:
    """What the first of them has."""
    if world_size() == 1:
        return value
    found = [value]
    _call_collective(lambda: dist.broadcast_object_list(found))
    return found[0]


def barrier() -> None:
    """Wait until all of them are here."""
    if world_size() > 1:
        _call_collective(dist.barrier)


def _device() -> torch.device:
    return torch.device("cuda", torch.cuda.current_device()) if dist.get_backend() == "nccl" else torch.device("cpu")


def _call_collective(call: Callable[[], Any]) -> None:
    try:
        call()
    except RuntimeError as error:  # of the backend, in its own words
        raise RankLostError("another process of this run has ended") from error
