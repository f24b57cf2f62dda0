"""Interface of all gradient estimators, and the functions that they share.

An estimator estimates grad_theta E_{z ~ p_theta}[f(z)] for a cost f. It is used in two steps, because the cost is often
computed elsewhere, by an env, a critic or a decoder:

    draws = estimator.sample(dist)                    # points z at which to evaluate the cost
    loss = estimator.surrogate(draws, f(draws.value)) # forward: an estimate of E f; backward: one of its gradient

Most points are samples from `dist`, a torch.distributions.Distribution; some estimators also use other points, such as
all values of `dist` or relaxed samples.

Shapes: `dist` has the batch shape `[*B]` and the event shape `[*E]`; points are `[S, *B, *E]`, their costs `[S, *B]`, a
surrogate `[*B]`. Other parameters of the cost (a decoder, an earlier node) get the gradient of the estimate of E f by
ordinary backpropagation.
"""

from abc import ABC, abstractmethod
from collections.abc import Callable
from typing import Any, ClassVar, NamedTuple

import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Categorical,
    Distribution,
    Independent,
    Normal,
    OneHotCategorical,
    Poisson,
)

FAMILIES = {
    "bernoulli": Bernoulli,
    "categorical": Categorical,
    "one_hot": OneHotCategorical,
    "normal": Normal,
    "poisson": Poisson,
}
MAX_SUPPORT = 10_000  # largest number of values that is enumerated


class TooManyValuesError(ValueError):
    """A finite distribution has more than `MAX_SUPPORT` values, too many to enumerate."""


class Draws(NamedTuple):
    """Points at which the cost is evaluated, with what the estimator needs to turn costs into a surrogate.

    Args:
        value: Points, `[S, *B, *E]`.
        log_prob: Log-probability of each point, or another term `[S, *B]` that the estimator differentiates in the
            parameters of the distribution; None if it needs none.
        weight: Weight of each cost in the estimate of E f, `[S, *B]`, without a gradient; None: 1/S.
        aux: Further tensors that only the estimator itself reads.
    """

    value: Tensor
    log_prob: Tensor | None = None
    weight: Tensor | None = None
    aux: tuple[Tensor, ...] = ()


class Estimator(ABC):
    """Base class of all gradient estimators. A subclass defines `draw` and, unless it is pathwise, `score`.

    Class attributes:
        families: Supported distributions (keys of FAMILIES), also inside `Independent`; None: all.
        unbiased: Condition under which the estimate is unbiased, in words.
        instead: Estimators to suggest in the error message for an unsupported distribution.
    """

    families: ClassVar[tuple[str, ...] | None] = None
    unbiased: ClassVar[str] = "always"
    instead: ClassVar[str] = "ScoreFunction or LeaveOneOut, which take any distribution"

    @abstractmethod
    def draw(self, dist: Distribution) -> Draws:
        """Return the points `[S, *B, *E]` for a supported distribution. Callers use `sample`, which checks `dist`."""

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        """Return a tensor `[*B]` whose gradient is the part that backpropagation through the cost does not give.

        Only its gradient is used, not its value. The default is zero, for pathwise estimators.
        """
        return torch.zeros_like(cost[0])

    def mean(self, draws: Draws, cost: Tensor) -> Tensor:
        """Return an estimate of E f, the weighted sum of the costs: `[S, *B] -> [*B]`.

        It is unbiased unless the points are relaxed or sampled at another temperature.
        """
        return cost.mean(0) if draws.weight is None else (draws.weight * cost).sum(0)

    def sample(self, dist: Distribution) -> Draws:
        """Return the points `[S, *B, *E]` at which to evaluate the cost.

        Raises:
            TypeError: The estimator does not support this distribution.
        """
        base, _ = split_independent(dist)
        if self.families is not None and not isinstance(base, tuple(FAMILIES[name] for name in self.families)):
            names = " and ".join(FAMILIES[name].__name__ for name in self.families)
            raise TypeError(f"{type(self).__name__} is for {names}, not for {type(base).__name__}: use {self.instead}")
        return self.draw(dist)

    def surrogate(self, draws: Draws, cost: Tensor) -> Tensor:
        """Return the surrogate `[*B]` of costs `[S, *B]`: its value estimates E f, its gradient grad E f.

        Raises:
            ValueError: The costs are not one per point.
        """
        cost = check_costs(draws, cost)
        return attach_score(self.mean(draws, cost), self.score(draws, cost))

    def __call__(self, dist: Distribution, function: Callable[[Tensor], Tensor]) -> Tensor:
        """Return the surrogate `[*B]` of a cost function `[S, *B, *E] -> [S, *B]`: both steps in one call."""
        draws = self.sample(dist)
        return self.surrogate(draws, function(draws.value))


