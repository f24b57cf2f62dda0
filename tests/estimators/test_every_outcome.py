"""Exact means and variances of gradient estimators of discrete variables, by enumeration of every outcome."""

import itertools
import math

import pytest
import torch
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Distribution,
    Independent,
)
from torch.nn.functional import one_hot

from estimator_cases import (
    COINS,
    LOGITS,
    WEIGHTS,
    K,
    choice,
    coin_square,
    coins,
    every_outcome,
    exact_gradient,
    gradient_estimates,
    moments,
    square,
)
from levin.estimators import (
    ARM,
    DecoupledStraightThrough,
    Dice,
    DisARM,
    Exact,
    LeaveOneOut,
    MeasureValued,
    OptimalConstant,
    ReinMax,
    ScoreFunction,
    SelfCritical,
    StraightThrough,
    SumAndSample,
    UnorderedSet,
    WithoutReplacement,
    pathwise,
)
from levin.estimators.base import enumerate_values

# --- a categorical variable with five values


EXPECTED_COST = float(LOGITS.softmax(-1) @ ((WEIGHTS - 0.45).square() + 1))
VARIANCES = [  # exact variance of one estimate, rounded to six digits
    (ScoreFunction(), 3.876835),
    (ScoreFunction(baseline=EXPECTED_COST), 0.812259),
    (SelfCritical(), 1.501152),
    (LeaveOneOut(2), 0.988253),
    (LeaveOneOut(3), 0.464794),
    (ReinMax(), 2.224456),
    (Dice(), 3.876835),
]


@pytest.mark.parametrize(("estimator", "variance"), VARIANCES, ids=lambda each: getattr(type(each), "__name__", each))
def test_exact_mean_and_variance_over_every_tuple_of_samples(monkeypatch, estimator, variance):
    mean, actual = moments(*every_outcome(monkeypatch, estimator))
    assert (mean - exact_gradient(choice, LOGITS, square)).abs().max() < 1e-10
    assert actual == pytest.approx(variance, abs=6e-7)


def test_the_optimal_constant_baseline_has_the_least_variance(monkeypatch):
    """With the optimal constant computed from exact expectations, the variance is 0.762811."""
    p, f = LOGITS.softmax(-1), (WEIGHTS - 0.45).square() + 1
    squares = (torch.eye(K) - p).square().sum(-1)  # |grad log p|^2 of each value
    best = float((p * f * squares).sum() / (p * squares).sum())
    exact = exact_gradient(choice, LOGITS, square)
    variance = {}
    for constant in (best, best - 0.1, best + 0.1, EXPECTED_COST, 0.0):
        mean, variance[constant] = moments(*every_outcome(monkeypatch, ScoreFunction(baseline=constant)))
        assert (mean - exact).abs().max() < 1e-10
    assert variance[best] == pytest.approx(0.762811, abs=6e-7)
    assert min(variance.values()) == variance[best]
    mean, _ = moments(*every_outcome(monkeypatch, OptimalConstant(3)))  # estimates the constant from the other samples
    assert (mean - exact).abs().max() < 1e-10


def test_iid_samples_divide_the_variance(monkeypatch):
    for num in (2, 3):
        _, one = moments(*every_outcome(monkeypatch, ScoreFunction()))
        _, several = moments(*every_outcome(monkeypatch, ScoreFunction(num)))
        assert several == pytest.approx(one / num, rel=1e-10)


def test_straight_through_is_exact_for_linear_costs(monkeypatch):
    def linear(z: Tensor) -> Tensor:
        return (z * WEIGHTS).sum(-1)

    for estimator in (StraightThrough(), DecoupledStraightThrough(), ReinMax()):
        mean, _ = moments(*every_outcome(monkeypatch, estimator, linear))
        assert (mean - exact_gradient(choice, LOGITS, linear)).abs().max() < 1e-10
    mean, variance = moments(*every_outcome(monkeypatch, StraightThrough()))  # not exact for a quadratic cost
    exact = exact_gradient(choice, LOGITS, square)
    assert variance == pytest.approx(0.370947, abs=6e-7)
    assert float((mean - exact).norm() / exact.norm()) == pytest.approx(0.98388, abs=6e-6)


