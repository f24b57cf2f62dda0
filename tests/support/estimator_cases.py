"""Distributions, cost functions and exact moments for the tests of gradient estimators."""

import itertools

import torch
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Independent,
    OneHotCategorical,
)
from torch.nn.functional import one_hot

from fixed_samples import FixedSamples
from levin.estimators import (
    pathwise,
)
from levin.estimators.base import enumerate_values

# Parameters of the two test problems: a categorical variable with five values, and three coins
LOGITS = torch.tensor([0.5, -0.3, 0.2, 1.0, -1.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, -1.2, 2.0, 0.7, -0.4], dtype=torch.float64)
COINS = torch.tensor([0.4, -0.6, 0.1], dtype=torch.float64)
COIN_WEIGHTS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
K = len(LOGITS)


class Critic(nn.Module):
    """Small network `[..., size] -> [...]`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(size, 10), nn.Linear(10, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.out(self.hidden(z).tanh()).squeeze(-1)


def choice(logits: Tensor) -> OneHotCategorical:
    """Return a one-hot categorical distribution with the given logits."""
    return OneHotCategorical(logits=logits, validate_args=False)


def coins(logits: Tensor) -> Independent:
    """Return independent Bernoulli variables with the given logits."""
    return Independent(Bernoulli(logits=logits, validate_args=False), 1, validate_args=False)


def square(z: Tensor) -> Tensor:
    """Return the cost of a one-hot choice, quadratic in a weighted sum of its entries."""
    return ((z * WEIGHTS).sum(-1) - 0.45).square() + 1


def coin_square(z: Tensor) -> Tensor:
    """Return the cost of three coins, quadratic in a weighted sum of them."""
    return ((z * COIN_WEIGHTS).sum(-1) - 0.45).square() + 1


def exact_gradient(family, logits: Tensor, function) -> Tensor:
    """Return the gradient of the expected cost with respect to the logits, by enumeration of all values."""
    leaf = logits.clone().requires_grad_()
    values, log_prob = enumerate_values(family(leaf))
    return torch.autograd.grad((log_prob.exp() * function(values)).sum(), leaf)[0]


def gradient_estimates(estimator, family, logits: Tensor, function, rows: int, *, seed: int = 0) -> Tensor:
    """Return `rows` independent gradient estimates: `[rows, *]`."""
    torch.manual_seed(seed)
    leaf = logits.expand(rows, *logits.shape).clone().requires_grad_()
    return torch.autograd.grad(estimator(family(leaf), function).sum(), leaf)[0]


def every_outcome(monkeypatch, estimator, function=square, draws: int | None = None) -> tuple[Tensor, Tensor]:
    """Return the gradient estimate of every tuple of iid samples `[M, K]`, and the probability of each tuple `[M]`."""
    num = getattr(estimator, "num", 1) if draws is None else draws
    indices = torch.tensor(list(itertools.product(range(K), repeat=num))).T.reshape(num, -1)  # [num, M]
    leaf = LOGITS.expand(indices.shape[1], K).clone().requires_grad_()
    probability = LOGITS.log_softmax(-1)[indices].sum(0).exp()
    monkeypatch.setattr(pathwise, "sample_one_hot", lambda _: one_hot(indices, K).double())
    surrogate = estimator(FixedSamples(leaf, indices), function)
    return torch.autograd.grad(surrogate.sum(), leaf)[0], probability


def moments(each: Tensor, probability: Tensor) -> tuple[Tensor, float]:
    """Return the exact mean and total variance of estimates `[M, K]` with probabilities `[M]`."""
    torch.testing.assert_close(probability.sum().item(), 1.0, rtol=0, atol=1e-10)
    mean = probability @ each
    return mean, float(probability @ (each - mean).square().sum(-1))
