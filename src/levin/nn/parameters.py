"""Flatten, assign, clip and freeze the parameters of networks."""

from collections.abc import Iterable, Iterator, Sequence
from contextlib import contextmanager

import torch
from torch import Tensor, nn


@contextmanager
def freeze(parameters: Iterable[Tensor]) -> Iterator[None]:
    """Let gradients flow through these parameters without computing any for them. Those frozen before stay frozen."""
    parameters = [each for each in parameters if each.requires_grad]
    for parameter in parameters:
        parameter.requires_grad_(False)
    try:
        yield
    finally:
        for parameter in parameters:
            parameter.requires_grad_(True)


class FlatParameter(nn.Parameter):
    """Vector `[P]` of which parameters are views; their gradients are views of its gradient.

    Attributes:
        parts: These parameters.
    """

    parts: list[nn.Parameter]

    @property
    def is_whole(self) -> bool:
        """Whether all parts are still views: a part of two vectors is a view of the later one."""
        place = self.untyped_storage().data_ptr()
        return all(part.untyped_storage().data_ptr() == place for part in self.parts)

    @torch.no_grad()
    def zero(self) -> None:
        """Set the gradient to zero in place, so that the views of it stay valid."""
        assert self.grad is not None
        self.grad.zero_()


@torch.no_grad()
def clip_grad_norm(parameters: Sequence[Tensor], max_norm: float) -> None:
    """Scale the gradients so that their joint norm is at most `max_norm`, as `torch.nn.utils.clip_grad_norm_` does."""
    if len(parameters) > 1:
        nn.utils.clip_grad_norm_(parameters, max_norm, foreach=True)
    else:  # for a single vector this is many times as fast
        gradient = parameters[0].grad
        assert gradient is not None
        gradient.mul_((max_norm / (gradient.norm() + 1e-6)).clamp_(max=1.0))


def flatten_parameters(parameters: Iterable[nn.Parameter]) -> FlatParameter:
    """Make parameters views of one vector, and return that vector for the optimiser to step on.

    Clipping, zeroing and stepping on a dozen small tensors one by one takes as long as a quarter of a small update.
    Call this when the parameters are on their device. After that, nothing may replace their gradients.
    """
    parameters = list(parameters)
    flat = FlatParameter(torch.cat([each.detach().flatten() for each in parameters]))
    flat.parts, flat.grad = parameters, torch.zeros_like(flat)
    sizes = [each.numel() for each in parameters]
    for each, data, gradient in zip(parameters, flat.data.split(sizes), flat.grad.split(sizes), strict=True):
        each.data, each.grad = data.view_as(each), gradient.view_as(each)
    return flat


@torch.no_grad()
def assign_parameters(parameters: Iterable[Tensor], vector: Tensor) -> None:
    """Copy the parts of a vector `[P]` into parameters.

    PyTorch's own `vector_to_parameters` makes them views of the vector. These are aligned differently in memory, so
    products with them round differently, and a resumed run, whose parameters are no views, would differ from an
    uninterrupted one.
    """
    parameters = list(parameters)
    for parameter, part in zip(parameters, vector.split([each.numel() for each in parameters]), strict=True):
        parameter.copy_(part.view_as(parameter))