def test_straight_through_is_exact_for_multilinear_costs(monkeypatch):
    """The cost of two choices is linear in each."""
    table = torch.randn(K, K, generator=torch.Generator().manual_seed(0))
    logits = torch.stack([LOGITS, LOGITS.flip(0)])

    def product(z: Tensor) -> Tensor:
        return torch.einsum("...i,...j,ij->...", z[..., 0, :], z[..., 1, :], table)

    def family(leaf: Tensor) -> Distribution:
        return Independent(choice(leaf), 1)

    pairs = torch.tensor(list(itertools.product(range(K), repeat=2)))  # [M, 2]
    leaf = logits.expand(len(pairs), 2, K).clone().requires_grad_()
    monkeypatch.setattr(pathwise, "sample_one_hot", lambda _: one_hot(pairs, K).double().unsqueeze(0))
    each = torch.autograd.grad(StraightThrough()(family(leaf), product).sum(), leaf)[0]
    probability = (one_hot(pairs, K) * logits.log_softmax(-1)).sum((-1, -2)).exp()
    mean = torch.einsum("m,mdk->dk", probability, each)
    assert (mean - exact_gradient(family, logits, product)).abs().max() < 1e-10


def subsets_of(estimator, num: int) -> tuple[Tensor, Tensor]:
    """Return all ordered samples without replacement as indices `[num, M]`, and their probabilities `[M]`."""
    p = LOGITS.softmax(-1)
    orders = torch.tensor(list(itertools.permutations(range(K), num)))  # [M, num]
    probability, left = torch.ones(len(orders)), torch.ones(len(orders))
    for each in orders.T:
        probability, left = probability * p[each] / left, left - p[each]
    return orders.T, probability


@pytest.mark.parametrize(("num", "variance"), [(2, 0.669556), (3, 0.182059), (4, None), (5, 0.0)])
def test_unordered_set_over_every_sample(num, variance):
    indices, probability = subsets_of(UnorderedSet, num)
    leaf = LOGITS.expand(indices.shape[1], K).clone().requires_grad_()
    values, log_prob = enumerate_values(choice(leaf))
    estimator = UnorderedSet(num)
    draws = estimator.at(values, log_prob, indices)
    surrogate = estimator.surrogate(draws, square(draws.value))
    mean, actual = moments(torch.autograd.grad(surrogate.sum(), leaf)[0], probability)
    assert (mean - exact_gradient(choice, LOGITS, square)).abs().max() < 1e-10
    assert float(probability @ surrogate.detach()) == pytest.approx(EXPECTED_COST, abs=1e-10)
    if variance is not None:
        assert actual == pytest.approx(variance, abs=6e-7)


@pytest.mark.parametrize(("num", "variance"), [(2, 1.806570), (3, 0.753295), (5, 0.0)])
def test_sum_and_sample_over_every_sample(num, variance):
    order = LOGITS.argsort(descending=True)
    first, rest = order[: num - 1], order[num - 1 :]
    probability = LOGITS.softmax(-1)[rest] / LOGITS.softmax(-1)[rest].sum()
    indices = torch.cat([first.unsqueeze(1).expand(-1, len(rest)), rest.unsqueeze(0)])  # [num, M]
    leaf = LOGITS.expand(len(rest), K).clone().requires_grad_()
    values, log_prob = enumerate_values(choice(leaf))
    estimator = SumAndSample(num)
    draws = estimator.at(values, log_prob, indices)
    surrogate = estimator.surrogate(draws, square(draws.value))
    mean, actual = moments(torch.autograd.grad(surrogate.sum(), leaf)[0], probability)
    assert (mean - exact_gradient(choice, LOGITS, square)).abs().max() < 1e-10
    assert float(probability @ surrogate.detach()) == pytest.approx(EXPECTED_COST, abs=1e-10)
    assert actual == pytest.approx(variance, abs=6e-7)


@pytest.mark.parametrize("estimator", [Exact(), UnorderedSet(K), WithoutReplacement(K), MeasureValued()])
def test_estimators_that_use_all_values_have_no_variance(estimator):
    each = gradient_estimates(estimator, choice, LOGITS, square, 50)
    assert (each - exact_gradient(choice, LOGITS, square)).abs().max() < 1e-10
    assert estimator(choice(LOGITS), square).item() == pytest.approx(EXPECTED_COST, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [5.0, 10.0, 14.0])
