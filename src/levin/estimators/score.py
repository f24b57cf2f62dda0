"""Score-function estimators and their baselines, for any cost and any distribution with a `log_prob`.

grad E f = E[(f(z) - b) grad log p(z)]        b independent of this z
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Distribution

from levin.estimators.base import Draws, Estimator, enumerate_values, event_sum, magic_box, split_independent


def check_num_draws(name: str, num: int, least: int) -> None:
    """Check that an estimator has at least `least` samples. Raises ValueError if not."""
    if num < least:
        raise ValueError(f"{name} needs {least} or more samples, got {num}")


@dataclass(frozen=True)
class Exact(Estimator):
    """Exact gradient of a finite distribution, sum_z grad p(z) f(z), with variance 0.

    Its points are all values, K^D for D independent variables of K values, so the value of the surrogate is exact too.
    """

    families: ClassVar = ("bernoulli", "categorical", "one_hot")

    def draw(self, dist: Distribution) -> Draws:
        return self.at(dist, enumerate_values(dist)[0])

    def at(self, dist: Distribution, values: Tensor) -> Draws:
        """Return `values` `[M, *B, *E]` as points; they must include every value with a probability above 0."""
        log_prob = dist.log_prob(values)
        return Draws(values, log_prob, log_prob.detach().exp())

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        assert draws.log_prob is not None
        return (draws.log_prob.exp() * cost.detach()).sum(0)


@dataclass(frozen=True)
class ScoreFunction(Estimator):
    """Score function, (f - b) grad log p, averaged over the samples. Source: Williams 1992.

    Args:
        num: Number of samples.
        baseline: Baseline b, a number or a tensor `[*B]` that does not depend on these samples, such as V(x).
    """

    num: int = 1
    baseline: float | Tensor = 0.0
    unbiased: ClassVar = "always, with a baseline that does not depend on the sample"

    def __post_init__(self) -> None:
        check_num_draws("ScoreFunction", self.num, 1)

    def draw(self, dist: Distribution) -> Draws:
        return draws_at(dist, dist.sample(torch.Size([self.num])))

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        if isinstance(self.baseline, Tensor) and self.baseline.shape != cost.shape[1:]:
            shapes = f"{tuple(self.baseline.shape)} for costs of shape {tuple(cost.shape)}"
            raise ValueError(f"the baseline must have the batch shape of the costs, got {shapes}")
        return weighted_score(draws, cost - self.baseline)


class MovingAverage(Estimator, nn.Module):
    """Score function whose baseline is an exponential average of the costs of earlier calls.

    The average is updated after the current costs are used, because a baseline that contains them would bias the
    estimate.

    Args:
        decay: Decay of the average, in [0, 1).
        num: Number of samples.
    """

    unbiased: ClassVar = "always, as the baseline contains only earlier costs"
    average: Tensor
    total: Tensor

    def __init__(self, decay: float = 0.95, num: int = 1) -> None:
        super().__init__()
        check_num_draws("MovingAverage", num, 1)
        if not 0 <= decay < 1:
            raise ValueError(f"decay must be in [0, 1), got {decay}")
        self.decay, self.num = decay, num
        # Shape [1], not []: torch.compile 2.13 loses in-place updates of a zero-dimensional float64 tensor
        self.register_buffer("average", torch.zeros(1))
        self.register_buffer("total", torch.zeros(1))  # sum of the weights, corrects the bias towards the initial 0

    def draw(self, dist: Distribution) -> Draws:
        return draws_at(dist, dist.sample(torch.Size([self.num])))

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        score = weighted_score(draws, cost - self.average / self.total.clamp(min=1e-8))
        with torch.no_grad():
            self.average.lerp_(cost.mean().to(self.average), 1 - self.decay)
            self.total.lerp_(torch.ones_like(self.total), 1 - self.decay)
        return score

    __call__ = Estimator.__call__  # not nn.Module's


@dataclass(frozen=True)
class SelfCritical(Estimator):
    """Score function whose baseline is f at the most probable value. Source: Rennie et al. 2017.

    Args:
        num: Number of samples; the baseline takes one more evaluation.
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
        weight[-1] = 0  # the mode is not a sample
        return Draws(value, dist.log_prob(value), weight)

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        return weighted_score(draws, cost - cost[-1])


