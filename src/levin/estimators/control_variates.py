"""Score-function estimators whose control variate is a relaxation of the same sample: REBAR, RELAX and LAX.

z = g(theta, noise) is reparameterised, b = H(z) is its discrete value, and z~ is a second sample of z given b. The
control variate is a function c of the relaxed values y = act(z / tau) and y~ = act(z~ / tau). It should be close to
f(b), and its own gradient is pathwise:

    g = (f(b) - c(y~)) grad log p(b) + grad c(y) - grad c(y~)        unbiased for any c

y~ depends on theta as well, because the distribution of z given b does.
"""

from dataclasses import dataclass
from typing import ClassVar

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution

from levin.estimators.base import (
    Draws,
    Estimator,
    attach_score,
    check_costs,
    check_positive,
    split_independent,
    trailing_sum,
)
from levin.estimators.pathwise import one_hot_argmax, sample_gumbel, sample_gumbel_given

DISCRETE = ("bernoulli", "one_hot")


@dataclass(frozen=True)
class REBAR(Estimator):
    """REBAR: c = eta f, evaluated at the relaxed points; three evaluations in all. Source: Tucker et al. 2017.

    Args:
        eta: Weight of the control variate; 0 is the plain score function.
        tau: Temperature of the relaxation.
    """

    eta: float = 1.0
    tau: float = 0.5
    families: ClassVar = DISCRETE
    unbiased: ClassVar = "f is defined and differentiable at relaxed points"

    def __post_init__(self) -> None:
        check_positive("tau", self.tau)

    def draw(self, dist: Distribution) -> Draws:
        b, y, other = relaxed_pair(choice_logits(dist), self.tau, dist)
        weight = torch.zeros(3, *dist.batch_shape, dtype=b.dtype, device=b.device)
        weight[0] = 1
        return Draws(torch.stack([b, y, other]), dist.log_prob(b), weight)

    def score(self, draws: Draws, cost: Tensor) -> Tensor:
        assert draws.log_prob is not None
        real, relaxed, other = cost
        if self.eta == 0:
            return real.detach() * draws.log_prob
        if not cost.requires_grad:
            raise TypeError("REBAR needs a differentiable cost, but this one has no gradient: use RELAX")
        # Only in the points: other parameters of the cost get their gradient from the cost at b
        difference = self.eta * (relaxed - other)
        (slope,) = torch.autograd.grad(difference.sum(), draws.value, retain_graph=True)
        path = trailing_sum(slope.detach() * draws.value, cost.ndim).sum(0)
        return (real - self.eta * other).detach() * draws.log_prob + path


class RELAX(Estimator, nn.Module):
    """RELAX: c is a network trained to minimise the variance. f may be a black box; one evaluation.

    Train the critic on `variance`; the surrogate gives it no gradient:

        gradient = relax.gradient(draws, cost)
        relax.variance(gradient).backward()
        relax.surrogate(draws, cost, gradient).mean().backward()

    Source: Grathwohl et al. 2018.

    Args:
        critic: Network c, `[*B, *E] -> [*B]`.
        tau: Temperature of the relaxation.
    """

    families: ClassVar = DISCRETE
    unbiased: ClassVar = "always, with a critic that does not depend on this sample"

    def __init__(self, critic: nn.Module, tau: float = 0.5) -> None:
        super().__init__()
        check_positive("tau", tau)
        self.critic, self.tau = critic, tau

    def draw(self, dist: Distribution) -> Draws:
        base, _ = split_independent(dist)
        logits = choice_logits(dist)
        leaf = logits.detach().requires_grad_()  # so that gradients of c do not reach the parameters
        b, y, other = relaxed_pair(leaf, self.tau, dist)
        score = b - base.probs.detach()  # grad log p(b), in the logits
        parameter = logits[..., 0] if isinstance(base, Bernoulli) else logits
        return Draws(b.unsqueeze(0), None, None, (parameter, leaf, score, y, other))

    def gradient(self, draws: Draws, cost: Tensor) -> Tensor:
        """Return the gradient g in the logits, `[*B, *E]`, differentiable in the critic's parameters."""
        parameter, leaf, score, y, other = draws.aux
        relaxed, conditional = critic_values(self.critic, y, cost), critic_values(self.critic, other, cost)
        (path,) = torch.autograd.grad((relaxed - conditional).sum(), leaf, create_graph=True)
        path = path if leaf.ndim == parameter.ndim else path[..., 0]  # a Bernoulli's second logit is constant
        weight = cost[0].detach() - conditional
        return weight.view(*weight.shape, *[1] * (score.ndim - weight.ndim)) * score + path

    def variance(self, gradient: Tensor) -> Tensor:
        """Return the mean of g^2 over all entries, a scalar: the variance per parameter up to a constant."""
        return gradient.square().mean()

    def surrogate(self, draws: Draws, cost: Tensor, gradient: Tensor | None = None) -> Tensor:
        """Return the surrogate, see `Estimator.surrogate`. Pass `gradient` if you have already computed it."""
        cost = check_costs(draws, cost)
        gradient = self.gradient(draws, cost) if gradient is None else gradient
        return attach_score(self.mean(draws, cost), trailing_sum(gradient.detach() * draws.aux[0], cost.ndim - 1))

    __call__ = Estimator.__call__  # not nn.Module's