def test_unordered_set_with_one_dominant_value(dtype, gap):
    """Over all sets of two and three values: no loss of precision when the remaining probability is tiny."""
    logits = torch.tensor([gap, 0.0, -1.0, 0.5], dtype=dtype)
    weight = torch.tensor([1.0, -2.0, 0.5, 3.0], dtype=dtype)

    def cost(z: Tensor) -> Tensor:
        return (z * weight).sum(-1)

    double = logits.double().requires_grad_()
    exact = torch.autograd.grad((double.softmax(-1) * weight.double()).sum(), double)[0]
    for num in (2, 3):
        orders = torch.tensor(list(itertools.permutations(range(4), num)))
        p, probability = logits.double().softmax(-1), torch.ones(len(orders))
        for j, each in enumerate(orders.T):
            drawn = torch.zeros(len(orders), 4).scatter(1, orders[:, :j], 1.0)
            probability = probability * p[each] / (p * (1 - drawn)).sum(1)
        leaf = logits.expand(len(orders), 4).clone().requires_grad_()
        values, log_prob = enumerate_values(choice(leaf))
        estimator = UnorderedSet(num)
        draws = estimator.at(values, log_prob, orders.T)
        each = torch.autograd.grad(estimator.surrogate(draws, cost(draws.value)).sum(), leaf)[0].double()
        mean = (probability.unsqueeze(-1) * each).sum(0)
        assert float((mean - exact).norm() / exact.norm()) < (1e-5 if dtype == torch.float64 else 2e-2)


def test_temperatures_of_straight_through_estimators(monkeypatch):
    """`tau_forward` sets the sample, `tau_backward` the gradient; ReinMax's tau that of the softmax in its average."""
    leaf = LOGITS.clone().requires_grad_()
    draw = one_hot(torch.tensor(2), K).double()
    seen = []
    monkeypatch.setattr(pathwise, "sample_one_hot", lambda logits: seen.append(logits.detach().clone()) or draw)
    z = DecoupledStraightThrough(tau_forward=0.5, tau_backward=3.0).relaxed_sample(leaf)
    torch.testing.assert_close(seen[0], LOGITS / 0.5)
    gradient = torch.autograd.grad((z * WEIGHTS).sum(), leaf)[0]
    expected = torch.autograd.grad(((leaf / 3.0).softmax(-1) * WEIGHTS).sum(), leaf)[0]
    torch.testing.assert_close(gradient, expected)
    for tau in (0.5, 1.0, 2.0):  # Algorithm 2 of the ReinMax paper
        z = ReinMax(tau).relaxed_sample(leaf)
        gradient = torch.autograd.grad((z * WEIGHTS).sum(), leaf)[0]
        p, middle = LOGITS.softmax(-1), (draw + (LOGITS / tau).softmax(-1)) / 2

        def jacobian(probs: Tensor) -> Tensor:
            return probs * (WEIGHTS - (probs * WEIGHTS).sum())

        torch.testing.assert_close(gradient, 2 * jacobian(middle) - 0.5 * jacobian(p))
        torch.testing.assert_close(z.detach(), draw)


@pytest.mark.parametrize(
    "estimator", [MeasureValued(), Exact(), UnorderedSet(3), SumAndSample(3), WithoutReplacement(4)]
)
@pytest.mark.parametrize("family", ["coins", "choices"])
def test_the_value_is_an_estimate_of_the_cost(estimator, family):
    """Also for distributions with several independent parts."""
    logits = COINS if family == "coins" else torch.stack([LOGITS[:3], LOGITS[2:]])
    make_distribution = coins if family == "coins" else (lambda leaf: Independent(choice(leaf), 1))

    def cost(z: Tensor) -> Tensor:
        return (z.flatten(z.ndim - logits.ndim) * torch.arange(float(logits.numel()))).sum(-1).square()

    values, log_prob = enumerate_values(make_distribution(logits))
    expected = (log_prob.exp() * cost(values)).sum()
    torch.manual_seed(0)
    estimates = estimator(make_distribution(logits.expand(50_000, *logits.shape)), cost)
    assert abs(estimates.mean() - expected) < 4.5 * estimates.std() / 50_000**0.5 + 1e-9


# --- coins


