"""Measure-valued derivatives: the difference of two expectations, without any smoothness of the cost.

    grad E f = c (E_{p+} f - E_{p-} f)        with p+ and p- of one part of z at a time, the others as drawn

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
    """Choices: sum_k grad p_k f(part d at k). Poisson: f(x + e_d) - f(x). Mean of a Normal: f(m +- s W).

    Points: of D parts, D K for choices, D + 1 for Poisson, 2 D + 1 for Normal. W = sqrt(2 E), E ~ Exp(1): the two
    halves share it, and the other parts. The scale of a Normal must not ask for a gradient.
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
        """`[*B, *E]` with each part at each of its values: `[D K, *B, *E]`."""
        base, dims = split_independent(dist)
        values = base.enumerate_support()  # each part at value k: [K, *base, *e]
        log_prob = base.log_prob(values)  # [K, *base]
        parts = torch.eye(
            base.batch_shape[len(base.batch_shape) - dims :].numel(), dtype=torch.bool, device=drawn.device
        )
        parts = parts.view(len(parts), 1, *[1] * len(dist.batch_shape), *base.batch_shape[len(dist.batch_shape) :])
        # which one is set: [D, 1, 1 .., *parts]
        set_ = parts.view(*parts.shape, *[1] * len(base.event_shape))
        points = torch.where(set_, values, drawn)  # [D, K, *B, *E]
        term = torch.where(parts, log_prob.exp(), 0.0)
        term = term.flatten(2 + len(dist.batch_shape)).sum(-1) if dims else term  # p of the value: [D, K, *B]
        weight = term.detach() / len(parts)
        return Draws(points.flatten(0, 1), term.flatten(0, 1), weight.flatten(0, 1))

    def poisson(self, dist: Distribution, base: Poisson) -> Draws:
        drawn = dist.sample()
        more = unit_steps(dist, drawn)  # [D, *B, *E]
        term = event_sum(more * base.rate, dist)  # [D, *B]
        return Draws(
            torch.cat([drawn.unsqueeze(0), drawn + more]),
            torch.cat([-term.sum(0, keepdim=True), term]),
            first_draw_weights(term),
        )

    def normal(self, dist: Distribution, base: Normal) -> Draws:
        if base.scale.requires_grad:
            raise TypeError("MeasureValued is for the mean of a Normal: detach its scale, or take Reparameterized")
        drawn = dist.sample()
        at = unit_steps(dist, drawn)
        away = base.scale * (2 * torch.empty_like(drawn).exponential_()).sqrt()
        points = torch.cat([drawn + at * (base.loc + sign * away - drawn) for sign in (1, -1)]).detach()
        term = event_sum(at * base.loc / (base.scale * math.sqrt(2 * math.pi)), dist)
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
    """1 at one part of the event, 0 elsewhere: `[D, *B, *E]`."""
    size = dist.event_shape.numel()
    each = torch.eye(size, device=drawn.device, dtype=drawn.dtype)
    return each.view(size, *[1] * len(dist.batch_shape), *dist.event_shape).expand(size, *drawn.shape)


def first_draw_weights(term: Tensor) -> Tensor:
    """The weights of E f, where the first of the points is the draw."""
    return torch.cat([torch.ones_like(term[:1]), torch.zeros_like(term)]).detach()
