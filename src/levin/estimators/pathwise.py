"""Pathwise gradient estimators: reparameterised samples z = g(eps, theta), and relaxations of discrete samples.

    grad E f(z) = E[grad f(g(eps, theta))]        f differentiable

The points carry the gradient, so the surrogate is the mean cost. A relaxation replaces the discrete sample by a
differentiable one, in the value and in the gradient, or in the gradient only (straight-through): the cost is then
evaluated at discrete values, and backpropagation treats them as relaxed.

Relaxations support OneHotCategorical, and Bernoulli as the first of two categories with the logits (l, 0).
Notation: l logits, p = softmax(l), D a one-hot sample, G Gumbel noise, sg stop-gradient.
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
    """Reparameterisation, z = g(eps, theta), by the distribution's own `rsample`.

    For Gamma, Beta and similar distributions `rsample` differentiates implicitly. Source: Kingma and Welling 2014;
    Figurnov et al. 2018.

    Args:
        num: Number of samples.
    """

    num: int = 1
    unbiased: ClassVar = "f is differentiable, or Lipschitz and so differentiable almost everywhere"

    def __post_init__(self) -> None:
        check_num_draws("Reparameterized", self.num, 1)

    def draw(self, dist: Distribution) -> Draws:
        if not dist.has_rsample:
            raise TypeError(
                f"no path through a sample of {type(split_independent(dist)[0]).__name__}, it has no rsample: use "
                "ScoreFunction or LeaveOneOut, or StraightThrough, GumbelSoftmax or ReinMax with a OneHotCategorical"
            )
        return Draws(dist.rsample(torch.Size([self.num])))


@dataclass(frozen=True)
class Relaxation(Estimator):
    """Base class of relaxations of discrete samples. A subclass defines `relaxed_sample`.

    Args:
        num: Number of samples.
    """

    num: int = field(default=1, kw_only=True)
    families: ClassVar = ("bernoulli", "one_hot")
    instead: ClassVar = "a OneHotCategorical instead of a Categorical, or Reparameterized for continuous variables"

    def __post_init__(self) -> None:
        check_num_draws(type(self).__name__, self.num, 1)
        for name in ("tau", "tau_forward", "tau_backward"):
            check_positive(name, getattr(self, name, 1.0))

    def draw(self, dist: Distribution) -> Draws:
        base, _ = split_independent(dist)
        if isinstance(base, Bernoulli):
            logits = torch.stack([base.logits, torch.zeros_like(base.logits)], -1)
            return Draws(self.relaxed_sample(logits.expand(self.num, *logits.shape))[..., 0])
        logits = base.logits.clamp(min=torch.finfo(base.logits.dtype).min)  # masked categories have the logit -inf
        return Draws(self.relaxed_sample(logits.expand(self.num, *logits.shape)))

    @abstractmethod
    def relaxed_sample(self, logits: Tensor) -> Tensor:
        """Return one relaxed sample per vector of logits, differentiable in the logits: `[..., K] -> [..., K]`."""


@dataclass(frozen=True)
class StraightThrough(Relaxation):
    """Straight-through: D + p - sg(p), the gradient treats the sample as its mean p. Source: Bengio et al. 2013."""

    unbiased: ClassVar = "f is linear in each variable"

    def relaxed_sample(self, logits: Tensor) -> Tensor:
        return straight_through(sample_one_hot(logits), logits.softmax(-1))


@dataclass(frozen=True)
class DecoupledStraightThrough(Relaxation):
    """Straight-through with two temperatures: D ~ softmax(l / tau_f), with the gradient of softmax(l / tau_b).

    Source: Shah et al. 2024, arXiv:2410.13331.

    Args:
        tau_forward: Temperature tau_f of the sample; unless it is 1, the cost is estimated for another distribution.
        tau_backward: Temperature tau_b of the gradient.
    """

    tau_forward: float = 1.0
    tau_backward: float = 1.0
    unbiased: ClassVar = "f is linear in each variable, and both temperatures are 1"

    def relaxed_sample(self, logits: Tensor) -> Tensor:
        return straight_through(sample_one_hot(logits / self.tau_forward), (logits / self.tau_backward).softmax(-1))


@dataclass(frozen=True)
class GumbelSoftmax(Relaxation):
    """Gumbel-softmax: y = softmax((l + G) / tau); hard: D + y - sg(y), with D the one-hot argmax of y.

    As tau goes to 0 the bias goes to 0 and the variance to infinity; with `hard` the bias only vanishes if f is at most
    quadratic in each variable. Source: Jang et al. 2017; Maddison et al. 2017.

    Args:
        tau: Temperature.
        hard: True: straight-through, so that the cost is evaluated at discrete values only.
    """

    tau: float = 1.0
    hard: bool = False
    unbiased: ClassVar = "never, at a temperature above 0"

    def relaxed_sample(self, logits: Tensor) -> Tensor:
        y = ((logits + sample_gumbel(logits)) / self.tau).softmax(-1)
        return straight_through(one_hot_argmax(y.detach()), y) if self.hard else y


@dataclass(frozen=True)
class GumbelRao(Relaxation):
    """Gumbel-Rao: D + y - sg(y), y the mean of softmax((l + G) / tau) over `rao` samples of G given D.

    It has the mean of straight-through Gumbel-softmax and less variance. Source: Paulus et al. 2021.

    Args:
        tau: Temperature.
        rao: Number of samples of G.
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
    """ReinMax: D + q - sg(q), q = 2 pi_1 - p / 2, a second-order gradient by Heun's method.

    pi_1 has the value (D + p) / 2 and the gradient of a softmax there. Source: Liu et al. 2023, Algorithm 2.

    Args:
        tau: Temperature of the p in (D + p) / 2.
    """

    tau: float = 1.0
    unbiased: ClassVar = "f is quadratic in each variable, and tau is 1"

    def relaxed_sample(self, logits: Tensor) -> Tensor:
        draw, p = sample_one_hot(logits), logits.softmax(-1)
        middle = (draw + (logits / self.tau).softmax(-1)) / 2
        middle = ((middle.log() - logits).detach() + logits).softmax(-1)  # same value, with the gradient of a softmax
        return straight_through(draw, 2 * middle - p / 2)