@dataclass(frozen=True)
class LeaveOneOut(Estimator):
    """Leave-one-out (RLOO): the baseline of a sample is the mean cost of the others.

    The estimate is 1/(n-1) sum_i (f_i - mean f) grad log p(z_i). Source: Kool et al. 2019 a; the idea is that of VIMCO,
    Mnih and Rezende 2016.

    Args:
        num: Number of independent samples, 2 or more.
    """

    num: int = 2
    unbiased: ClassVar = "always, for two or more samples"

    def __post_init__(self) -> None:
        check_num_draws("LeaveOneOut", self.num, 2)

    def draw(self, dist: Distribution) -> Draws:
        return draws_at(dist, dist.sample(torch.Size([self.num])))

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        return weighted_score(draws, cost - cost.mean(0)) * (self.num / (self.num - 1))


@dataclass(frozen=True)
class OptimalConstant(Estimator):
    """Score function with the constant baseline of least variance, b* = E[f |s|^2] / E[|s|^2], s = grad log p.

    For each sample the expectations are estimated from the other samples. s is the gradient in the logits, or in the
    mean of a Normal. Source: Greensmith et al. 2004.

    Args:
        num: Number of samples, 2 or more.
    """

    num: int = 4
    families: ClassVar = ("bernoulli", "categorical", "one_hot", "normal")
    unbiased: ClassVar = "always, as the baseline of a sample uses only the others"

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
    """DiCE: f exp(log p - sg(log p)), for gradients of any order, also through several sampling steps.

    Source: Foerster et al. 2018.

    Args:
        num: Number of samples.
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
    """Return sampled points `[S, *B, *E]` with their log-probability."""
    value = value.detach()
    return Draws(value, dist.log_prob(value), None, aux)


def weighted_score(draws: Draws, weight: Tensor) -> Tensor:
    """Return sum_s w_s weight_s log p(z_s), `[S, *B] -> [*B]`; w_s is the weight of point s in E f.

    Its gradient is that of the score function.
    """
    assert draws.log_prob is not None
    terms = weight.detach() * draws.log_prob
    return terms.mean(0) if draws.weight is None else (draws.weight * terms).sum(0)


def most_probable(dist: Distribution) -> Tensor:
    """Return the most probable value, `[*B, *E]`; 0 for a Bernoulli with p = 1/2."""
    base, _ = split_independent(dist)
    if isinstance(base, torch.distributions.Bernoulli):
        return (base.logits > 0).to(base.logits)
    return base.mode


def squared_score(dist: Distribution, value: Tensor) -> Tensor:
    """Return |grad log p(z)|^2, `[S, *B]`; the gradient is in the logits, or in the mean of a Normal."""
    base, _ = split_independent(dist)
    with torch.no_grad():
        if isinstance(base, torch.distributions.Normal):
            return event_sum(((value - base.loc) / base.scale**2).square(), dist)
        if isinstance(base, torch.distributions.Categorical):  # z is an index: |onehot(z) - p|^2
            probs = base.probs.expand(*value.shape, -1)
            return event_sum(1 - 2 * probs.gather(-1, value.unsqueeze(-1)).squeeze(-1) + probs.square().sum(-1), dist)
        return event_sum((value - base.probs).square(), dist)


def parameter_dtype(dist: Distribution) -> torch.dtype:
    """Return the dtype of the distribution's parameters."""
    base, _ = split_independent(dist)
    return base.loc.dtype if isinstance(base, torch.distributions.Normal) else base.logits.dtype