def test_disarm_over_every_pair_of_outcomes():
    """Four outcomes of each coin and its antithetic partner."""
    p = COINS.sigmoid()
    outcomes = torch.tensor([[1.0, 1.0], [0.0, 0.0], [1.0, 0.0], [0.0, 1.0]])
    one_coin = torch.stack(  # P(b, b~) with 1 - u < p and u < p
        [(2 * p - 1).clamp(min=0), (1 - 2 * p).clamp(min=0), torch.minimum(p, 1 - p), torch.minimum(p, 1 - p)]
    )  # [4, 3]
    rows = torch.tensor(list(itertools.product(range(4), repeat=3)))  # [M, 3]
    probability = one_coin[rows, torch.arange(3)].prod(-1)
    leaf = COINS.expand(len(rows), 3).clone().requires_grad_()
    estimator = DisARM()
    draws = estimator.at(coins(leaf), outcomes[rows, 0], outcomes[rows, 1])
    each = torch.autograd.grad(estimator.surrogate(draws, coin_square(draws.value)).sum(), leaf)[0]
    mean, _ = moments(each, probability)
    assert (mean - exact_gradient(coins, COINS, coin_square)).abs().max() < 1e-10


def test_measure_valued_coins_over_every_outcome():
    rows = torch.tensor(list(itertools.product((0.0, 1.0), repeat=3)))
    leaf = COINS.expand(len(rows), 3).clone().requires_grad_()
    dist = coins(leaf)
    estimator = MeasureValued()
    draws = estimator.choices(dist, rows)
    surrogate = estimator.surrogate(draws, coin_square(draws.value))
    each = torch.autograd.grad(surrogate.sum(), leaf)[0]
    mean, variance = moments(each, coins(COINS.expand(8, 3)).log_prob(rows).exp())
    assert (mean - exact_gradient(coins, COINS, coin_square)).abs().max() < 1e-10
    assert variance == pytest.approx(0.552, rel=0.01)


def one_coin(estimator, target: float, theta: float) -> tuple[float, float]:
    """Return the exact mean and variance of the gradient of E[(b - target)^2] with respect to the logit."""
    num = getattr(estimator, "num", 1)
    outcomes = torch.tensor(list(itertools.product((0.0, 1.0), repeat=num))).T

    class Coin(Bernoulli):
        def sample(self, sample_shape=()):
            return outcomes.view(*sample_shape, *self.batch_shape)

    leaf = torch.full((outcomes.shape[1],), math.log(theta / (1 - theta))).requires_grad_()
    surrogate = estimator(Coin(logits=leaf), lambda b: (b - target).square())
    each = torch.autograd.grad(surrogate.sum(), leaf)[0]
    probability = torch.where(outcomes == 1, theta, 1 - theta).prod(0)
    mean, variance = moments(each.unsqueeze(-1), probability)
    return float(mean), variance


COIN_TABLE = [  # t, theta, gradient; variance of REINFORCE, value baseline, LOO2, LOO4, ARM, DisARM
    (0.45, 0.5, 2.5e-2, 1.594e-2, 0, 6.250e-4, 1.042e-4, 2.083e-4, 0),
    (0.499, 0.5, 5.0e-4, 1.5625e-2, 0, 2.500e-7, 4.167e-8, 8.333e-8, 0),
    (0.499, 0.3, 4.2e-4, 1.317e-2, 1.344e-7, 2.436e-7, 6.300e-8, 1.356e-7, 1.176e-7),
    (0.499, 0.1, 1.8e-4, 5.661e-3, 2.304e-7, 1.476e-7, 6.300e-8, 1.303e-7, 1.296e-7),
]


@pytest.mark.parametrize("row", COIN_TABLE, ids=lambda row: f"t={row[0]} theta={row[1]}")
def test_closed_forms_of_one_coin(row):
    """The common toy problem E[(b - t)^2] of the literature: tabulated values and closed forms."""
    t, theta, gradient, *table = row
    q, d, a1, a0 = 1 - theta, 1 - 2 * t, (1 - t) ** 2, t**2
    m = d * theta * q
    assert m == pytest.approx(gradient, rel=1e-9)
    least = min(theta, q)
    formulas = {
        "REINFORCE": theta * q**2 * a1**2 + q * theta**2 * a0**2 - m**2,
        "value baseline": d**2 * theta * q * (1 - 2 * theta) ** 2,
        "LOO2": d**2 * theta * q / 2 - m**2,
        "LOO4": None,
        "ARM": d**2 * (2 / 3) * (1 / 8 - (1 / 2 - least) ** 3) - m**2,
        "DisARM": (d * max(theta, q) / 2) ** 2 * 2 * least - m**2,
    }
    iid = {
        "REINFORCE": ScoreFunction(),
        "value baseline": ScoreFunction(baseline=theta * a1 + q * a0),
        "LOO2": LeaveOneOut(2),
        "LOO4": LeaveOneOut(4),
    }
    results = {name: one_coin(estimator, t, theta) for name, estimator in iid.items()}
    results["ARM"], results["DisARM"] = arm_by_quadrature(t, theta), disarm(t, theta)
    for (name, formula), listed in zip(formulas.items(), table, strict=True):
        mean, variance = results[name]
        assert mean == pytest.approx(m, abs=1e-10), name
        assert variance == pytest.approx(listed, rel=6e-4, abs=1e-12), name
        if formula is not None:
            assert variance == pytest.approx(formula, rel=1e-9, abs=1e-12), name
    assert results["DisARM"][1] <= min(results["ARM"][1], results["LOO2"][1])  # theorems


