"""What every gradient estimator has: where it wants the cost, and what it makes of it. No estimator's mathematics.

    E = grad_theta E_{z ~ p_theta}[f(z)]

An estimator is used in two steps, as the cost is often computed elsewhere, by an env, a critic or a decoder:

    draws = estimator.sample(dist)                    # points z of a torch.distributions.Distribution
    loss = estimator.surrogate(draws, f(draws.value)) # forward: an estimate of E f; backward: one of its gradient

Shapes: `dist` has a batch shape `[*B]` and an event shape `[*E]`; points are `[S, *B, *E]`, their costs `[S, *B]`, a
surrogate `[*B]`. What the cost depends on otherwise (a decoder, an earlier node) gets its gradient as well, unweighted.
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
MAX_SUPPORT = 10_000  # points that are enumerated


class TooManyValuesError(ValueError):
    """A finite distribution has more values than can be gone through."""


class Draws(NamedTuple):
    """Points where the cost is wanted.

    Args:
        value: The points, `[S, *B, *E]`.
        log_prob: Their log-probability, `[S, *B]`, differentiable in the parameters; None where none is needed.
        weight: Of each cost in the estimate of E f, `[S, *B]`, without a gradient; None: 1/S.
        aux: What else the estimator needs to know of them.
    """

    value: Tensor
    log_prob: Tensor | None = None
    weight: Tensor | None = None
    aux: tuple[Tensor, ...] = ()


class Estimator(ABC):
    """An estimate of a gradient of an expectation.

    Class attributes:
        families: The distributions it is for (keys of FAMILIES); None: all. `Independent` ones of them, too.
        unbiased: When its mean is the gradient, in words.
    """

    families: ClassVar[tuple[str, ...] | None] = None
    unbiased: ClassVar[str] = "always"
    instead: ClassVar[str] = "ScoreFunction or LeaveOneOut, which take any distribution"  # for other families

    @abstractmethod
    def draw(self, dist: Distribution) -> Draws:
        """The points `[S, *B, *E]`, of a distribution that it is for."""

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        """`[*B]`: a tensor of any value whose gradient is what backpropagation through the cost does not give."""
        return torch.zeros_like(cost[0])

    def mean(self, draws: Draws, cost: Tensor) -> Tensor:
        """`[S, *B] -> [*B]`: an estimate of E f, as unbiased as the points are draws."""
        return cost.mean(0) if draws.weight is None else (draws.weight * cost).sum(0)

    def sample(self, dist: Distribution) -> Draws:
        """The points `[S, *B, *E]`.

        Raises:
            TypeError: The estimator is not for that distribution.
        """
        base, _ = split_independent(dist)
        if self.families is not None and not isinstance(base, tuple(FAMILIES[each] for each in self.families)):
            names = " and ".join(FAMILIES[each].__name__ for each in self.families)
            raise TypeError(f"{type(self).__name__} is for {names}, not for {type(base).__name__}: take {self.instead}")
        return self.draw(dist)

    def surrogate(self, draws: Draws, cost: Tensor) -> Tensor:
        """`[S, *B] -> [*B]`: forward an estimate of E f, backward one of its gradient.

        Raises:
            ValueError: There is not one cost for each point.
        """
        cost = check_costs(draws, cost)
        return attach_score(self.mean(draws, cost), self.score(draws, cost))

    def __call__(self, dist: Distribution, function: Callable[[Tensor], Tensor]) -> Tensor:
        """`[*B]`: both steps, for a cost at hand, `[S, *B, *E] -> [S, *B]`."""
        draws = self.sample(dist)
        return self.surrogate(draws, function(draws.value))


def check_costs(draws: Draws, cost: Tensor) -> Tensor:
    """One cost for each point, and a floating one. Raises ValueError when there is another number of them."""
    known = draws.weight if draws.weight is not None else draws.log_prob
    points = draws.value.shape[: cost.ndim] if known is None else known.shape
    if cost.ndim == 0 or points != cost.shape:
        raise ValueError(f"a cost for each of the points {tuple(points)} is wanted, got {tuple(cost.shape)}")
    return cost if cost.is_floating_point() else cost.to(torch.get_default_dtype())


def attach_score(value: Tensor, score: Tensor) -> Tensor:
    """The value, with the gradient of both."""
    return value + (score - score.detach())  # in this order: the score may be much larger


def magic_box(log_prob: Tensor) -> Tensor:
    """1, whose derivatives of any order are those of the probability over it. Source: Foerster et al. 2018 (DiCE)."""
    return (log_prob - log_prob.detach()).exp()


def split_independent(dist: Any) -> tuple[Any, int]:
    """What `Independent` wraps, with its parameters, and how many of the batch dimensions belong to the event."""
    dims = 0
    while isinstance(dist, Independent):
        dist, dims = dist.base_dist, dims + dist.reinterpreted_batch_ndims
    return dist, dims


def trailing_sum(values: Tensor, ndim: int) -> Tensor:
    """The sum over all dimensions but the first `ndim`."""
    return values.flatten(ndim).sum(-1) if values.ndim > ndim else values


def event_sum(values: Tensor, dist: Distribution) -> Tensor:
    """`[..., *B, *E] -> [..., *B]`."""
    return trailing_sum(values, values.ndim - len(dist.event_shape))


def check_positive(name: str, value: float) -> None:
    """Raises ValueError for a temperature that is none."""
    if value <= 0:
        raise ValueError(f"{name} is a temperature above 0, got {value}")


def enumerate_values(dist: Distribution) -> tuple[Tensor, Tensor]:
    """All values of a finite distribution, also of several independent choices: `[M, *B, *E]`, log p `[M, *B]`.

    Raises:
        TooManyValuesError: There are more than `MAX_SUPPORT`.
    """
    base, dims = split_independent(dist)
    if dims == 0:
        support = base.enumerate_support()
        return support, base.log_prob(support)
    shape = base.batch_shape[len(base.batch_shape) - dims :]  # the choices
    each = base.enumerate_support(expand=False)  # [K, 1 ..., *e], with e the event of one choice
    each = each.reshape(len(each), *base.event_shape)
    if len(each) ** shape.numel() > MAX_SUPPORT:
        raise TooManyValuesError(
            f"{len(each)} ** {shape.numel()} values are too many to go through, the limit is {MAX_SUPPORT}"
        )
    # The digits of 0, 1, 2, ... in base K are every combination
    number = torch.arange(len(each) ** shape.numel(), device=each.device).unsqueeze(-1)  # [M, 1]
    place = len(each) ** torch.arange(shape.numel() - 1, -1, -1, device=each.device)  # [D]
    values = each[number // place % len(each)]  # [M, D, *e]
    values = values.view(len(values), *[1] * len(dist.batch_shape), *dist.event_shape)
    values = values.expand(-1, *dist.batch_shape, *dist.event_shape)
    return values, dist.log_prob(values)
