"""Gradient estimators: exact where their noise is finite, against closed forms and z-tests where it is not.

The reference is always the enumerated or integrated gradient, never another library.
"""

import copy
import itertools
import math

import pytest
import torch
from torch import Tensor, nn
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Distribution,
    Gamma,
    Independent,
    MixtureSameFamily,
    Normal,
    OneHotCategorical,
    Poisson,
    TransformedDistribution,
)
from torch.distributions.transforms import TanhTransform
from torch.nn.functional import one_hot

from given import Given
from levin import estimators
from levin.estimators import (
    ARM,
    ARMS,
    LAX,
    REBAR,
    RELAX,
    DecoupledStraightThrough,
    Dice,
    DisARM,
    Exact,
    GumbelRao,
    GumbelSoftmax,
    LeaveOneOut,
    MeasureValued,
    MovingAverage,
    OptimalConstant,
    ReinMax,
    Reparameterized,
    ScoreFunction,
    SelfCritical,
    StraightThrough,
    SumAndSample,
    UnorderedSet,
    WithoutReplacement,
    pathwise,
)
from levin.estimators.base import enumerated
from levin.estimators.control_variates import relaxed_pair
from levin.estimators.latent import DiscreteLatent

# The reference problems: a choice of five, and three coins
LOGITS = torch.tensor([0.5, -0.3, 0.2, 1.0, -1.0], dtype=torch.float64)
WEIGHTS = torch.tensor([0.3, -1.2, 2.0, 0.7, -0.4], dtype=torch.float64)
COINS = torch.tensor([0.4, -0.6, 0.1], dtype=torch.float64)
COIN_WEIGHTS = torch.tensor([1.0, -2.0, 0.5], dtype=torch.float64)
K = len(LOGITS)


class Critic(nn.Module):
    """`[..., size] -> [...]`."""

    def __init__(self, size: int) -> None:
        super().__init__()
        self.hidden, self.out = nn.Linear(size, 10), nn.Linear(10, 1)

    def forward(self, z: Tensor) -> Tensor:
        return self.out(self.hidden(z).tanh()).squeeze(-1)


@pytest.fixture(autouse=True)
def _double():
    torch.set_default_dtype(torch.float64)
    yield
    torch.set_default_dtype(torch.float32)


def choice(logits: Tensor) -> OneHotCategorical:
    return OneHotCategorical(logits=logits, validate_args=False)


def coins(logits: Tensor) -> Independent:
    return Independent(Bernoulli(logits=logits, validate_args=False), 1, validate_args=False)


def square(z: Tensor) -> Tensor:
    """Quadratic in the choice."""
    return ((z * WEIGHTS).sum(-1) - 0.45).square() + 1


def coin_square(z: Tensor) -> Tensor:
    return ((z * COIN_WEIGHTS).sum(-1) - 0.45).square() + 1


def exact_gradient(family, logits: Tensor, function) -> Tensor:
    """By enumeration."""
    leaf = logits.clone().requires_grad_()
    values, log_prob = enumerated(family(leaf))
    return torch.autograd.grad((log_prob.exp() * function(values)).sum(), leaf)[0]


def per_row(estimator, family, logits: Tensor, function, rows: int, *, seed: int = 0) -> Tensor:
    """One estimate a row: `[rows, *]`."""
    torch.manual_seed(seed)
    leaf = logits.expand(rows, *logits.shape).clone().requires_grad_()
    return torch.autograd.grad(estimator(family(leaf), function).sum(), leaf)[0]


def every_outcome(monkeypatch, estimator, function=square, draws: int | None = None) -> tuple[Tensor, Tensor]:
    """All estimates `[M, K]`, one for each tuple of iid draws, and their probabilities."""
    num = getattr(estimator, "num", 1) if draws is None else draws
    indices = torch.tensor(list(itertools.product(range(K), repeat=num))).T.reshape(num, -1)  # [num, M]
    leaf = LOGITS.expand(indices.shape[1], K).clone().requires_grad_()
    probability = LOGITS.log_softmax(-1)[indices].sum(0).exp()
    monkeypatch.setattr(pathwise, "drawn", lambda _: one_hot(indices, K).double())
    surrogate = estimator(Given(leaf, indices), function)
    return torch.autograd.grad(surrogate.sum(), leaf)[0], probability