class LAX(Estimator, nn.Module):
    """LAX, RELAX for continuous z: g = (f(z) - c(z)) grad log p(z) + grad c(z). Source: Grathwohl et al. 2018.

    Train the critic as in RELAX.

    Args:
        critic: Network c, `[*B, *E] -> [*B]`.
    """

    families: ClassVar = ("normal",)
    unbiased: ClassVar = "always, with a critic that does not depend on this sample"
    instead: ClassVar = "RELAX for categorical variables"

    def __init__(self, critic: nn.Module) -> None:
        super().__init__()
        self.critic = critic

    def draw(self, dist: Distribution) -> Draws:
        base, _ = split_independent(dist)
        parameters = torch.stack(torch.broadcast_tensors(base.loc, base.scale))  # [2, *B, *E]
        leaf = parameters.detach().requires_grad_()
        noise = torch.randn_like(leaf[0])
        score = torch.stack([noise, noise.square() - 1]) / leaf[1].detach()  # grad log p(z)
        z = leaf[0] + leaf[1] * noise
        return Draws(z.detach().unsqueeze(0), None, None, (parameters, leaf, score, z))

    def gradient(self, draws: Draws, cost: Tensor) -> Tensor:
        """Return the gradient g in mean and standard deviation, `[2, *B, *E]`, differentiable in the critic."""
        _, leaf, score, z = draws.aux
        relaxed = critic_values(self.critic, z, cost)
        (path,) = torch.autograd.grad(relaxed.sum(), leaf, create_graph=True)
        weight = cost[0].detach() - relaxed
        return weight.view(*weight.shape, *[1] * (z.ndim - weight.ndim)) * score + path

    variance = RELAX.variance

    def surrogate(self, draws: Draws, cost: Tensor, gradient: Tensor | None = None) -> Tensor:
        """Return the surrogate, see `Estimator.surrogate`. Pass `gradient` if you have already computed it."""
        cost = check_costs(draws, cost)
        gradient = self.gradient(draws, cost) if gradient is None else gradient
        return attach_score(
            self.mean(draws, cost), trailing_sum((gradient.detach() * draws.aux[0]).sum(0), cost.ndim - 1)
        )

    __call__ = Estimator.__call__  # not nn.Module's


def critic_values(critic: nn.Module, points: Tensor, cost: Tensor) -> Tensor:
    """Return c(points), `[*B]`. Raises ValueError if the shape does not fit that of the costs, `[1, *B]`."""
    values = critic(points)
    if values.shape != cost.shape[1:]:
        raise ValueError(
            f"the critic must return shape {tuple(cost.shape[1:])} for points of shape {tuple(points.shape)}, "
            f"got {tuple(values.shape)}"
        )
    return values


def choice_logits(dist: Distribution) -> Tensor:
    """Return finite categorical logits `[..., K]`; a Bernoulli becomes two categories with the logits (l, 0)."""
    base, _ = split_independent(dist)
    logits = base.logits.clamp(min=torch.finfo(base.logits.dtype).min)
    return torch.stack([logits, torch.zeros_like(logits)], -1) if isinstance(base, Bernoulli) else logits


def relaxed_pair(logits: Tensor, tau: float, dist: Distribution) -> tuple[Tensor, Tensor, Tensor]:
    """Return b, y and y~, each `[*B, *E]`, the shape of a sample of `dist`; b has no gradient in the logits."""
    log_probs = logits.log_softmax(-1)
    z = log_probs + sample_gumbel(log_probs)
    b = one_hot_argmax(z.detach())
    other = sample_gumbel_given(b, log_probs)
    points = b, (z / tau).softmax(-1), (other / tau).softmax(-1)
    if isinstance(split_independent(dist)[0], Bernoulli):
        return points[0][..., 0], points[1][..., 0], points[2][..., 0]
    return points
