"""Gradients through the sample itself: z = g(eps, theta), or a relaxed stand-in for what is discrete.

    grad E f(z) = E[grad f(g(eps, theta))]        f differentiable

The points carry the gradient, so the surrogate is the mean cost. A relaxation is in the gradient, in the points, or in
both: one that is straight-through asks for the cost of real values only, and backpropagates as if they were relaxed.

Discrete ones are for OneHotCategorical, and for Bernoulli as the first of two choices with the logits (l, 0).
Notation: l logits, p = softmax(l), D a one-hot draw, G Gumbel noise, sg stop-gradient.
"""

from abc import abstractmethod
from dataclasses import dataclass, field
from typing import ClassVar

import torch
from torch import Tensor
from torch.distributions import Bernoulli, Distribution

from levin.estimators.base import Draws, Estimator, check_positive, split_independent
from levin.estimators.score import check_num_draws


@dataclass(frozen=True)
class Reparameterized(Estimator):
    """z = g(eps, theta) by the distribution's own `rsample`; of Gamma, Beta and their kin its implicit derivative.

    Source: Kingma and Welling 2014; Figurnov et al. 2018; the lecture's row 20.
    """

    num: int = 1
    unbiased: ClassVar = "f is differentiable, or Lipschitz and so almost everywhere"

    def __post_init__(self) -> None:
        check_num_draws("Reparameterized", self.num, 1)

    def draw(self, dist: Distribution) -> Draws:
        if not dist.has_rsample:
            raise TypeError(
                f"no path leads through a sample of {type(split_independent(dist)[0]).__name__}: use ScoreFunction or "
                "LeaveOneOut, or StraightThrough, GumbelSoftmax or ReinMax of a OneHotCategorical"
            )
        return Draws(dist.rsample(torch.Size([self.num])))


@dataclass(frozen=True)
class Relaxation(Estimator):
    """What the discrete ones have in common: the logits `[S, *B, *E, K]` of choices, and a Bernoulli as two of them."""

    num: int = field(default=1, kw_only=True)
    families: ClassVar = ("bernoulli", "one_hot")
    instead: ClassVar = "a OneHotCategorical instead of a Categorical, or Reparameterized for what is continuous"

    def __post_init__(self) -> None:
        check_num_draws(type(self).__name__, self.num, 1)
        for name in ("tau", "tau_forward", "tau_backward"):
            check_positive(name, getattr(self, name, 1.0))

    def draw(self, dist: Distribution) -> Draws:
        base, _ = split_independent(dist)
        if isinstance(base, Bernoulli):
            logits = torch.stack([base.logits, torch.zeros_like(base.logits)], -1)
            return Draws(self.relaxed_sample(logits.expand(self.num, *logits.shape))[..., 0])
        logits = base.logits.clamp(min=torch.finfo(base.logits.dtype).min)  # -inf: a choice that there is not
        return Draws(self.relaxed_sample(logits.expand(self.num, *logits.shape)))

    @abstractmethod
    def relaxed_sample(self, logits: Tensor) -> Tensor:
        """`[..., K] -> [..., K]`: the points, with their gradient."""


@dataclass(frozen=True)
class StraightThrough(Relaxation):
    """D + p - sg(p): the gradient passes the draw as if it were its mean. Source: Bengio et al. 2013."""

    unbiased: ClassVar = "f is linear in each choice"

    def relaxed_sample(self, logits: Tensor) -> Tensor:
        return straight_through(sample_one_hot(logits), logits.softmax(-1))


@dataclass(frozen=True)
class DecoupledStraightThrough(Relaxation):
    """D ~ softmax(l / tau_f), its gradient that of softmax(l / tau_b). Source: Shah et al. 2024, 2410.13331.

    Args:
        tau_forward: Of the draw; other than 1, E f is that of another distribution.
        tau_backward: Of the gradient.
    """

    tau_forward: float = 1.0
    tau_backward: float = 1.0
    unbiased: ClassVar = "f is linear in each choice, and both temperatures are 1"

    def relaxed_sample(self, logits: Tensor) -> Tensor:
        return straight_through(sample_one_hot(logits / self.tau_forward), (logits / self.tau_backward).softmax(-1))


