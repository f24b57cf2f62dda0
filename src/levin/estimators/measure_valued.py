"""Measure-valued derivatives: the gradient as a difference of two expectations; the cost need not be smooth.

    grad E f = c (E_{p+} f - E_{p-} f)

p+ and p- replace one component of z at a time; the other components keep their sampled values. Of a finite variable all
values are taken in turn, without sampling: the local expectation gradient (Titsias and Lázaro-Gredilla 2015).

Source: Pflug 1996; Mohamed et al. 2020, section 6 and Table 1.
"""

import math
from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Distribution, Normal, Poisson

from levin.estimators.base import Draws, Estimator, event_sum, split_independent


@dataclass(frozen=True)
class MeasureValued(Estimator):
    """Measure-valued gradient of a categorical or Bernoulli variable, of Poisson, or of the mean of a Normal.

    | D components | estimate for component d | points |
    |---|---|---|
    | categorical or Bernoulli, K values | sum_k grad p_k f(z with z_d = k) | D K |
    | Poisson, in the rate | f(z + e_d) - f(z) | D + 1 |
    | Normal(m, s), in m | (f(z with z_d = m + s W) - f(z with z_d = m - s W)) / (s sqrt(2 pi)) | 2 D + 1 |

    W = sqrt(2 E), E ~ Exp(1). Both terms share W and the other components. The scale s of a Normal must not require a
    gradient.
    """

    families: ClassVar = ("bernoulli", "one_hot", "categorical", "poisson", "normal")

    def draw(self, dist: Distribution) -> Draws:
        base, _ = split_independent(dist)
        if isinstance(base, Normal):
            return self.normal(dist, base)
        if isinstance(base, Poisson):
            return self.poisson(dist, base)
        return self.choices(dist, dist.sample())

    def choices(self, dist: Distribution, drawn: Tensor) -> Draws:
        """Return the sample `[*B, *E]` with each component set to each of its values: points `[D K, *B, *E]`."""
        base, dims = split_independent(dist)
        values = base.enumerate_support()  # [K, *base, *e], with e the event of one component
        log_prob = base.log_prob(values)  # [K, *base]
        parts = torch.eye(
            base.batch_shape[len(base.batch_shape) - dims :].numel(), dtype=torch.bool, device=drawn.device
        )
        parts = parts.view(len(parts), 1, *[1] * len(dist.batch_shape), *base.batch_shape[len(dist.batch_shape) :])
        # True at the component that is set: [D, 1, 1 .., *parts]
        set_ = parts.view(*parts.shape, *[1] * len(base.event_shape))
        points = torch.where(set_, values, drawn)  # [D, K, *B, *E]
        term = torch.where(parts, log_prob.exp(), 0.0)
        term = term.flatten(2 + len(dist.batch_shape)).sum(-1) if dims else term  # p of the set value: [D, K, *B]
        weight = term.detach() / len(parts)
        return Draws(points.flatten(0, 1), term.flatten(0, 1), weight.flatten(0, 1))

    def poisson(self, dist: Distribution, base: Poisson) -> Draws:
        """Return a sample, and the sample with 1 added to each component: points `[D + 1, *B, *E]`."""
        drawn = dist.sample()
        steps = unit_steps(dist, drawn)  # [D, *B, *E]
        term = event_sum(steps * base.rate, dist)  # [D, *B]
        return Draws(
            torch.cat([drawn.unsqueeze(0), drawn + steps]),
            torch.cat([-term.sum(0, keepdim=True), term]),
            first_draw_weights(term),
        )

    def normal(self, dist: Distribution, base: Normal) -> Draws:
        """Return a sample, and the sample with each component at m + s W, then m - s W: points `[2 D + 1, *B, *E]`."""
        if base.scale.requires_grad:
            raise TypeError(
                "MeasureValued gives no gradient for the scale of a Normal: detach its scale, or use Reparameterized"
            )
        drawn = dist.sample()
        steps = unit_steps(dist, drawn)
        distance = base.scale * (2 * torch.empty_like(drawn).exponential_()).sqrt()  # s W
        points = torch.cat([drawn + steps * (base.loc + sign * distance - drawn) for sign in (1, -1)]).detach()
        term = event_sum(steps * base.loc / (base.scale * math.sqrt(2 * math.pi)), dist)
        term = torch.cat([term, -term])
        return Draws(
            torch.cat([drawn.unsqueeze(0), points]),
            torch.cat([torch.zeros_like(term[:1]), term]),
            first_draw_weights(term),
        )

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        assert draws.log_prob is not None
        return (cost.detach() * draws.log_prob).sum(0)


def unit_steps(dist: Distribution, drawn: Tensor) -> Tensor:
    """Return D unit vectors, 1 at one component of the event and 0 elsewhere: `[D, *B, *E]`."""
    size = dist.event_shape.numel()
    steps = torch.eye(size, device=drawn.device, dtype=drawn.dtype)
    return steps.view(size, *[1] * len(dist.batch_shape), *dist.event_shape).expand(size, *drawn.shape)


def first_draw_weights(term: Tensor) -> Tensor:
    """Return weights 1, 0, 0, ...: E f is estimated by the cost of the first point, the only plain sample."""
    return torch.cat([torch.ones_like(term[:1]), torch.zeros_like(term)]).detach()
