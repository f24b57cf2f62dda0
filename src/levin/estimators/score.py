"""The score function and its baselines: any distribution with a `log_prob`, any cost.

grad E f = E[(f(z) - b) grad log p(z)]        b independent of this z
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from levin.estimators.base import Draws, Estimator, enumerate_values, event_sum, magic_box, split_independent


def check_num_draws(name: str, num: int, least: int) -> None:
    """Raises ValueError when an estimator is asked for with too few draws."""
    if num < least:
        raise ValueError(f"{name} needs {least} draws or more, got {num}")


@dataclass(frozen=True)
class Exact(Estimator):
    """sum_z grad p(z) f(z): every value of a finite distribution; of D independent choices, K^D. Variance 0.

    Its points are all values, so that E f is exact as well.
    """

    families: ClassVar = ("bernoulli", "categorical", "one_hot")

    def draw(self, dist: Distribution) -> Draws:
        return self.at(dist, enumerate_values(dist)[0])

    def at(self, dist: Distribution, values: Tensor) -> Draws:
        """All values `[M, *B, *E]`, or all that have a probability."""
        log_prob = dist.log_prob(values)
        return Draws(values, log_prob, log_prob.detach().exp())

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        assert draws.log_prob is not None
        return (draws.log_prob.exp() * cost.detach()).sum(0)


@dataclass(frozen=True)
class ScoreFunction(Estimator):
    """(f - b) grad log p, averaged over the draws. Source: Williams 1992; the lecture's row 3.

    Args:
        num: Draws.
        baseline: b, a number or a tensor `[*B]` that does not know these draws: a constant, V(x) from other data.
    """

    num: int = 1
    baseline: float | Tensor = 0.0
    unbiased: ClassVar = "always, with a baseline that does not depend on the draw"

    def __post_init__(self) -> None:
        check_num_draws("ScoreFunction", self.num, 1)

    def draw(self, dist: Distribution) -> Draws:
        return draws_at(dist, dist.sample(torch.Size([self.num])))

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        if isinstance(self.baseline, Tensor) and self.baseline.shape != cost.shape[1:]:
            shapes = f"{tuple(self.baseline.shape)}, and the costs are {tuple(cost.shape)}"
            raise ValueError(f"a baseline has the shape of the batch, got {shapes}")
        return weighted_score(draws, cost - self.baseline)


class MovingAverage(Estimator, nn.Module):
    """The score function with an exponential average of the costs of earlier calls as baseline.

    The costs at hand enter it after they were weighed: with them in it the estimate would be biased.

    Args:
        decay: Of the average, in [0, 1).
        num: Draws.
    """

    unbiased: ClassVar = "always, as only the past is in the baseline"
    average: Tensor
    total: Tensor

    def __init__(self, decay: float = 0.95, num: int = 1) -> None:
        super().__init__()
        check_num_draws("MovingAverage", num, 1)
        if not 0 <= decay < 1:
            raise ValueError(f"a decay is in [0, 1), got {decay}")
        self.decay, self.num = decay, num
        # [1] and not []: torch.compile of 2.13 loses what is written into a double without a dimension.
        self.register_buffer("average", torch.zeros(1))
        self.register_buffer("total", torch.zeros(1))  # of the weights, so that the first costs count in full

    def draw(self, dist: Distribution) -> Draws:
        return draws_at(dist, dist.sample(torch.Size([self.num])))

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        score = weighted_score(draws, cost - self.average / self.total.clamp(min=1e-8))
        with torch.no_grad():
            self.average.lerp_(cost.mean().to(self.average), 1 - self.decay)
            self.total.lerp_(torch.ones_like(self.total), 1 - self.decay)
        return score

    __call__ = Estimator.__call__  # and not that of a module


@dataclass(frozen=True)
class SelfCritical(Estimator):
    """The score function with f at the most probable value as baseline. Source: Rennie et al. 2017.

    Args:
        num: Draws; one more evaluation is that of the baseline.
    """

    num: int = 1
    families: ClassVar = ("bernoulli", "categorical", "one_hot", "normal")

    def __post_init__(self) -> None:
        check_num_draws("SelfCritical", self.num, 1)

    def draw(self, dist: Distribution) -> Draws:
        drawn = dist.sample(torch.Size([self.num]))
        value = torch.cat([drawn, most_probable(dist).detach().unsqueeze(0).to(drawn)])
        weight = torch.full(
            [self.num + 1, *dist.batch_shape], 1 / self.num, device=value.device, dtype=parameter_dtype(dist)
        )
        weight[-1] = 0  # no draw
        return Draws(value, dist.log_prob(value), weight)

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        return weighted_score(draws, cost - cost[-1])


@dataclass(frozen=True)
class LeaveOneOut(Estimator):
    """1/(n-1) sum_i (f_i - mean f) grad log p(z_i): the baseline of a draw is the mean cost of the others.

    Source: Mnih and Rezende 2016 (VIMCO's idea), Kool et al. 2019 a (RLOO).

    Args:
        num: Draws, 2 or more, independent given the parameters.
    """

    num: int = 2
    unbiased: ClassVar = "always, for two draws or more"

    def __post_init__(self) -> None:
        check_num_draws("LeaveOneOut", self.num, 2)

    def draw(self, dist: Distribution) -> Draws:
        return draws_at(dist, dist.sample(torch.Size([self.num])))

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        return weighted_score(draws, cost - cost.mean(0)) * (self.num / (self.num - 1))


@dataclass(frozen=True)
class OptimalConstant(Estimator):
    """The score function with b* = E[f |s|^2] / E[|s|^2], s = grad log p: of all constants the one of least variance.

    The expectations are those of the other draws, in the logits, or in the mean of a Normal. Source: Greensmith et al.
    2004.

    Args:
        num: Draws, 2 or more.
    """

    num: int = 4
    families: ClassVar = ("bernoulli", "categorical", "one_hot", "normal")
    unbiased: ClassVar = "always: the constant of a draw is made of the others"

    def __post_init__(self) -> None:
        check_num_draws("OptimalConstant", self.num, 2)

    def draw(self, dist: Distribution) -> Draws:
        value = dist.sample(torch.Size([self.num]))
        return draws_at(dist, value, (squared_score(dist, value),))

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        (square,) = draws.aux
        others, costs = square.sum(0) - square, (square * cost.detach()).sum(0) - square * cost.detach()
        return weighted_score(draws, cost - costs / others.clamp(min=1e-12))


@dataclass(frozen=True)
class Dice(Estimator):
    """f times the magic box of log p: gradients of any order, through several sampling steps too.

    Source: Foerster et al. 2018.

    Args:
        num: Draws.
    """

    num: int = 1
    unbiased: ClassVar = "always, at every order"

    def __post_init__(self) -> None:
        check_num_draws("Dice", self.num, 1)

    def draw(self, dist: Distribution) -> Draws:
        return draws_at(dist, dist.sample(torch.Size([self.num])))

    def mean(self, draws: Draws, cost: Tensor) -> Tensor:
        assert draws.log_prob is not None
        return (magic_box(draws.log_prob) * cost).mean(0)


def draws_at(dist: Distribution, value: Tensor, aux: tuple[Tensor, ...] = ()) -> Draws:
    """Points `[S, *B, *E]` that were drawn, with their log-probability."""
    value = value.detach()
    return Draws(value, dist.log_prob(value), None, aux)


def weighted_score(draws: Draws, weight: Tensor) -> Tensor:
    """sum_s w_s weight_s log p(z_s): its gradient is the score function's. `[S, *B] -> [*B]`."""
    assert draws.log_prob is not None
    terms = weight.detach() * draws.log_prob
    return terms.mean(0) if draws.weight is None else (draws.weight * terms).sum(0)


def most_probable(dist: Distribution) -> Tensor:
    """The most probable value `[*B, *E]`; of a Bernoulli with p = 1/2, 0."""
    base, _ = split_independent(dist)
    if isinstance(base, torch.distributions.Bernoulli):
        return (base.logits > 0).to(base.logits)
    return base.mode


def squared_score(dist: Distribution, value: Tensor) -> Tensor:
    """|grad log p(z)|^2 in the logits, or in the mean of a Normal: `[S, *B]`."""
    base, _ = split_independent(dist)
    with torch.no_grad():
        if isinstance(base, torch.distributions.Normal):
            return event_sum(((value - base.loc) / base.scale**2).square(), dist)
        if isinstance(base, torch.distributions.Categorical):  # z is a number: (z - p)^2 of its one-hot form
            probs = base.probs.expand(*value.shape, -1)
            return event_sum(1 - 2 * probs.gather(-1, value.unsqueeze(-1)).squeeze(-1) + probs.square().sum(-1), dist)
        return event_sum((value - base.probs).square(), dist)


def parameter_dtype(dist: Distribution) -> torch.dtype:
    """Of the parameters, and so of the costs."""
    base, _ = split_independent(dist)
    return base.loc.dtype if isinstance(base, torch.distributions.Normal) else base.logits.dtype