def straight_through(value: Tensor, relaxed: Tensor) -> Tensor:
    """Return `value`, with the gradient of `relaxed`."""
    return value + (relaxed - relaxed.detach())


def sample_gumbel(logits: Tensor) -> Tensor:
    """Return standard Gumbel noise with the shape of the logits."""
    return -torch.empty_like(logits).exponential_().log()


def one_hot_argmax(values: Tensor) -> Tensor:
    """Return the one-hot argmax over the last dimension, `[..., K]`.

    It avoids PyTorch's `one_hot`, whose range check synchronises with the GPU.
    """
    return torch.zeros_like(values).scatter_(-1, values.argmax(-1, keepdim=True), 1.0)


def sample_one_hot(logits: Tensor) -> Tensor:
    """Return one one-hot sample per vector of logits, without a gradient: `[..., K] -> [..., K]`."""
    return one_hot_argmax(logits.detach() + sample_gumbel(logits))


def sample_gumbel_given(draw: Tensor, log_probs: Tensor) -> Tensor:
    """Return a sample of log p + G given that its argmax is the one-hot `draw`, differentiable in `log_probs`.

    All tensors are `[..., K]`. The largest entry is a standard Gumbel variable; the others are Gumbel variables
    truncated at it. Source: Maddison et al. 2014.
    """
    log_noise = torch.empty_like(log_probs).exponential_().log()
    largest = (log_noise * draw).sum(-1, keepdim=True)  # [..., K] -> [..., 1]
    return -torch.where(draw > 0, largest, torch.logaddexp(log_noise - log_probs, largest))
