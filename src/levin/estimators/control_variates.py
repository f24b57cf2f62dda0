"""Score functions with a relaxation of the same draw as control variate: REBAR, RELAX and LAX.

z = g(theta, noise) is relaxed, b = H(z) the real value, z~ a second noise that gives the same b. A c of the relaxed
y = act(z / tau) is like f(b), and the path through z gives its gradient:

    g = (f(b) - c(y~)) grad log p(b) + grad c(y) - grad c(y~)        unbiased for any c

y~ = act(z~ / tau) depends on theta as well, through the noise that gives b.
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
    """c = eta f, of the relaxed points: three evaluations. Source: Tucker et al. 2017.

    Args:
        eta: Weight of the control variate; 0 is the plain score function.
        tau: Temperature.
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
            raise TypeError("REBAR differentiates the cost, and this one has no gradient: take RELAX")
        # Of the points alone: what else the cost depends on has its gradient from the real one.
        difference = self.eta * (relaxed - other)
        (slope,) = torch.autograd.grad(difference.sum(), draws.value, retain_graph=True)
        path = trailing_sum(slope.detach() * draws.value, cost.ndim).sum(0)
        return (real - self.eta * other).detach() * draws.log_prob + path


class RELAX(Estimator, nn.Module):
    """c a network that is trained to make the variance small; f may be a black box: one evaluation.

    The critic learns from `variance` alone, and nothing of a surrogate reaches it:

        gradient = relax.gradient(draws, cost)
        relax.variance(gradient).backward()
        relax.surrogate(draws, cost, gradient).mean().backward()

    Source: Grathwohl et al. 2018.

    Args:
        critic: c, `[*B, *E] -> [*B]`.
        tau: Temperature.
    """

    families: ClassVar = DISCRETE
    unbiased: ClassVar = "always, with a critic that does not know this draw"

    def __init__(self, critic: nn.Module, tau: float = 0.5) -> None:
        super().__init__()
        check_positive("tau", tau)
        self.critic, self.tau = critic, tau

    def draw(self, dist: Distribution) -> Draws:
        base, _ = split_independent(dist)
        logits = choice_logits(dist)
        leaf = logits.detach().requires_grad_()  # gradients of c stay apart from those of f
        b, y, other = relaxed_pair(leaf, self.tau, dist)
        score = b - base.probs.detach()  # grad log p(b), in the logits
        parameter = logits[..., 0] if isinstance(base, Bernoulli) else logits
        return Draws(b.unsqueeze(0), None, None, (parameter, leaf, score, y, other))

    def gradient(self, draws: Draws, cost: Tensor) -> Tensor:
        """g `[*B, *E]` in the logits, differentiable in the critic."""
        parameter, leaf, score, y, other = draws.aux
        relaxed, conditional = critic_values(self.critic, y, cost), critic_values(self.critic, other, cost)
        (path,) = torch.autograd.grad((relaxed - conditional).sum(), leaf, create_graph=True)
        path = path if leaf.ndim == parameter.ndim else path[..., 0]  # the logit 0 of a Bernoulli is no parameter
        weight = cost[0].detach() - conditional
        return weight.view(*weight.shape, *[1] * (score.ndim - weight.ndim)) * score + path

    def variance(self, gradient: Tensor) -> Tensor:
        """E|g|^2 for each of the parameters: the variance, but for a constant. A scalar."""
        return gradient.square().mean()

    def surrogate(self, draws: Draws, cost: Tensor, gradient: Tensor | None = None) -> Tensor:
        """As that of every estimator; a `gradient` at hand is not computed again."""
        cost = check_costs(draws, cost)
        gradient = self.gradient(draws, cost) if gradient is None else gradient
        return attach_score(self.mean(draws, cost), trailing_sum(gradient.detach() * draws.aux[0], cost.ndim - 1))

    __call__ = Estimator.__call__  # and not that of a module


class LAX(Estimator, nn.Module):
    """RELAX of what is reparameterised: g = (f(z) - c(z)) grad log p(z) + grad c(z). Source: Grathwohl et al. 2018.

    The critic learns as that of RELAX does.

    Args:
        critic: c, `[*B, *E] -> [*B]`.
    """

    families: ClassVar = ("normal",)
    unbiased: ClassVar = "always, with a critic that does not know this draw"
    instead: ClassVar = "RELAX for choices"

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
        """g `[2, *B, *E]` in mean and deviation, differentiable in the critic."""
        _, leaf, score, z = draws.aux
        relaxed = critic_values(self.critic, z, cost)
        (path,) = torch.autograd.grad(relaxed.sum(), leaf, create_graph=True)
        weight = cost[0].detach() - relaxed
        return weight.view(*weight.shape, *[1] * (z.ndim - weight.ndim)) * score + path

    variance = RELAX.variance

    def surrogate(self, draws: Draws, cost: Tensor, gradient: Tensor | None = None) -> Tensor:
        """As that of every estimator; a `gradient` at hand is not computed again."""
        cost = check_costs(draws, cost)
        gradient = self.gradient(draws, cost) if gradient is None else gradient
        return attach_score(
            self.mean(draws, cost), trailing_sum((gradient.detach() * draws.aux[0]).sum(0), cost.ndim - 1)
        )

    __call__ = Estimator.__call__  # and not that of a module


def critic_values(critic: nn.Module, points: Tensor, cost: Tensor) -> Tensor:
    """c of the points, `[*B]`. Raises ValueError when the critic gives another shape than costs `[1, *B]` have."""
    values = critic(points)
    if values.shape != cost.shape[1:]:
        raise ValueError(f"a critic gives {tuple(cost.shape[1:])} for {tuple(points.shape)}, got {tuple(values.shape)}")
    return values


def choice_logits(dist: Distribution) -> Tensor:
    """The logits of choices `[*B, *E, K]`, all finite; a Bernoulli is the first of two, with the logits (l, 0)."""
    base, _ = split_independent(dist)
    logits = base.logits.clamp(min=torch.finfo(base.logits.dtype).min)
    return torch.stack([logits, torch.zeros_like(logits)], -1) if isinstance(base, Bernoulli) else logits


def relaxed_pair(logits: Tensor, tau: float, dist: Distribution) -> tuple[Tensor, Tensor, Tensor]:
    """b, y and y~ of those logits, in the form of `dist`: each `[*B, *E]`. b has no gradient, the others have."""
    log_probs = logits.log_softmax(-1)
    z = log_probs + sample_gumbel(log_probs)
    b = one_hot_argmax(z.detach())
    other = sample_gumbel_given(b, log_probs)
    points = b, (z / tau).softmax(-1), (other / tau).softmax(-1)
    if isinstance(split_independent(dist)[0], Bernoulli):
        return points[0][..., 0], points[1][..., 0], points[2][..., 0]
    return points
