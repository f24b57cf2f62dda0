"""Estimators that sample without replacement from a finite distribution, so that no value is evaluated twice.

They support one categorical variable, or several independent ones with few enough combinations to enumerate. p(s) is
the probability of a combination s, S the set of sampled combinations.
"""

import math
from dataclasses import dataclass
from functools import cache
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution
from torch.nn.functional import logsigmoid

from levin.estimators.base import Draws, Estimator, enumerate_values
from levin.estimators.pathwise import sample_gumbel
from levin.estimators.score import check_num_draws

FINITE = ("bernoulli", "categorical", "one_hot")


@dataclass(frozen=True)
class SumAndSample(Estimator):
    """Sum over the n - 1 most probable values C, plus one sample r of the others.

    The estimate is sum_{c in C} grad p(c) f(c) + (1 - P(C)) f(r) grad log p(r). Source: Liu et al. 2019
    (Rao-Blackwellised).

    Args:
        num: Number of evaluations n.
    """

    num: int = 2
    families: ClassVar = FINITE

    def __post_init__(self) -> None:
        check_num_draws("SumAndSample", self.num, 2)

    def draw(self, dist: Distribution) -> Draws:
        values, log_prob = enumerate_support(dist)
        first = limit_num(log_prob, self.num - 1, spare=1)
        perturbed = log_prob.detach() + sample_gumbel(log_prob)
        chosen = log_prob.detach().topk(first, 0).indices  # [n - 1, *B]
        rest = perturbed.scatter(0, chosen, -torch.inf).argmax(0, keepdim=True)
        return self.at(values, log_prob, torch.cat([chosen, rest]))

    def at(self, values: Tensor, log_prob: Tensor, indices: Tensor) -> Draws:
        """Return the values `[M, *B, *E]` at `indices`, `[n, *B]`, as points; the last index is the sample r."""
        rest = log_prob.detach().exp().scatter(0, indices[:-1], 0.0).sum(0, keepdim=True)  # 1 - P(C)
        log_prob = log_prob.gather(0, indices)
        weight = torch.cat([log_prob[:-1].detach().exp(), rest])
        return Draws(gather_values(values, indices), log_prob, weight)

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        assert draws.log_prob is not None
        assert draws.weight is not None
        return (draws.weight * cost.detach() * draws.log_prob).sum(0)  # p grad log p = grad p


@dataclass(frozen=True)
class UnorderedSet(Estimator):
    """Unordered set estimator with a built-in baseline, of a set S of n samples without replacement.

        sum_{s in S} grad p(s) R(S, s) (f(s) - sum_{t in S} p(t) R(S, s, t) f(t))

    P(S) is the probability that sampling gives the set S, p(S) the sum of p(s) over S.
    R(S, s) = P(S without s, in the domain without s) / P(S). R(S, s, t) is the same ratio for t once s is removed from
    S and from the domain; R(S, s, s) = 1. P(S) is an integral, computed with 96 nodes to 8 digits:

        P(S) = int_0^1 prod_{s in S} (1 - v^(p(s) / (1 - p(S)))) dv

    Source: Kool et al. 2020, equations 13 to 20; the quadrature rule is that of Takahasi and Mori 1974.

    Args:
        num: Number of samples n; with all values the gradient is exact.
    """

    num: int = 3
    families: ClassVar = FINITE

    def __post_init__(self) -> None:
        check_num_draws("UnorderedSet", self.num, 2)

    def draw(self, dist: Distribution) -> Draws:
        values, log_prob = enumerate_support(dist)
        num = limit_num(log_prob, self.num)
        return self.at(values, log_prob, (log_prob.detach() + sample_gumbel(log_prob)).topk(num, 0).indices)

    def at(self, values: Tensor, log_prob: Tensor, indices: Tensor) -> Draws:
        """Return the values `[M, *B, *E]` at `indices`, `[n, *B]`, as points: the set S, in any order."""
        rest = log_prob.detach().exp().scatter(0, indices, 0.0).sum(0)  # 1 - p(S), but exact also if p(S) is near 1
        log_prob = log_prob.gather(0, indices)
        first, second = self.ratios(log_prob.detach().exp(), rest)
        return Draws(gather_values(values, indices), log_prob, log_prob.detach().exp() * first, (second,))

    def ratios(self, prob: Tensor, rest: Tensor) -> tuple[Tensor, Tensor]:
        """Return R(S, s), `[n, *B]`, and R(S, s, t), `[n, n, *B]`.

        Args:
            prob: Probabilities of the values in S, `[n, *B]`.
            rest: Total probability of all other values, `[*B]`.
        """
        log_v, w = quadrature_nodes(prob.dtype, prob.device)
        least = torch.finfo(prob.dtype).tiny ** 0.5
        ratio = prob.clamp(min=least) / rest.clamp(min=least)
        log_factor = (ratio.unsqueeze(-1) * log_v).expm1().neg().log()  # log(1 - v^ratio): [n, *B, Q]
        total = log_factor.sum(0)
        set_prob = (w * total.exp()).sum(-1)  # P(S): [*B]
        without = (w * (total - log_factor).exp()).sum(-1)  # P(S - s): [n, *B]
        pair = (w * (total - log_factor.unsqueeze(1) - log_factor.unsqueeze(0)).exp()).sum(-1)  # [n, n, *B]
        same = torch.eye(len(prob), device=prob.device, dtype=torch.bool).view(*[len(prob)] * 2, *[1] * (prob.ndim - 1))
        return without / set_prob, torch.where(same, 1.0, pair / without.unsqueeze(1))

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        assert draws.log_prob is not None
        assert draws.weight is not None
        (second,) = draws.aux
        cost, prob = cost.detach(), draws.log_prob.detach().exp()
        baseline = (prob * second * cost).sum(1)  # over t: [n, n, *B] -> [n, *B]
        return (draws.weight * (cost - baseline) * draws.log_prob).sum(0)