def moments(each: Tensor, probability: Tensor) -> tuple[Tensor, float]:
    """Exact mean and total variance."""
    torch.testing.assert_close(probability.sum().item(), 1.0, rtol=0, atol=1e-10)
    mean = probability @ each
    return mean, float(probability @ (each - mean).square().sum(-1))


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
    monkeypatch.setattr(pathwise, "drawn", lambda _: one_hot(pairs, K).double().unsqueeze(0))
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
    values, log_prob = enumerated(choice(leaf))
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
    values, log_prob = enumerated(choice(leaf))
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
        values, log_prob = enumerated(choice(leaf))
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
    monkeypatch.setattr(pathwise, "drawn", lambda logits: seen.append(logits.detach().clone()) or draw)
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

    values, log_prob = enumerated(make(logits))
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


# --- continuous noise


def z_scores(each: Tensor, exact: Tensor) -> float:
    """The largest |mean - exact| in standard errors; coordinates without variance count by their error."""
    error, deviation = (each.mean(0) - exact).abs(), each.std(0) / len(each) ** 0.5
    return float((error / (deviation + 1e-9)).max())


ROWS = 100_000
NOISY = [
    (ARMS(2), coins),
    (ARMS(4), coins),
    (ARM(), coins),
    (DisARM(), coins),
    (REBAR(), coins),
    (REBAR(eta=0.3, tau=1.0), coins),
    (REBAR(), choice),
    (WithoutReplacement(4), choice),
    (UnorderedSet(3), choice),
    (UnorderedSet(3), coins),
    (SumAndSample(3), choice),
    (SumAndSample(3), coins),
    (OptimalConstant(4), coins),
    (SelfCritical(2), coins),
    (MeasureValued(), coins),
    (MovingAverage(), choice),
]
PROBLEMS = {coins: (COINS, coin_square), choice: (LOGITS, square)}


@pytest.mark.parametrize(
    ("estimator", "family"), NOISY, ids=lambda each: getattr(each, "__name__", None) or type(each).__name__
)
@pytest.mark.parametrize("offset", [0.0, 5.0])
def test_unbiased_within_noise(estimator, family, offset):
    """Also of a cost that is moved by a constant, which changes no gradient."""
    logits, function = PROBLEMS[family]
    each = per_row(estimator, family, logits, lambda z: function(z) + offset, ROWS)
    assert z_scores(each, exact_gradient(family, logits, function)) < 4.5


@pytest.mark.parametrize("family", [coins, choice])
def test_relax_is_unbiased_with_any_critic_and_learns(family):
    logits, function = PROBLEMS[family]
    torch.manual_seed(0)
    relax = RELAX(Critic(len(logits)))
    exact = exact_gradient(family, logits, function)
    assert z_scores(per_row(relax, family, logits, function, ROWS), exact) < 4.5
    relax.critic.out.weight.data.zero_()
    relax.critic.out.bias.data.zero_()  # the plain score function
    before = per_row(relax, family, logits, function, ROWS)
    optimizer = torch.optim.Adam(relax.parameters(), lr=1e-2)
    for _ in range(300):
        draws = relax.sample(family(logits.expand(256, -1)))
        optimizer.zero_grad()
        relax.variance(relax.gradient(draws, function(draws.value))).backward()
        optimizer.step()
    after = per_row(relax, family, logits, function, ROWS, seed=1)
    assert z_scores(after, exact) < 4.5
    assert after.var(0).sum() < 0.5 * before.var(0).sum()


def test_lax_is_unbiased_in_mean_and_deviation_and_learns():
    """f = (x - k)^2: gradients 2 (m - k) and 2 s."""
    torch.manual_seed(0)
    lax = LAX(Critic(1))

    def estimates(seed: int) -> Tensor:
        torch.manual_seed(seed)
        loc, scale = torch.full((ROWS, 1), 1.5).requires_grad_(), torch.full((ROWS, 1), 0.8).requires_grad_()
        surrogate = lax(Independent(Normal(loc, scale), 1), lambda x: x.square().sum(-1))
        return torch.cat(torch.autograd.grad(surrogate.sum(), (loc, scale)), -1)

    exact = torch.tensor([3.0, 1.6])
    before = estimates(0)
    assert z_scores(before, exact) < 4.5
    optimizer = torch.optim.Adam(lax.parameters(), lr=2e-2)
    for _ in range(400):
        draws = lax.sample(Independent(Normal(torch.full((256, 1), 1.5), 0.8), 1))
        optimizer.zero_grad()
        lax.variance(lax.gradient(draws, draws.value.square().sum(-1))).backward()
        optimizer.step()
    after = estimates(1)
    assert z_scores(after, exact) < 4.5
    assert after.var(0).sum() < 0.3 * before.var(0).sum()