@dataclass(frozen=True)
class GumbelSoftmax(Relaxation):
    """y = softmax((l + G) / tau); hard: D + y - sg(y), with D the largest of y.

    Bias falls to 0 and variance grows without end as tau falls to 0. Source: Jang et al. 2017, Maddison et al. 2017;
    the lecture's row 22.

    Args:
        tau: Temperature.
        hard: Straight-through, so that the cost sees real values only.
    """

    tau: float = 1.0
    hard: bool = False
    unbiased: ClassVar = "never, at a temperature above 0"

    def relaxed_sample(self, logits: Tensor) -> Tensor:
        y = ((logits + sample_gumbel(logits)) / self.tau).softmax(-1)
        return straight_through(one_hot_argmax(y.detach()), y) if self.hard else y


@dataclass(frozen=True)
class GumbelRao(Relaxation):
    """D + y - sg(y), y the mean of softmax((l + G) / tau) over `rao` noises G that all give D.

    The mean of straight-through Gumbel-softmax, with less variance. Source: Paulus et al. 2021.

    Args:
        tau: Temperature.
        rao: Noises.
    """

    tau: float = 0.5
    rao: int = 10
    unbiased: ClassVar = "never, at a temperature above 0"

    def __post_init__(self) -> None:
        super().__post_init__()
        check_num_draws("GumbelRao", self.rao, 1)

    def relaxed_sample(self, logits: Tensor) -> Tensor:
        draw = sample_one_hot(logits)
        many = logits.expand(self.rao, *logits.shape)
        perturbed = sample_gumbel_given(draw.expand_as(many), many.detach().log_softmax(-1))
        y = ((perturbed.detach() + many - many.detach()) / self.tau).softmax(-1).mean(0)  # only l carries the gradient
        return straight_through(draw, y)


@dataclass(frozen=True)
class ReinMax(Relaxation):
    """D + q - sg(q), q = 2 pi_1 - p / 2, pi_1 the gradient at (D + p) / 2: Heun's method, of second order.

    Source: Liu et al. 2023, Algorithm 2.

    Args:
        tau: Of the p inside (D + p) / 2.
    """

    tau: float = 1.0
    unbiased: ClassVar = "f is quadratic in each choice, and tau is 1"

    def relaxed_sample(self, logits: Tensor) -> Tensor:
        draw, p = sample_one_hot(logits), logits.softmax(-1)
        middle = (draw + (logits / self.tau).softmax(-1)) / 2
        middle = ((middle.log() - logits).detach() + logits).softmax(-1)  # the same, with the gradient of a softmax
        return straight_through(draw, 2 * middle - p / 2)


def straight_through(value: Tensor, relaxed: Tensor) -> Tensor:
    """The value, with the gradient of what is relaxed."""
    return value + (relaxed - relaxed.detach())


def sample_gumbel(logits: Tensor) -> Tensor:
    """Standard Gumbel noise of that shape."""
    return -torch.empty_like(logits).exponential_().log()


def one_hot_argmax(values: Tensor) -> Tensor:
    """1 where `[..., K]` is largest, else 0. Without the check of PyTorch's `one_hot`, which waits for a device."""
    return torch.zeros_like(values).scatter_(-1, values.argmax(-1, keepdim=True), 1.0)


def sample_one_hot(logits: Tensor) -> Tensor:
    """A one-hot draw for each of `[..., K]`, without a gradient."""
    return one_hot_argmax(logits.detach() + sample_gumbel(logits))


def sample_gumbel_given(draw: Tensor, log_probs: Tensor) -> Tensor:
    """log p + G given that `draw` is its largest, differentiable in `log_probs`: all `[..., K]`.

    The largest is a standard Gumbel variable; the others are cut off there. Source: Maddison et al. 2014.
    """
    log_noise = torch.empty_like(log_probs).exponential_().log()
    largest = (log_noise * draw).sum(-1, keepdim=True)  # [..., K] -> [..., 1]
    return -torch.where(draw > 0, largest, torch.logaddexp(log_noise - log_probs, largest))
