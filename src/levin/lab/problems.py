"""Expectations with a known gradient, on which the lab measures estimators."""

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
    """Expectation E_{z ~ p_theta}[f(z)] at one theta, with its reference gradient.

    Args:
        name: Name in tables and figures.
        kind: Key of `measure.ESTIMATORS` that selects the estimators to measure: `coins`, `choices` or `normal`.
        theta: Parameters, `[*P]`.
        family: Function from parameters `[N, *P]` to the distribution p_theta, with the batch shape `[N, ...]`.
        cost: Cost f, `[S, N, ..., *E] -> [S, N, ...]`.
        gradient: Reference gradient `[*P]` of the expected cost, summed over the dimensions `...`; exact, except for
            the autoencoder.
    """

    name: str
    kind: str
    theta: Tensor
    family: Callable[[Tensor], Distribution]
    cost: Callable[[Tensor], Tensor]
    gradient: Tensor


def coins(logits: Tensor) -> Distribution:
    """Return D independent Bernoulli variables with these logits, `[N, D]`."""
    return Independent(Bernoulli(logits=logits, validate_args=False), 1, validate_args=False)


def one_choice(logits: Tensor) -> Distribution:
    """Return a categorical variable of K values with these logits, `[N, K]`."""
    return OneHotCategorical(logits=logits, validate_args=False)


def choices(logits: Tensor) -> Distribution:
    """Return D independent categorical variables with these logits, `[N, ..., D, K]`."""
    return Independent(one_choice(logits), 1, validate_args=False)


def enumerated_problem(
    name: str, kind: str, theta: Tensor, family: Callable[[Tensor], Distribution], cost: Callable[[Tensor], Tensor]
) -> Problem:
    """Return a problem with finitely many values, whose gradient is computed by enumerating them in float64."""
    leaf = theta.double().unsqueeze(0).requires_grad_()
    values, log_prob = enumerate_values(family(leaf))
    with torch.no_grad():
        costs = cost(values.float()).double()
    (gradient,) = torch.autograd.grad((log_prob.exp() * costs).sum(), leaf)
    return Problem(name, kind, theta, family, cost, gradient[0].float())


def single_coin(target: float = 0.499, theta: float = 0.3) -> Problem:
    """Return E[(b - t)^2] of one Bernoulli variable, the toy problem of REBAR and later papers."""
    logit = torch.tensor([math.log(theta / (1 - theta))])
    return enumerated_problem("a coin", "coins", logit, coins, lambda z: (z[..., 0] - target).square())


def shared_coins() -> Problem:
    """Return E[|x - p|^2] of three coins with one logit, the toy problem of Liu et al. 2019 and Kool et al. 2020."""
    goal = torch.tensor([0.6, 0.51, 0.48])
    return enumerated_problem(
        *("three coins, one logit", "coins", torch.zeros(1)),
        lambda logit: coins(logit.expand(*logit.shape[:-1], 3)),
        lambda x: (x - goal.to(x)).square().sum(-1),
    )


def choice_of_five() -> Problem:
    """Return one categorical variable of five values; the cost is quadratic in the weight of the sampled value."""
    weight = torch.tensor([0.3, -1.2, 2.0, 0.7, -0.4])
    return enumerated_problem(
        *("a choice of five", "choices", torch.tensor([0.5, -0.3, 0.2, 1.0, -1.0]), one_choice),
        lambda z: ((z * weight.to(z)).sum(-1) - 0.45).square() + 1,
    )


def gaussian_mean() -> Problem:
    """Return E[x^2] of a Gaussian with standard deviation 1, as a function of its mean."""
    return Problem(
        *("a Gaussian and a square", "normal", torch.tensor([1.0])),
        lambda loc: Independent(Normal(loc, 1.0, validate_args=False), 1, validate_args=False),
        lambda x: x[..., 0].square(),
        torch.tensor([2.0]),
    )


def fixed_network(inputs: int, seed: int) -> nn.Sequential:
    """Return a fixed random network with large weights, which makes it far from linear."""
    torch.manual_seed(seed)
    layers = nn.Sequential(nn.Linear(inputs, 32), nn.Tanh(), nn.Linear(32, 1)).requires_grad_(False)
    layers[0].weight.mul_(3)  # type: ignore[operator]
    layers[2].weight.mul_(3)  # type: ignore[operator]
    return layers


def fixed_critic() -> Problem:
    """Return the actor's problem of discrete SAC in one state, with a fixed critic Q(s, a).

    The action has three categorical variables of three values.
    """
    q = fixed_network(9, seed=0)
    theta = torch.randn(3, 3, generator=torch.Generator().manual_seed(1))
    return enumerated_problem(
        *("discrete SAC, a fixed critic", "choices", theta, choices), lambda a: -q(a.flatten(-2)).squeeze(-1)
    )


def imagined_step() -> Problem:
    """Return the loss of one imagined step of Dreamer; the latent has four categorical variables of four values.

    The loss is the squared error of nine predictions of a fixed network: a reward and 8 features.
    """
    torch.manual_seed(2)
    heads = nn.Sequential(nn.Linear(16, 32), nn.SiLU(), nn.Linear(32, 9)).requires_grad_(False)
    heads[0].weight.mul_(2)  # type: ignore[operator]
    goal, theta = torch.randn(9), torch.randn(4, 4)
    return enumerated_problem(
        *("a step of a dream", "choices", theta, choices), lambda z: (heads(z.flatten(-2)) - goal).square().sum(-1)
    )


def autoencoder_reconstruction(rows: int = 8, draws: int = 400_000) -> Problem:
    """Return the reconstruction loss of a half-trained autoencoder, in the posterior logits of `rows` digits.

    There are too many values to enumerate, so the reference gradient is an estimate from `draws` samples.
    """
    model = train_autoencoder(LeaveOneOut(4), seed=0, updates=1000).requires_grad_(False)
    x = load_digits()[1][:rows]
    theta = model.posterior(x).logits.detach()  # [rows, 8, 8]

    def cost(z: Tensor) -> Tensor:
        return model.reconstruction(z, x)

    total, chunk = torch.zeros_like(theta), 1000
    for _ in range(draws // chunk):
        leaf = theta.clone().requires_grad_()
        total += torch.autograd.grad(LeaveOneOut(chunk)(choices(leaf), cost).sum(), leaf)[0]
    return Problem("an autoencoder of digits", "choices", theta, choices, cost, total / (draws // chunk))


def all_problems() -> list[Problem]:
    """Return all problems of the lab."""
    return [
        single_coin(),
        shared_coins(),
        choice_of_five(),
        gaussian_mean(),
        fixed_critic(),
        imagined_step(),
        autoencoder_reconstruction(),
    ]