@dataclass(frozen=True)
class WithoutReplacement(Estimator):
    """Importance-weighted estimator, with the weights p/q, of a set S of n samples without replacement.

        sum_{s in S} grad p(s)/q(s) (f(s) (1 - p(s) + p(s)/q(s)) - sum_{t in S} p(t)/q(t) f(t))

    q(s) = 1 - exp(-exp(log p(s) - kappa)), with kappa the (n+1)-th largest of log p + G. The estimate has heavy tails
    if n is small. Source: Kool et al. 2019 b.

    Args:
        num: Number of samples n; with all values the gradient is exact.
    """

    num: int = 4
    families: ClassVar = FINITE

    def __post_init__(self) -> None:
        check_num_draws("WithoutReplacement", self.num, 2)

    def draw(self, dist: Distribution) -> Draws:
        values, log_prob = enumerate_support(dist)
        num = limit_num(log_prob, self.num)
        perturbed = log_prob.detach() + sample_gumbel(log_prob)
        # If all values are sampled there is no (n+1)-th
        perturbed = torch.cat([perturbed, torch.full_like(perturbed[:1], -torch.inf)])
        top, indices = perturbed.topk(num + 1, 0)
        indices = indices[:-1]
        log_prob = log_prob.gather(0, indices)
        included = -(-(log_prob.detach() - top[-1]).exp()).expm1()  # q(s)
        return Draws(gather_values(values, indices), log_prob, log_prob.detach().exp() / included)

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        assert draws.log_prob is not None
        assert draws.weight is not None
        cost, weight, prob = cost.detach(), draws.weight, draws.log_prob.detach().exp()
        return (weight * (cost * (1 - prob + weight) - (weight * cost).sum(0)) * draws.log_prob).sum(0)


@cache
def quadrature_nodes(dtype: torch.dtype, device: torch.device) -> tuple[Tensor, Tensor]:
    """Return log v and the weights of nodes for an integral over v in [0, 1]: even steps in t, v = sigmoid(pi sinh t).

    The nodes are dense at both ends, where v^r changes fastest for large r and for small r.
    """
    t = torch.linspace(-3.6, 3.6, 96, dtype=torch.float64, device=device)
    u = math.pi * t.sinh()
    weight = u.sigmoid() * (-u).sigmoid() * math.pi * t.cosh() * (t[1] - t[0])
    return logsigmoid(u).to(dtype), weight.to(dtype)


def enumerate_support(dist: Distribution) -> tuple[Tensor, Tensor]:
    """Return `enumerate_values(dist)`, but with a tiny probability instead of 0, so that logarithms stay finite."""
    values, log_prob = enumerate_values(dist)
    return values, log_prob.clamp(min=math.log(torch.finfo(log_prob.dtype).tiny))


def gather_values(values: Tensor, indices: Tensor) -> Tensor:
    """Return the values `[M, *B, *E]` at the indices `[n, *B]`: `[n, *B, *E]`."""
    index = indices.view(*indices.shape, *[1] * (values.ndim - indices.ndim))
    return values.gather(0, index.expand(*indices.shape, *values.shape[indices.ndim :]))


def limit_num(log_prob: Tensor, num: int, spare: int = 0) -> int:
    """Return how many of M values to take, min(num, M - spare), for log-probabilities `[M, *B]`."""
    return min(num, len(log_prob) - spare)