def sabotaged_average() -> MovingAverage:
    class WithTheCurrentCost(MovingAverage):
        def score(self, draws, cost):
            with torch.no_grad():
                self.average.lerp_(cost.mean(), 0.5)
                self.total.fill_(1)
            return super().score(draws, cost)

    return WithTheCurrentCost(decay=0.5)


class WithoutTheirPath(REBAR):
    """y~ without the gradient of the noise that it is conditioned with."""

    def draw(self, dist):
        b, y, other = relaxed_pair(torch.stack([dist.base_dist.logits, 0 * dist.base_dist.logits], -1), self.tau, dist)
        weight = torch.tensor([1.0, 0, 0]).view(3, 1).expand(3, *dist.batch_shape)
        return estimators.Draws(torch.stack([b, y, other.detach()]), dist.log_prob(b), weight)


class AsIfIndependent(ARMS):
    """Draws that avoid one another, weighed as if they did not."""

    def draw(self, dist):
        draws = super().draw(dist)
        logits = dist.base_dist.logits
        b = draws.value
        factor = (b - logits.detach().sigmoid()) / (self.num - 1)
        return self.at_logits(dist, b, factor - factor.mean(0))


class WithoutTheConditional(RELAX):
    """Whose weight forgets c(y~)."""

    def gradient(self, draws, cost):
        _, leaf, score, y, other = draws.aux
        (path,) = torch.autograd.grad((self.critic(y) - self.critic(other)).sum(), leaf, create_graph=True)
        return cost[0].detach().unsqueeze(-1) * score + path


class Unconditional(GumbelRao):
    """Noise that does not give the draw."""

    def relaxed_sample(self, logits):
        many = logits.expand(self.rao, *logits.shape)
        y = ((many + pathwise.gumbel(many)) / self.tau).softmax(-1).mean(0)
        return pathwise.through(pathwise.drawn(logits), y)


class TwiceTheCost(WithoutReplacement):
    def score(self, draws, cost):
        return super().score(draws, cost) + 0.05 * super().score(draws, cost * cost)


def test_a_z_test_finds_what_is_broken():
    exact = exact_gradient(coins, COINS, coin_square)
    assert z_scores(per_row(WithoutTheirPath(), coins, COINS, coin_square, ROWS), exact) > 4.5
    assert z_scores(per_row(AsIfIndependent(4), coins, COINS, coin_square, ROWS), exact) > 4.5
    torch.manual_seed(0)
    critic = Critic(K)
    exact = exact_gradient(choice, LOGITS, square)
    assert z_scores(per_row(WithoutTheConditional(critic), choice, LOGITS, square, ROWS), exact) > 4.5
    mean = per_row(GumbelSoftmax(0.5, hard=True), choice, LOGITS, square, ROWS).mean(0)
    assert z_scores(per_row(Unconditional(), choice, LOGITS, square, ROWS, seed=1), mean) > 4.5
    assert z_scores(per_row(TwiceTheCost(4), choice, LOGITS, lambda z: square(z) + 5, ROWS), exact) > 4.5
    for estimator in (StraightThrough(), GumbelSoftmax(hard=True), GumbelRao()):
        assert z_scores(per_row(estimator, choice, LOGITS, square, ROWS), exact) > 4.5
    # Averages are over many calls: one row a call, many calls
    torch.manual_seed(0)
    for average, biased in ((MovingAverage(decay=0.5), False), (sabotaged_average(), True)):
        each = []
        for _ in range(20_000):
            leaf = LOGITS.clone().requires_grad_()
            each.append(torch.autograd.grad(average(choice(leaf), square), leaf)[0])
        assert (z_scores(torch.stack(each), exact) > 4.5) == biased


