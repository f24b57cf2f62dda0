"""Gradient estimators of discrete choices, over every outcome: exact means and variances."""

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
    moments,
    per_row,
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

# --- a choice of five, every outcome


EXPECTED_COST = float(LOGITS.softmax(-1) @ ((WEIGHTS - 0.45).square() + 1))
VARIANCES = [  # of the exact distribution of one estimate, to the six digits of the reference
    (ScoreFunction(), 3.876835),
    (ScoreFunction(baseline=EXPECTED_COST), 0.812259),
    (SelfCritical(), 1.501152),
    (LeaveOneOut(2), 0.988253),
    (LeaveOneOut(3), 0.464794),
    (ReinMax(), 2.224456),
    (Dice(), 3.876835),
]


@pytest.mark.parametrize(("estimator", "variance"), VARIANCES, ids=lambda each: getattr(type(each), "__name__", each))
def test_every_tuple_of_draws(monkeypatch, estimator, variance):
    mean, found = moments(*every_outcome(monkeypatch, estimator))
    assert (mean - exact_gradient(choice, LOGITS, square)).abs().max() < 1e-10
    assert found == pytest.approx(variance, abs=6e-7)


def test_the_optimal_constant(monkeypatch):
    """0.762811 with the constant of the true expectations: no other constant has less variance."""
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
    mean, _ = moments(*every_outcome(monkeypatch, OptimalConstant(3)))  # the one of other draws
    assert (mean - exact).abs().max() < 1e-10


def test_iid_draws_divide_the_variance(monkeypatch):
    for num in (2, 3):
        _, one = moments(*every_outcome(monkeypatch, ScoreFunction()))
        _, several = moments(*every_outcome(monkeypatch, ScoreFunction(num)))
        assert several == pytest.approx(one / num, rel=1e-10)


def test_straight_through_is_exact_for_what_is_linear(monkeypatch):
    def linear(z: Tensor) -> Tensor:
        return (z * WEIGHTS).sum(-1)

    for estimator in (StraightThrough(), DecoupledStraightThrough(), ReinMax()):
        mean, _ = moments(*every_outcome(monkeypatch, estimator, linear))
        assert (mean - exact_gradient(choice, LOGITS, linear)).abs().max() < 1e-10
    mean, variance = moments(*every_outcome(monkeypatch, StraightThrough()))  # and not for what is quadratic
    exact = exact_gradient(choice, LOGITS, square)
    assert variance == pytest.approx(0.370947, abs=6e-7)
    assert float((mean - exact).norm() / exact.norm()) == pytest.approx(0.98388, abs=6e-6)


def test_straight_through_is_exact_for_what_is_multilinear(monkeypatch):
    """Two choices, a product of functions that are linear in each."""
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
    """All ordered draws without replacement: indices `[num, M]` and their probabilities."""
    p = LOGITS.softmax(-1)
    orders = torch.tensor(list(itertools.permutations(range(K), num)))  # [M, num]
    probability, left = torch.ones(len(orders)), torch.ones(len(orders))
    for each in orders.T:
        probability, left = probability * p[each] / left, left - p[each]
    return orders.T, probability


@pytest.mark.parametrize(("num", "variance"), [(2, 0.669556), (3, 0.182059), (4, None), (5, 0.0)])
def test_every_set_of_draws(num, variance):
    indices, probability = subsets_of(UnorderedSet, num)
    leaf = LOGITS.expand(indices.shape[1], K).clone().requires_grad_()
    values, log_prob = enumerate_values(choice(leaf))
    estimator = UnorderedSet(num)
    draws = estimator.at(values, log_prob, indices)
    surrogate = estimator.surrogate(draws, square(draws.value))
    mean, found = moments(torch.autograd.grad(surrogate.sum(), leaf)[0], probability)
    assert (mean - exact_gradient(choice, LOGITS, square)).abs().max() < 1e-10
    assert float(probability @ surrogate.detach()) == pytest.approx(EXPECTED_COST, abs=1e-10)
    if variance is not None:
        assert found == pytest.approx(variance, abs=6e-7)


@pytest.mark.parametrize(("num", "variance"), [(2, 1.806570), (3, 0.753295), (5, 0.0)])
def test_every_rest_of_sum_and_sample(num, variance):
    order = LOGITS.argsort(descending=True)
    first, rest = order[: num - 1], order[num - 1 :]
    probability = LOGITS.softmax(-1)[rest] / LOGITS.softmax(-1)[rest].sum()
    indices = torch.cat([first.unsqueeze(1).expand(-1, len(rest)), rest.unsqueeze(0)])  # [num, M]
    leaf = LOGITS.expand(len(rest), K).clone().requires_grad_()
    values, log_prob = enumerate_values(choice(leaf))
    estimator = SumAndSample(num)
    draws = estimator.at(values, log_prob, indices)
    surrogate = estimator.surrogate(draws, square(draws.value))
    mean, found = moments(torch.autograd.grad(surrogate.sum(), leaf)[0], probability)
    assert (mean - exact_gradient(choice, LOGITS, square)).abs().max() < 1e-10
    assert float(probability @ surrogate.detach()) == pytest.approx(EXPECTED_COST, abs=1e-10)
    assert found == pytest.approx(variance, abs=6e-7)