def check_costs(draws: Draws, cost: Tensor) -> Tensor:
    """Return the costs as floating-point numbers. Raises ValueError unless there is one cost per point."""
    per_point = draws.weight if draws.weight is not None else draws.log_prob
    points = draws.value.shape[: cost.ndim] if per_point is None else per_point.shape
    if cost.ndim == 0 or points != cost.shape:
        raise ValueError(
            f"the cost needs one value per point, shape {tuple(points)}, but has shape {tuple(cost.shape)}"
        )
    return cost if cost.is_floating_point() else cost.to(torch.get_default_dtype())


def attach_score(value: Tensor, score: Tensor) -> Tensor:
    """Return `value`, with the gradient of `value + score`."""
    return value + (score - score.detach())  # the parentheses keep the digits of `value` if the score is much larger


def magic_box(log_prob: Tensor) -> Tensor:
    """Return exp(log p - sg(log p)): its value is 1, its derivatives of any order are those of p divided by p.

    Source: Foerster et al. 2018 (DiCE).
    """
    return (log_prob - log_prob.detach()).exp()


def split_independent(dist: Any) -> tuple[Any, int]:
    """Return the distribution inside `Independent`, and how many of its batch dimensions belong to the event."""
    dims = 0
    while isinstance(dist, Independent):
        dist, dims = dist.base_dist, dims + dist.reinterpreted_batch_ndims
    return dist, dims


def trailing_sum(values: Tensor, ndim: int) -> Tensor:
    """Return the sum over all dimensions after the first `ndim`."""
    return values.flatten(ndim).sum(-1) if values.ndim > ndim else values


def event_sum(values: Tensor, dist: Distribution) -> Tensor:
    """Return the sum over the event dimensions, `[..., *B, *E] -> [..., *B]`."""
    return trailing_sum(values, values.ndim - len(dist.event_shape))


def check_positive(name: str, value: float) -> None:
    """Check that a temperature is above 0. Raises ValueError if not."""
    if value <= 0:
        raise ValueError(f"{name} is a temperature and must be above 0, got {value}")


def enumerate_values(dist: Distribution) -> tuple[Tensor, Tensor]:
    """Return all values of a finite distribution, `[M, *B, *E]`, and their log-probabilities, `[M, *B]`.

    The values of several independent variables are all combinations of their values.

    Raises:
        TooManyValuesError: There are more than `MAX_SUPPORT` combinations of independent variables.
    """
    base, dims = split_independent(dist)
    if dims == 0:
        support = base.enumerate_support()
        return support, base.log_prob(support)
    shape = base.batch_shape[len(base.batch_shape) - dims :]  # of the independent variables
    support = base.enumerate_support(expand=False)  # [K, 1 ..., *e], with e the event of one variable
    support = support.reshape(len(support), *base.event_shape)
    if len(support) ** shape.numel() > MAX_SUPPORT:
        raise TooManyValuesError(
            f"{len(support)} ** {shape.numel()} values are too many to enumerate, the limit is {MAX_SUPPORT}"
        )
    # The digits of 0, 1, 2, ... in base K give every combination
    number = torch.arange(len(support) ** shape.numel(), device=support.device).unsqueeze(-1)  # [M, 1]
    place = len(support) ** torch.arange(shape.numel() - 1, -1, -1, device=support.device)  # [D]
    values = support[number // place % len(support)]  # [M, D, *e]
    values = values.view(len(values), *[1] * len(dist.batch_shape), *dist.event_shape)
    values = values.expand(-1, *dist.batch_shape, *dist.event_shape)
    return values, dist.log_prob(values)