def test_gumbel_rao_is_the_mean_of_straight_through_gumbel_softmax():
    """The same expectation with less variance, at every temperature."""
    for tau in (0.5, 1.0):
        plain = per_row(GumbelSoftmax(tau, hard=True), choice, LOGITS, square, ROWS)
        rao = per_row(GumbelRao(tau, rao=10), choice, LOGITS, square, ROWS // 2, seed=1)
        deviation = (plain.var(0) / len(plain) + rao.var(0) / len(rao)).sqrt()
        assert ((plain.mean(0) - rao.mean(0)) / deviation).abs().max() < 4.5
        assert rao.var(0).sum() < 0.9 * plain.var(0).sum()


def test_gumbel_softmax_loses_bias_and_gains_variance_as_it_cools():
    exact = exact_gradient(choice, LOGITS, square)
    found = {tau: per_row(GumbelSoftmax(tau, hard=True), choice, LOGITS, square, ROWS) for tau in (2.0, 1.0, 0.3, 0.1)}
    bias = [float((each.mean(0) - exact).norm()) for each in found.values()]
    variance = [float(each.var(0).sum()) for each in found.values()]
    assert bias == sorted(bias, reverse=True)
    assert variance == sorted(variance)
    assert variance[1] == pytest.approx(0.81, rel=0.03)
    assert variance[3] == pytest.approx(15.3, rel=0.1)


def test_the_relaxed_pair():
    """y~ is y, given b: on b's side always, and with the same mean."""
    torch.manual_seed(0)
    logits = COINS.expand(ROWS, 3)
    two = torch.stack([logits, torch.zeros_like(logits)], -1)
    b, y, other = relaxed_pair(two, 0.5, coins(logits))
    assert torch.equal(y > 0.5, b == 1)
    assert torch.equal(other > 0.5, b == 1)
    deviation = ((y.var(0) + other.var(0)) / ROWS).sqrt()
    assert ((y.mean(0) - other.mean(0)) / deviation).abs().max() < 4.5


def test_rao_blackwell():
    """What theorems say: less variance, by exact or by measured variances that are far apart."""

    def variance(estimator, family) -> float:
        logits, function = PROBLEMS[family]
        return float(per_row(estimator, family, logits, function, ROWS).var(0).sum())

    assert variance(DisARM(), coins) < variance(ARM(), coins)
    assert variance(SumAndSample(2), choice) < variance(ScoreFunction(), choice)
    value = ScoreFunction(num=4, baseline=EXPECTED_COST)
    assert variance(LeaveOneOut(4), choice) > 0.99 * variance(value, choice)  # Hoeffding
    arms, disarm_ = (variance(each, coins) for each in (ARMS(2), DisARM()))
    assert arms == pytest.approx(disarm_, rel=0.03)  # two of ARMS are DisARM


# --- other distributions


@pytest.mark.parametrize("k", [0.3, 2.0])
def test_a_normal_variable_and_a_square(k):
    """f = (x - k)^2: the gradient in the mean is 2 d; variances of the closed forms."""
    scale = 0.7
    d = 1.0 - k

    def family(loc: Tensor) -> Distribution:
        return Normal(loc, scale)

    def function(x: Tensor) -> Tensor:
        return (x - k).square()

    loc = torch.tensor(1.0)
    value = d**2 + scale**2
    expected = {
        Reparameterized(): 4 * scale**2,
        ScoreFunction(): d**4 / scale**2 + 14 * d**2 + 15 * scale**2,
        ScoreFunction(baseline=value): None,
        MeasureValued(): d**2 * (16 / math.pi - 4),
        LeaveOneOut(4): None,
        OptimalConstant(4): None,
        SelfCritical(): None,
    }
    for estimator, variance in expected.items():
        each = per_row(estimator, family, loc, function, 400_000)
        assert abs(each.mean() - 2 * d) < 4.5 * each.std() / len(each) ** 0.5, estimator
        if variance is not None:
            assert each.var().item() == pytest.approx(variance, rel=0.03), estimator


class Grid(Normal):
    """Whose draws are a grid of its noise, in `[rows]`."""

    noise = torch.linspace(-12, 12, 24_001, dtype=torch.float64)

    def rsample(self, sample_shape=()):
        return (self.loc + self.scale * self.noise).expand(*sample_shape, -1)

    def sample(self, sample_shape=()):
        return self.rsample(sample_shape).detach()


@pytest.mark.parametrize(("d", "scale"), [(1.0, 1.0), (0.7, 0.5), (-2.0, 1.5)])
def test_closed_forms_of_a_square_by_quadrature(d, scale, monkeypatch):
    """To nine digits."""
    density = (-Grid.noise.square() / 2).exp() / math.sqrt(2 * math.pi) * (Grid.noise[1] - Grid.noise[0])

    def moments_of(estimator, weight: Tensor) -> tuple[float, float]:
        loc = torch.full_like(Grid.noise, d).requires_grad_()
        surrogate = estimator(Grid(loc, scale, validate_args=False), torch.square)
        (each,) = torch.autograd.grad(surrogate.sum(), loc)
        mean = float(weight @ each)
        return mean, float(weight @ each.square()) - mean**2

    score = d**4 / scale**2 + 14 * d**2 + 15 * scale**2
    value = d**2 + scale**2
    assert moments_of(Reparameterized(), density) == pytest.approx((2 * d, 4 * scale**2), rel=1e-9)
    assert moments_of(ScoreFunction(), density) == pytest.approx((2 * d, score), rel=1e-9)
    if (d, scale) == (1.0, 1.0):
        assert moments_of(ScoreFunction(), density)[1] == pytest.approx(30)
        assert moments_of(ScoreFunction(baseline=torch.full_like(Grid.noise, value)), density)[1] == pytest.approx(18)
    # The distance of the measure-valued pair is a Rayleigh variable
    far = torch.linspace(0, 14, 24_001)
    rayleigh = far * (-far.square() / 2).exp() * (far[1] - far[0])
    monkeypatch.setattr(Tensor, "exponential_", lambda self: self.copy_(far.square() / 2))
    assert moments_of(MeasureValued(), rayleigh) == pytest.approx((2 * d, d**2 * (16 / math.pi - 4)), rel=1e-5)


def test_a_value_baseline_for_a_square():
    each = per_row(ScoreFunction(baseline=2.0), lambda m: Normal(m, 1.0), torch.tensor(1.0), torch.square, 400_000)
    assert each.var().item() == pytest.approx(18, rel=0.03)
    plain = per_row(ScoreFunction(), lambda m: Normal(m, 1.0), torch.tensor(1.0), torch.square, 400_000)
    assert plain.var().item() == pytest.approx(30, rel=0.03)


@pytest.mark.parametrize("estimator", [ScoreFunction(), LeaveOneOut(4), MeasureValued(), MovingAverage(), Dice()])
def test_poisson(estimator):
    """E x^2 = r + r^2, gradient 1 + 2 r; as difference of two expectations E[(x + 1)^2 - x^2] = 2 r + 1."""
    rate = torch.tensor(1.7)
    each = per_row(estimator, Poisson, rate, torch.square, 200_000)
    assert abs(each.mean() - (1 + 2 * rate)) < 4.5 * each.std() / len(each) ** 0.5
    if isinstance(estimator, MeasureValued):
        assert each.var().item() == pytest.approx(4 * 1.7, rel=0.03)


@pytest.mark.parametrize("estimator", [ScoreFunction(), LeaveOneOut(4), Reparameterized(), Dice()])
def test_gamma(estimator):
    """E x^2 = a (a + 1) / b^2: gradients (2 a + 1) / b^2 and -2 a (a + 1) / b^3."""
    a, b = 2.5, 1.4
    each = per_row(estimator, lambda p: Gamma(p[:, 0], p[:, 1]), torch.tensor([a, b]), torch.square, 200_000)
    exact = torch.tensor([(2 * a + 1) / b**2, -2 * a * (a + 1) / b**3])
    assert z_scores(each, exact) < 4.5


def test_the_score_function_takes_whatever_has_a_density():
    """Beta, a mixture, a squashed normal: against a sum over a fine grid."""
    grid = torch.linspace(-30, 30, 200_001)
    cases = {
        "beta": (
            lambda p: Beta(p[..., 0], p[..., 1]),
            torch.tensor([2.0, 3.0]),
            torch.linspace(1e-6, 1 - 1e-6, 200_001),
        ),
        "mixture": (
            lambda p: MixtureSameFamily(
                Categorical(logits=p), Normal(torch.tensor([-1.0, 2.0]).expand_as(p), 0.5), validate_args=False
            ),
            torch.tensor([0.3, -0.2]),
            grid,
        ),
        "squashed": (
            lambda p: TransformedDistribution(Normal(p[..., 0], p[..., 1]), [TanhTransform(cache_size=1)]),
            torch.tensor([0.4, 0.5]),
            torch.tanh(torch.linspace(-4, 4, 200_001)),
        ),
    }
    for name, (family, parameters, points) in cases.items():
        leaf = parameters.clone().requires_grad_()
        density = family(leaf.expand(len(points), 2)).log_prob(points).exp()
        expected = torch.trapezoid(density * points.sin(), points)
        (exact,) = torch.autograd.grad(expected, leaf)
        for estimator in (ScoreFunction(), LeaveOneOut(2)):
            each = per_row(estimator, family, parameters, torch.sin, ROWS)
            assert z_scores(each, exact) < 4.5, name


def test_dice_has_derivatives_of_any_order():
    """Of E f over a coin, p (1 - p) (1 - 2 p) (f1 - f0) is the second; the plain score function gets it wrong."""
    f, logit, rows = torch.tensor([1.0, 3.0]), 0.6, 400_000
    p = torch.tensor(logit).sigmoid()
    exact = p * (1 - p) * (1 - 2 * p) * (f[1] - f[0])
    for estimator, right in ((Dice(), True), (ScoreFunction(), False)):
        torch.manual_seed(0)
        leaf = torch.full((rows,), logit).requires_grad_()
        surrogate = estimator(Bernoulli(logits=leaf), lambda b: f[b.long()])
        (first,) = torch.autograd.grad(surrogate.sum(), leaf, create_graph=True)
        (second,) = torch.autograd.grad(first.sum(), leaf)
        z = abs(second.mean() - exact) / (second.std() / rows**0.5)
        assert (z < 4.5) == right


# --- the contract


EVERY = {
    "Exact": (Exact, choice),
    "ScoreFunction": (ScoreFunction, choice),
    "MovingAverage": (MovingAverage, choice),
    "SelfCritical": (SelfCritical, choice),
    "LeaveOneOut": (lambda: LeaveOneOut(4), choice),
    "OptimalConstant": (lambda: OptimalConstant(4), choice),
    "Dice": (Dice, choice),
    "Reparameterized": (lambda: Reparameterized(2), lambda leaf: Independent(Normal(leaf, 1.0), 1)),
    "StraightThrough": (StraightThrough, choice),
    "DecoupledStraightThrough": (DecoupledStraightThrough, choice),
    "GumbelSoftmax": (lambda: GumbelSoftmax(0.5), choice),
    "GumbelRao": (GumbelRao, choice),
    "ReinMax": (ReinMax, choice),
    "SumAndSample": (lambda: SumAndSample(3), choice),
    "UnorderedSet": (lambda: UnorderedSet(3), choice),
    "WithoutReplacement": (lambda: WithoutReplacement(4), choice),
    "ARM": (ARM, coins),
    "DisARM": (DisARM, coins),
    "ARMS": (lambda: ARMS(4), coins),
    "REBAR": (REBAR, choice),
    "RELAX": (lambda: RELAX(Critic(K)), choice),
    "LAX": (lambda: LAX(Critic(K)), lambda leaf: Independent(Normal(leaf, 1.0), 1)),
    "MeasureValued": (MeasureValued, choice),
}


def test_costs_may_be_integers_and_black_boxes():
    for estimator in (LeaveOneOut(2), ScoreFunction(), Exact(), SelfCritical(), RELAX(Critic(K))):
        leaf = LOGITS.expand(4, K).clone().requires_grad_()
        surrogate = estimator(choice(leaf), lambda z: torch.from_numpy(z.detach().numpy().argmax(-1)))
        assert torch.autograd.grad(surrogate.sum(), leaf)[0].isfinite().all()
    loc = torch.zeros(3, requires_grad=True)
    surrogate = SelfCritical()(Normal(loc, 1.0), lambda x: torch.from_numpy(x.numpy() ** 2))
    assert torch.autograd.grad(surrogate.sum(), loc)[0].shape == (3,)
    with pytest.raises(TypeError, match="take RELAX"):
        REBAR()(choice(LOGITS), lambda z: torch.ones(3))
    assert REBAR(eta=0.0)(choice(LOGITS.clone().requires_grad_()), lambda z: torch.ones(3)).requires_grad


def test_a_large_score_takes_no_digits_from_the_value():
    torch.set_default_dtype(torch.float32)
    dist = Independent(choice(torch.randn(32, 32)), 1)
    draws = ScoreFunction().sample(dist)
    cost = torch.tensor([1000.3])
    assert torch.equal(ScoreFunction().surrogate(draws, cost), cost[0])


@pytest.mark.parametrize("name", [name for name, (_, family) in EVERY.items() if family is choice])
def test_choices_that_there_are_not(name):
    """Logits of -inf: masked actions."""
    leaf = torch.tensor([[0.3, -math.inf, 0.5, -math.inf, 1.0]] * 20).requires_grad_()
    surrogate = EVERY[name][0]()(choice(leaf), square)
    assert surrogate.isfinite().all()
    assert torch.autograd.grad(surrogate.sum(), leaf)[0].isfinite().all()


def test_every_estimator_is_there():
    exported = {name for name in estimators.__all__ if isinstance(getattr(estimators, name), type)}
    assert exported - {"Draws", "Estimator", "StochasticGraph"} == EVERY.keys()


@pytest.mark.parametrize("name", EVERY)
def test_other_parameters_get_the_gradient_of_the_mean_cost(name):
    """The forward value is the weighted cost, and a decoder learns as if there were no sampling."""
    make, family = EVERY[name]
    estimator, decoder = make(), torch.randn(K, generator=torch.Generator().manual_seed(0)).requires_grad_()
    leaf = torch.randn(7, 2, K, generator=torch.Generator().manual_seed(1)).requires_grad_()
    again = copy.deepcopy(estimator)
    torch.manual_seed(0)
    draws = estimator.sample(family(leaf))
    assert draws.value.shape[1:] == (7, 2, K)
    cost = (draws.value * decoder).sum(-1).square()
    surrogate = estimator.surrogate(draws, cost)
    weight = torch.full_like(cost, 1 / len(cost)) if draws.weight is None else draws.weight
    assert surrogate.shape == (7, 2)
    torch.testing.assert_close(surrogate, (weight * cost).sum(0), check_dtype=False)
    with_graph = torch.autograd.grad(surrogate.sum(), decoder, retain_graph=True)[0]
    torch.testing.assert_close(with_graph, torch.autograd.grad((weight * cost).sum(), decoder, retain_graph=True)[0])
    torch.manual_seed(0)  # and the call is both steps
    torch.testing.assert_close(again(family(leaf), lambda z: (z * decoder).sum(-1).square()), surrogate)


@pytest.mark.parametrize("name", EVERY)
@pytest.mark.parametrize("dtype", [torch.float32, torch.float64])
@pytest.mark.parametrize("shape", [(), (3,), (2, 3)])
def test_dtypes_and_shapes(name, dtype, shape):
    torch.set_default_dtype(dtype)
    make, family = EVERY[name]
    leaf = torch.randn(*shape, K, dtype=dtype).requires_grad_()
    surrogate = make()(family(leaf), lambda z: z.square().sum(-1) + z[..., 0])
    assert surrogate.shape == shape
    assert surrogate.dtype == dtype
    (gradient,) = torch.autograd.grad(surrogate.sum(), leaf)
    assert gradient.dtype == dtype
    assert gradient.isfinite().all()


@pytest.mark.parametrize("name", EVERY)
def test_extreme_parameters_stay_finite(name):
    make, family = EVERY[name]
    if "Normal" in str(type(family(torch.zeros(2, K)))):
        return
    torch.set_default_dtype(torch.float32)
    leaf = torch.tensor([[60.0, -60.0, 0.0, -200.0, 200.0]] * 50).requires_grad_()
    surrogate = make()(family(leaf), lambda z: z.square().sum(-1) + z[..., 0])
    assert surrogate.isfinite().all()
    assert torch.autograd.grad(surrogate.sum(), leaf)[0].isfinite().all()


REFUSED = [
    (ARM(), Normal(0.0, 1.0), "ARM is for Bernoulli, not for Normal: take LeaveOneOut or UnorderedSet for choices"),
    (DisARM(), OneHotCategorical(logits=torch.zeros(3)), "DisARM is for Bernoulli, not for OneHotCategorical"),
    (
        Reparameterized(),
        Categorical(logits=torch.zeros(3)),
        "no path through a sample of Categorical: take ScoreFunction",
    ),
    (Reparameterized(), Poisson(torch.ones(3)), "no path through a sample of Poisson"),
    (StraightThrough(), Categorical(logits=torch.zeros(3)), "a OneHotCategorical instead of a Categorical"),
    (Exact(), Poisson(torch.ones(3)), "Exact is for Bernoulli and Categorical and OneHotCategorical, not for Poisson"),
    (MeasureValued(), Gamma(1.0, 1.0), "MeasureValued is for"),
    (MeasureValued(), Normal(0.0, torch.ones((), requires_grad=True)), "detach its scale"),
    (LAX(nn.Linear(1, 1)), Bernoulli(logits=torch.zeros(2)), "LAX is for Normal, not for Bernoulli: take RELAX"),
]


@pytest.mark.parametrize(("estimator", "dist", "said"), REFUSED, ids=lambda each: type(each).__name__)
def test_a_wrong_distribution_is_a_sentence(estimator, dist, said):
    with pytest.raises(TypeError, match=said):
        estimator.sample(dist)


@pytest.mark.parametrize(
    ("make", "said"),
    [
        (lambda: LeaveOneOut(1), "LeaveOneOut needs 2 draws or more, got 1"),
        (lambda: ScoreFunction(0), "ScoreFunction needs 1 draws or more"),
        (lambda: GumbelSoftmax(0.0), "tau is a temperature above 0, got 0"),
        (lambda: REBAR(tau=-1.0), "tau is a temperature above 0"),
        (lambda: MovingAverage(1.0), r"a decay is in \[0, 1\), got 1"),
        (lambda: DiscreteLatent(torch.zeros(2, 3), unimix=1.0), r"unimix is in \[0, 1\), got 1"),
        (
            lambda: Exact()(coins(torch.zeros(15)), lambda z: z.sum(-1)),
            r"2 \*\* 15 values are too many to go through, the limit is 10000",
        ),
        (lambda: GumbelRao(rao=0), "GumbelRao needs 1 draws or more, got 0"),
        (lambda: DiscreteLatent(torch.zeros(2, 3), LeaveOneOut(2)), "a relaxation of one draw"),
        (lambda: DiscreteLatent(torch.zeros(2, 3), ReinMax(num=4)), "a relaxation of one draw"),
        (
            lambda: LeaveOneOut(4)(choice(LOGITS.expand(4, K)), lambda z: z.sum((-1, -2))),
            r"points \(4, 4\) is wanted, got \(4,\)",
        ),
        (
            lambda: ScoreFunction(baseline=torch.zeros(4, 1))(choice(LOGITS.expand(4, K)), lambda z: z.sum(-1)),
            r"the shape of the batch, got \(4, 1\), and the costs are \(1, 4\)",
        ),
        (
            lambda: RELAX(nn.Linear(K, 1))(choice(LOGITS.expand(4, K)), lambda z: z.sum(-1)),
            r"a critic gives \(4,\) for",
        ),
        (
            lambda: LeaveOneOut(4).surrogate(LeaveOneOut(4).sample(choice(LOGITS)), torch.zeros(3)),
            r"a cost for each of the points \(4,\) is wanted, got \(3,\)",
        ),
    ],
)
def test_wrong_values_are_sentences(make, said):
    with pytest.raises(ValueError, match=said):
        make()


@pytest.mark.parametrize("name", sorted(EVERY.keys() - {"REBAR", "RELAX", "LAX"}))  # these differentiate on their way
def test_compiled_in_one_graph(name):
    """The same numbers as eager, with the same draws."""
    make, family = EVERY[name]
    torch.compiler.reset()
    eager, traced = make(), make()
    decoder = torch.randn(K)

    def loss(estimator, leaf):
        return estimator(family(leaf), lambda z: (z * decoder).sum(-1).square()).sum()

    compiled = torch.compile(lambda leaf: loss(traced, leaf), fullgraph=True, backend="aot_eager")
    leaf = torch.randn(6, K).requires_grad_()
    for seed in range(2):
        torch.manual_seed(seed)
        expected = torch.autograd.grad(loss(eager, leaf), leaf)[0]
        torch.manual_seed(seed)
        torch.testing.assert_close(torch.autograd.grad(compiled(leaf), leaf)[0], expected)


# --- latents


def test_a_latent_has_the_gradient_that_torchrl_asks_for():
    from tensordict import TensorDict
    from tensordict.nn import ProbabilisticTensorDictModule

    logits = torch.randn(4, 2, K).requires_grad_()
    for estimator in (None, ReinMax(), GumbelRao(), GumbelSoftmax(hard=True)):
        module = ProbabilisticTensorDictModule(
            in_keys=["logits"],
            out_keys=["z"],
            distribution_class=DiscreteLatent,
            distribution_kwargs={"estimator": estimator, "unimix": 0.01},
            default_interaction_type="random",
        )
        z = module(TensorDict({"logits": logits}, batch_size=4))["z"]
        assert z.shape == (4, 2, K)
        torch.testing.assert_close(z.sum(-1), torch.ones(4, 2))
        assert ((z - z.round()).abs() < 1e-12).all()
        gradient = torch.autograd.grad((z * torch.randn(K)).sum(), logits)[0]
        assert (gradient.abs() > 0).all()


def test_unimix_mixes_a_uniform_distribution_in():
    latent = DiscreteLatent(torch.tensor([[100.0, 0.0, 0.0, 0.0]]), unimix=0.04)
    torch.testing.assert_close(latent.logits.exp(), torch.tensor([[0.97, 0.01, 0.01, 0.01]]))
    assert latent.rsample((3, 2)).shape == (3, 2, 1, 4)
    assert not latent.sample().requires_grad
    assert latent.expand((3, 2)).batch_shape == (3, 2)
    assert latent.mode.tolist() == [[1, 0, 0, 0]]
    assert latent.log_prob(latent.mode).item() == pytest.approx(math.log(0.97))