@pytest.mark.parametrize("estimator", [Exact(), UnorderedSet(K), WithoutReplacement(K), MeasureValued()])
def test_all_values_leave_no_variance(estimator):
    each = per_row(estimator, choice, LOGITS, square, 50)
    assert (each - exact_gradient(choice, LOGITS, square)).abs().max() < 1e-10
    assert estimator(choice(LOGITS), square).item() == pytest.approx(EXPECTED_COST, abs=1e-10)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("gap", [5.0, 10.0, 14.0])
def test_one_value_that_dominates(dtype, gap):
    """Sets of two and three, all of them: no digits are lost where hardly anything is left."""
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


def test_temperatures_do_what_they_say(monkeypatch):
    """The draw of `tau_forward`, the gradient of `tau_backward`; ReinMax's tau is that of the p in its middle."""
    leaf = LOGITS.clone().requires_grad_()
    draw = one_hot(torch.tensor(2), K).double()
    seen = []
    monkeypatch.setattr(pathwise, "sample_one_hot", lambda logits: seen.append(logits.detach().clone()) or draw)
    z = DecoupledStraightThrough(tau_forward=0.5, tau_backward=3.0).relaxed_sample(leaf)
    torch.testing.assert_close(seen[0], LOGITS / 0.5)
    found = torch.autograd.grad((z * WEIGHTS).sum(), leaf)[0]
    expected = torch.autograd.grad(((leaf / 3.0).softmax(-1) * WEIGHTS).sum(), leaf)[0]
    torch.testing.assert_close(found, expected)
    for tau in (0.5, 1.0, 2.0):  # Algorithm 2, written out
        z = ReinMax(tau).relaxed_sample(leaf)
        found = torch.autograd.grad((z * WEIGHTS).sum(), leaf)[0]
        p, middle = LOGITS.softmax(-1), (draw + (LOGITS / tau).softmax(-1)) / 2

        def jacobian(probs: Tensor) -> Tensor:
            return probs * (WEIGHTS - (probs * WEIGHTS).sum())

        torch.testing.assert_close(found, 2 * jacobian(middle) - 0.5 * jacobian(p))
        torch.testing.assert_close(z.detach(), draw)


@pytest.mark.parametrize(
    "estimator", [MeasureValued(), Exact(), UnorderedSet(3), SumAndSample(3), WithoutReplacement(4)]
)
@pytest.mark.parametrize("family", ["coins", "choices"])
def test_the_value_is_an_estimate_of_the_cost(estimator, family):
    """Of several parts, too."""
    logits = COINS if family == "coins" else torch.stack([LOGITS[:3], LOGITS[2:]])
    make = coins if family == "coins" else (lambda leaf: Independent(choice(leaf), 1))

    def cost(z: Tensor) -> Tensor:
        return (z.flatten(z.ndim - logits.ndim) * torch.arange(float(logits.numel()))).sum(-1).square()

    values, log_prob = enumerate_values(make(logits))
    expected = (log_prob.exp() * cost(values)).sum()
    torch.manual_seed(0)
    found = estimator(make(logits.expand(50_000, *logits.shape)), cost)
    assert abs(found.mean() - expected) < 4.5 * found.std() / 50_000**0.5 + 1e-9


# --- coins, every outcome


def test_every_pair_of_disarm():
    """Three outcomes for each coin: both 1, both 0, or one of each, twice."""
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


def test_every_draw_of_measure_valued_coins():
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


def one_coin(estimator, target: float, theta: float, outcomes: Tensor | None = None) -> tuple[float, float]:
    """Exact mean and variance of the gradient of E[(b - t)^2] in the logit, `outcomes` `[S, M]` of iid draws."""
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
    """The table of the field's favourite toy, and the formulas behind it to 1e-12."""
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
    found = {name: one_coin(estimator, t, theta) for name, estimator in iid.items()}
    found["ARM"], found["DisARM"] = arm_by_quadrature(t, theta), disarm(t, theta)
    for (name, formula), listed in zip(formulas.items(), table, strict=True):
        mean, variance = found[name]
        assert mean == pytest.approx(m, abs=1e-10), name
        assert variance == pytest.approx(listed, rel=6e-4, abs=1e-12), name
        if formula is not None:
            assert variance == pytest.approx(formula, rel=1e-9, abs=1e-12), name
    assert found["DisARM"][1] <= min(found["ARM"][1], found["LOO2"][1])  # theorems


def arm_by_quadrature(t: float, theta: float) -> tuple[float, float]:
    """Over the uniform variable: piecewise quadratic, so that Simpson's rule on the pieces is exact."""
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
    """Kool et al. 2020's toy: gradient -0.045 at eta = 0, -3.1793e-3 at -4; variances as measured once, to 10%."""
    p0 = torch.tensor([0.6, 0.51, 0.48])
    rows, eta = 60_000, torch.tensor(shift)

    def family(leaf: Tensor) -> Distribution:
        return coins(leaf.unsqueeze(-1).expand(*leaf.shape, 3))

    def distance(x: Tensor) -> Tensor:
        return (x - p0).square().sum(-1)

    exact = exact_gradient(family, eta, distance)
    assert exact.item() == pytest.approx(-0.045 if shift == 0 else -3.1793e-3, rel=1e-4)
    each = per_row(estimator, family, eta, distance, rows)
    assert abs(each.mean() - exact) < 4.5 * each.std() / rows**0.5
    # heavy tails: at eta = -4 the variance is that of rare events
    assert each.var().item() == pytest.approx(variance, rel=0.1 if shift == 0 else 0.5)