def arm_by_quadrature(t: float, theta: float) -> tuple[float, float]:
    """Return the mean and variance of ARM by Simpson's rule, which is exact: the integrand is piecewise quadratic."""
    logit = math.log(theta / (1 - theta))
    edges = sorted({0.0, theta, 1 - theta, 1.0})
    first = second = 0.0
    for low, high in itertools.pairwise(edges):
        u = torch.tensor([low + 1e-13, (low + high) / 2, high - 1e-13])
        leaf = torch.full((3,), logit).requires_grad_()
        draws = ARM().at(Bernoulli(logits=leaf), u)
        surrogate = ARM().surrogate(draws, (draws.value - t).square())
        each = torch.autograd.grad(surrogate.sum(), leaf)[0]
        weights = (high - low) / 6 * torch.tensor([1.0, 4.0, 1.0])
        first, second = first + float(weights @ each), second + float(weights @ each.square())
    return first, second - first**2


def disarm(t: float, theta: float) -> tuple[float, float]:
    """Return the exact mean and variance of DisARM."""
    logit, least = math.log(theta / (1 - theta)), min(theta, 1 - theta)
    outcomes = torch.tensor([[1.0, 1], [0, 0], [1, 0], [0, 1]])
    probability = torch.tensor([max(2 * theta - 1, 0), max(1 - 2 * theta, 0), least, least])
    leaf = torch.full((4,), logit).requires_grad_()
    draws = DisARM().at(Bernoulli(logits=leaf), *outcomes.T)
    surrogate = DisARM().surrogate(draws, (draws.value - t).square())
    mean, variance = moments(torch.autograd.grad(surrogate.sum(), leaf)[0].unsqueeze(-1), probability)
    return float(mean), variance


@pytest.mark.parametrize(
    ("shift", "estimator", "variance"),
    [
        (0.0, ScoreFunction(), 0.440),
        (0.0, LeaveOneOut(2), 7.28e-3),
        (0.0, LeaveOneOut(4), 1.99e-3),
        (0.0, UnorderedSet(2), 6.08e-3),
        (0.0, UnorderedSet(4), 1.12e-3),
        (-4.0, ScoreFunction(), 3.2e-2),
        (-4.0, LeaveOneOut(4), 1.84e-4),
        (-4.0, UnorderedSet(4), 1.03e-6),
    ],
)
def test_three_coins_that_share_a_logit(shift, estimator, variance):
    """Toy problem of Kool et al. 2020: gradient -0.045 at eta = 0 and -3.1793e-3 at -4; variances measured earlier."""
    p0 = torch.tensor([0.6, 0.51, 0.48])
    rows, eta = 60_000, torch.tensor(shift)

    def family(leaf: Tensor) -> Distribution:
        return coins(leaf.unsqueeze(-1).expand(*leaf.shape, 3))

    def distance(x: Tensor) -> Tensor:
        return (x - p0).square().sum(-1)

    exact = exact_gradient(family, eta, distance)
    assert exact.item() == pytest.approx(-0.045 if shift == 0 else -3.1793e-3, rel=1e-4)
    each = gradient_estimates(estimator, family, eta, distance, rows)
    assert abs(each.mean() - exact) < 4.5 * each.std() / rows**0.5
    # at eta = -4 rare events dominate the variance, so its estimate is noisy
    assert each.var().item() == pytest.approx(variance, rel=0.1 if shift == 0 else 0.5)
