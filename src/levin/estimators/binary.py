"""Antithetic estimators for Bernoulli variables: their samples are negatively correlated, which lowers the variance.

Each estimates the gradient in the logits l, with p = sigmoid(l), of any number of independent variables at once.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from levin.estimators.base import Draws, Estimator, event_sum, split_independent
from levin.estimators.score import check_num_draws


@dataclass(frozen=True)
class LogitGradient(Estimator):
    """Base class of estimators that compute the gradient g in the logits l themselves: `score` is `sg(g) l`."""

    families: ClassVar = ("bernoulli",)
    instead: ClassVar = "LeaveOneOut or UnorderedSet for categorical variables, Reparameterized for continuous ones"

    def at_logits(self, dist: Distribution, draws: Tensor, factor: Tensor) -> Draws:
        """Return the points for the gradient g = sum_s cost_s factor_s; points and factors are `[S, *B, *E]`."""
        base, _ = split_independent(dist)
        term = event_sum(factor.detach() * base.logits, dist)  # linear in l: [S, *B, *E] -> [S, *B]
        return Draws(draws, term)

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        assert draws.log_prob is not None
        return (cost.detach() * draws.log_prob).sum(0)


@dataclass(frozen=True)
class ARM(LogitGradient):
    """ARM, augment-REINFORCE-merge: (f(1[u > 1 - p]) - f(1[u < p])) (u - 1/2), u ~ U(0, 1).

    Source: Yin and Zhou 2019.
    """

    def draw(self, dist: Distribution) -> Draws:
        return self.at(dist, torch.rand_like(bernoulli_logits(dist)))

    def at(self, dist: Distribution, u: Tensor) -> Draws:
        """Return the two points of a uniform sample u, `[*B, *E]`."""
        p = bernoulli_logits(dist).sigmoid()
        pair = torch.stack([u > 1 - p, u < p]).to(u)
        return self.at_logits(dist, pair, torch.stack([u - 0.5, 0.5 - u]))


@dataclass(frozen=True)
class DisARM(LogitGradient):
    """DisARM: 1/2 (f(b) - f(b~)) (-1)^b~ 1[b != b~] sigmoid(|l|), with b = 1[1 - u < p] and b~ = 1[u < p].

    It is ARM averaged over the u that give the same b and b~.

    Source: Dong et al. 2020; Yin et al. 2020 (U2G).
    """

    def draw(self, dist: Distribution) -> Draws:
        u, p = torch.rand_like(bernoulli_logits(dist)), bernoulli_logits(dist).sigmoid()
        return self.at(dist, (1 - u < p).to(u), (u < p).to(u))

    def at(self, dist: Distribution, b: Tensor, other: Tensor) -> Draws:
        """Return the two points, from antithetic samples b and b~, both `[*B, *E]`."""
        factor = 0.5 * (1 - 2 * other) * (b != other) * bernoulli_logits(dist).abs().sigmoid()
        return self.at_logits(dist, torch.stack([b, other]), torch.stack([factor, -factor]))


@dataclass(frozen=True)
class ARMS(LogitGradient):
    """ARMS: n/(n-1) mean_i (f_i - mean f) (b_i - p) p (1 - p) / (p - P(b_i = b_j = 1)), n antithetic samples.

    u_i = (1 - d_i)^(n-1) with d sampled from a flat Dirichlet distribution, mirrored for p > 1/2.
    Source: Dimitriev and Zhou 2021.

    Args:
        num: Number of samples n, 2 or more; with 2 it is DisARM.
    """

    num: int = 4

    def __post_init__(self) -> None:
        check_num_draws("ARMS", self.num, 2)

    def draw(self, dist: Distribution) -> Draws:
        l = bernoulli_logits(dist)  # noqa: E741
        p, less = l.sigmoid(), (-l.abs()).sigmoid()  # less: the smaller of p and 1 - p
        exponential = torch.empty(self.num, *l.shape, dtype=l.dtype, device=l.device).exponential_()
        u = (1 - exponential / exponential.sum(0)).clamp(min=0) ** (self.num - 1)
        b = torch.where(l > 0, u >= less, u < less).to(l)
        both = (2 * less ** (1 / (self.num - 1)) - 1).clamp(min=0) ** (self.num - 1)  # P(u_i < less, u_j < less)
        # p (1 - p) / (p - P(b_i = b_j = 1)), the same for p and 1 - p
        ratio = (1 - less) / (1 - both / less.clamp(min=torch.finfo(less.dtype).tiny))
        factor = (b - p) * ratio / (self.num - 1)
        # sum_i (f_i - mean f) factor_i = sum_i f_i (factor_i - mean factor)
        return self.at_logits(dist, b, factor - factor.mean(0))


def bernoulli_logits(dist: Distribution) -> Tensor:
    """Return the logits of Bernoulli variables, `[*B, *E]`, without a gradient."""
    return split_independent(dist)[0].logits.detach()
