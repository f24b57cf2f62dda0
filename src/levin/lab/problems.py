"""Expectations whose gradient is known: what the lab measures estimators on."""

import math
from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn
from torch.distributions import Bernoulli, Distribution, Independent, Normal, OneHotCategorical

from levin.estimators.base import enumerate_values
from levin.estimators.score import LeaveOneOut
from levin.lab.digits import load_digits, train_autoencoder


class Problem(NamedTuple):
    """grad E_{z ~ p_theta}[f(z)] at one theta.

    Args:
        name: For people.
        kind: `coins`, `choices` or `normal`: which estimators can be asked.
        theta: The parameters `[*P]`.
        family: `[N, *P]` -> p_theta, with the batch shape `[N, ...]`.
        cost: f, `[S, N, ..., *E] -> [S, N, ...]`.
        gradient: Of the sum over what is in `...`: `[*P]`.
    """

    name: str
    kind: str
    theta: Tensor
    family: Callable[[Tensor], Distribution]
    cost: Callable[[Tensor], Tensor]
    gradient: Tensor


def coins(logits: Tensor) -> Distribution:
    """`[N, D]`."""
    return Independent(Bernoulli(logits=logits, validate_args=False), 1, validate_args=False)


def one_choice(logits: Tensor) -> Distribution:
    """`[N, K]`."""
    return OneHotCategorical(logits=logits, validate_args=False)


def choices(logits: Tensor) -> Distribution:
    """`[N, ..., D, K]`."""
    return Independent(one_choice(logits), 1, validate_args=False)


def enumerated_problem(
    name: str, kind: str, theta: Tensor, family: Callable[[Tensor], Distribution], cost: Callable[[Tensor], Tensor]
) -> Problem:
    """A problem of finitely many values."""
    leaf = theta.double().unsqueeze(0).requires_grad_()
    values, log_prob = enumerate_values(family(leaf))
    with torch.no_grad():
        costs = cost(values.float()).double()
    (gradient,) = torch.autograd.grad((log_prob.exp() * costs).sum(), leaf)
    return Problem(name, kind, theta, family, cost, gradient[0].float())


def single_coin(target: float = 0.499, theta: float = 0.3) -> Problem:
    """E[(b - t)^2]: the toy of REBAR and all that came after."""
    logit = torch.tensor([math.log(theta / (1 - theta))])
    return enumerated_problem("a coin", "coins", logit, coins, lambda z: (z[..., 0] - target).square())


def shared_coins() -> Problem:
    """Three coins with one logit, E[|x - p|^2]: the toy of Liu et al. 2019 and Kool et al. 2020."""
    goal = torch.tensor([0.6, 0.51, 0.48])
    return enumerated_problem(
        *("three coins, one logit", "coins", torch.zeros(1)),
        lambda logit: coins(logit.expand(*logit.shape[:-1], 3)),
        lambda x: (x - goal.to(x)).square().sum(-1),
    )


def choice_of_five() -> Problem:
    """One choice of five, a square of what is chosen."""
    weight = torch.tensor([0.3, -1.2, 2.0, 0.7, -0.4])
    return enumerated_problem(
        *("a choice of five", "choices", torch.tensor([0.5, -0.3, 0.2, 1.0, -1.0]), one_choice),
        lambda z: ((z * weight.to(z)).sum(-1) - 0.45).square() + 1,
    )


def gaussian_mean() -> Problem:
    """E[(x - k)^2] of a Gaussian, in its mean."""
    return Problem(
        *("a Gaussian and a square", "normal", torch.tensor([1.0])),
        lambda loc: Independent(Normal(loc, 1.0, validate_args=False), 1, validate_args=False),
        lambda x: x[..., 0].square(),
        torch.tensor([2.0]),
    )


def fixed_network(inputs: int, seed: int) -> nn.Sequential:
    """A fixed function, far from linear."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, 1)).requires_grad_(False)
    layers[0].weight.mul_(3)  # type: ignore[operator]
    layers[2].weight.mul_(3)  # type: ignore[operator]
    return layers


def fixed_critic() -> Problem:
    """The actor of discrete SAC: three choices of three, Q(s, a) a network that reads them, one state."""
    q = fixed_network(9, seed=0)
    theta = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    return enumerated_problem(
        *("discrete SAC, a fixed critic", "choices", theta, choices), lambda a: -q(a.flatten(-2)).squeeze(-1)
    )


def imagined_step() -> Problem:
    """One step of a Dreamer's dream: latents of four choices of four, and the loss of what a network makes of them.

    The loss is quadratic in that: a reward and 8 features are to be predicted.
    """
    torch.manual_seed(2)
    heads = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 9)).requires_grad_(False)
    heads[0].weight.mul_(2)  # type: ignore[operator]
    goal, theta = torch.randn(9), torch.randn(4, 4)
    return enumerated_problem(
        *("a step of a dream", "choices", theta, choices), lambda z: (heads(z.flatten(-2)) - goal).square().sum(-1)
    )


def autoencoder_reconstruction(rows: int = 8, draws: int = 400_000) -> Problem:
    """The reconstruction of digits by a half-trained autoencoder, in the logits of a few of them.

    Too many values to go through: the gradient is that of very many draws.
    """
    model = train_autoencoder(LeaveOneOut(4), seed=0, updates=1000).requires_grad_(False)
    x = load_digits()[1][:rows]
    theta = model.posterior(x).logits.detach()  # [rows, 8, 8]

    def cost(z: Tensor) -> Tensor:
        return model.reconstruction(z, x)

    total, at_once = torch.zeros_like(theta), 1000
    for _ in range(draws // at_once):
        leaf = theta.clone().requires_grad_()
        total += torch.autograd.grad(LeaveOneOut(at_once)(choices(leaf), cost).sum(), leaf)[0]
    return Problem("an autoencoder of digits", "choices", theta, choices, cost, total / (draws // at_once))


def all_problems() -> list[Problem]:
    """All of them."""
    return [
        single_coin(),
        shared_coins(),
        choice_of_five(),
        gaussian_mean(),
        fixed_critic(),
        imagined_step(),
        autoencoder_reconstruction(),
    ]
