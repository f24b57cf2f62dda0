"""Antithetic draws of Bernoulli variables: what one draw pays the other gives back.

Each is a gradient at the logits l, p = sigmoid(l), of independent variables that are drawn together, in any number.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution

from levin.estimators.base import Draws, Estimator, event_sum, split_independent
from levin.estimators.score import check_num_draws


@dataclass(frozen=True)
class AtLogits(Estimator):
    """A gradient in closed form: `sg(g) l`, summed over the event."""

    families: ClassVar = ("bernoulli",)
    instead: ClassVar = "LeaveOneOut or UnorderedSet for choices, Reparameterized for what is continuous"

    def at_logits(self, dist: Distribution, draws: Tensor, factor: Tensor) -> Draws:
        """Points `[S, *B, *E]` whose costs are to be multiplied by `factor` `[S, *B, *E]` and summed."""
        base, _ = split_independent(dist)
        term = event_sum(factor.detach() * base.logits, dist)  # linear in l: [S, *B, *E] -> [S, *B]
        return Draws(draws, term)

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        assert draws.log_prob is not None
        return (cost.detach() * draws.log_prob).sum(0)


@dataclass(frozen=True)
class ARM(AtLogits):
    """(f(1[u > 1 - p]) - f(1[u < p])) (u - 1/2), u ~ U(0, 1). Source: Yin and Zhou 2019."""

    def draw(self, dist: Distribution) -> Draws:
        return self.at(dist, torch.rand_like(bernoulli_logits(dist)))

    def at(self, dist: Distribution, u: Tensor) -> Draws:
        """The pair of a uniform `[*B, *E]`."""
        p = bernoulli_logits(dist).sigmoid()
        pair = torch.stack([u > 1 - p, u < p]).to(u)
        return self.at_logits(dist, pair, torch.stack([u - 0.5, 0.5 - u]))


@dataclass(frozen=True)
class DisARM(AtLogits):
    """1/2 (f(b) - f(b~)) (-1)^b~ 1[b != b~] sigmoid(|l|), b = 1[1 - u < p], b~ = 1[u < p]: ARM without its u.

    Source: Dong et al. 2020; Yin et al. 2020 (U2G).
    """

    def draw(self, dist: Distribution) -> Draws:
        u, p = torch.rand_like(bernoulli_logits(dist)), bernoulli_logits(dist).sigmoid()
        return self.at(dist, (1 - u < p).to(u), (u < p).to(u))

    def at(self, dist: Distribution, b: Tensor, other: Tensor) -> Draws:
        """The pair of draws, both `[*B, *E]`."""
        factor = 0.5 * (1 - 2 * other) * (b != other) * bernoulli_logits(dist).abs().sigmoid()
        return self.at_logits(dist, torch.stack([b, other]), torch.stack([factor, -factor]))


@dataclass(frozen=True)
class ARMS(AtLogits):
    """n/(n-1) mean_i (f_i - mean f) (b_i - p) p (1 - p) / (p - P(b_i = b_j = 1)): n draws that avoid one another.

    u_i = (1 - d_i)^(n-1) with d from a flat Dirichlet distribution, mirrored for p > 1/2.
    Source: Dimitriev and Zhou 2021.

    Args:
        num: n, 2 or more; 2 is DisARM.
    """

    num: int = 4

    def __post_init__(self) -> None:
        check_num_draws("ARMS", self.num, 2)

    def draw(self, dist: Distribution) -> Draws:
        l = bernoulli_logits(dist)  # noqa: E741
        p, less = l.sigmoid(), (-l.abs()).sigmoid()  # less: of p and 1 - p
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
    """Of a Bernoulli, `[*B, *E]`, without a gradient."""
    return split_independent(dist)[0].logits.detach()
