"""Z-tests of gradient estimators with continuous noise: they are unbiased, and broken ones are detected."""

import pytest
import torch
from test_every_outcome import EXPECTED_COST
from torch import Tensor
from torch.distributions import (
    Independent,
    Normal,
)

from estimator_cases import (
    COINS,
    LOGITS,
    Critic,
    K,
    choice,
    coin_square,
    coins,
    exact_gradient,
    gradient_estimates,
    square,
)
from levin import estimators
from levin.estimators import (
    ARM,
    ARMS,
    LAX,
    REBAR,
    RELAX,
    DisARM,
    GumbelRao,
    GumbelSoftmax,
    LeaveOneOut,
    MeasureValued,
    MovingAverage,
    OptimalConstant,
    ScoreFunction,
    SelfCritical,
    StraightThrough,
    SumAndSample,
    UnorderedSet,
    WithoutReplacement,
    pathwise,
)
from levin.estimators.control_variates import relaxed_pair

# --- continuous noise


def z_scores(each: Tensor, exact: Tensor) -> float:
    """Return the largest |mean - exact| over coordinates, in standard errors (plus 1e-9)."""
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
    """Also for a cost with a constant offset, which does not change the gradient."""
    logits, function = PROBLEMS[family]
    each = gradient_estimates(estimator, family, logits, lambda z: function(z) + offset, ROWS)
    assert z_scores(each, exact_gradient(family, logits, function)) < 4.5


@pytest.mark.parametrize("family", [coins, choice])
def test_relax_is_unbiased_with_any_critic_and_learns(family):
    logits, function = PROBLEMS[family]
    torch.manual_seed(0)
    relax = RELAX(Critic(len(logits)))
    exact = exact_gradient(family, logits, function)
    assert z_scores(gradient_estimates(relax, family, logits, function, ROWS), exact) < 4.5
    relax.critic.out.weight.data.zero_()
    relax.critic.out.bias.data.zero_()  # the plain score function
    before = gradient_estimates(relax, family, logits, function, ROWS)
    optimizer = torch.optim.Adam(relax.parameters(), lr=1e-2)
    for _ in range(300):
        draws = relax.sample(family(logits.expand(256, -1)))
        optimizer.zero_grad()
        relax.variance(relax.gradient(draws, function(draws.value))).backward()
        optimizer.step()
    after = gradient_estimates(relax, family, logits, function, ROWS, seed=1)
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


def biased_average() -> MovingAverage:
    """Return a moving average that is wrong on purpose: it includes the current cost."""

    class WithTheCurrentCost(MovingAverage):
        def score(self, draws, cost):
            with torch.no_grad():
                self.average.lerp_(cost.mean(), 0.5)
                self.total.fill_(1)
            return super().score(draws, cost)

    return WithTheCurrentCost(decay=0.5)


class RebarWithoutConditionalPath(REBAR):
    """Broken REBAR: no gradient through the conditional noise of y~."""

    def draw(self, dist):
        b, y, other = relaxed_pair(torch.stack([dist.base_dist.logits, 0 * dist.base_dist.logits], -1), self.tau, dist)
        weight = torch.tensor([1.0, 0, 0]).view(3, 1).expand(3, *dist.batch_shape)
        return estimators.Draws(torch.stack([b, y, other.detach()]), dist.log_prob(b), weight)


class ArmsWithIndependentWeights(ARMS):
    """Broken ARMS: antithetic samples with the weights of independent ones."""

    def draw(self, dist):
        draws = super().draw(dist)
        logits = dist.base_dist.logits
        b = draws.value
        factor = (b - logits.detach().sigmoid()) / (self.num - 1)
        return self.at_logits(dist, b, factor - factor.mean(0))


class RelaxWithoutConditional(RELAX):
    """Broken RELAX: the weight of the score lacks c(y~)."""

    def gradient(self, draws, cost):
        _, leaf, score, y, other = draws.aux
        (path,) = torch.autograd.grad((self.critic(y) - self.critic(other)).sum(), leaf, create_graph=True)
        return cost[0].detach().unsqueeze(-1) * score + path


class UnconditionalGumbelRao(GumbelRao):
    """Broken GumbelRao: the noise is not conditioned on the sample."""

    def relaxed_sample(self, logits):
        many = logits.expand(self.rao, *logits.shape)
        y = ((many + pathwise.sample_gumbel(many)) / self.tau).softmax(-1).mean(0)
        return pathwise.straight_through(pathwise.sample_one_hot(logits), y)


class NonlinearInTheCost(WithoutReplacement):
    """Broken WithoutReplacement: adds a term that is quadratic in the cost."""

    def score(self, draws, cost):
        return super().score(draws, cost) + 0.05 * super().score(draws, cost * cost)


def test_the_z_test_detects_broken_estimators():
    exact = exact_gradient(coins, COINS, coin_square)
    assert z_scores(gradient_estimates(RebarWithoutConditionalPath(), coins, COINS, coin_square, ROWS), exact) > 4.5
    assert z_scores(gradient_estimates(ArmsWithIndependentWeights(4), coins, COINS, coin_square, ROWS), exact) > 4.5
    torch.manual_seed(0)
    critic = Critic(K)
    exact = exact_gradient(choice, LOGITS, square)
    assert z_scores(gradient_estimates(RelaxWithoutConditional(critic), choice, LOGITS, square, ROWS), exact) > 4.5
    mean = gradient_estimates(GumbelSoftmax(0.5, hard=True), choice, LOGITS, square, ROWS).mean(0)
    assert z_scores(gradient_estimates(UnconditionalGumbelRao(), choice, LOGITS, square, ROWS, seed=1), mean) > 4.5
    assert (
        z_scores(gradient_estimates(NonlinearInTheCost(4), choice, LOGITS, lambda z: square(z) + 5, ROWS), exact) > 4.5
    )
    for estimator in (StraightThrough(), GumbelSoftmax(hard=True), GumbelRao()):
        assert z_scores(gradient_estimates(estimator, choice, LOGITS, square, ROWS), exact) > 4.5
    # A moving average is over calls: make many calls with one sample each
    torch.manual_seed(0)
    for average, biased in ((MovingAverage(decay=0.5), False), (biased_average(), True)):
        each = []
        for _ in range(20_000):
            leaf = LOGITS.clone().requires_grad_()
            each.append(torch.autograd.grad(average(choice(leaf), square), leaf)[0])
        assert (z_scores(torch.stack(each), exact) > 4.5) == biased


def test_gumbel_rao_is_the_mean_of_straight_through_gumbel_softmax():
    """Both have the same expectation at every temperature; GumbelRao has less variance."""
    for tau in (0.5, 1.0):
        plain = gradient_estimates(GumbelSoftmax(tau, hard=True), choice, LOGITS, square, ROWS)
        rao = gradient_estimates(GumbelRao(tau, rao=10), choice, LOGITS, square, ROWS // 2, seed=1)
        deviation = (plain.var(0) / len(plain) + rao.var(0) / len(rao)).sqrt()
        assert ((plain.mean(0) - rao.mean(0)) / deviation).abs().max() < 4.5
        assert rao.var(0).sum() < 0.9 * plain.var(0).sum()


def test_gumbel_softmax_loses_bias_and_gains_variance_as_it_cools():
    exact = exact_gradient(choice, LOGITS, square)
    estimates = {
        tau: gradient_estimates(GumbelSoftmax(tau, hard=True), choice, LOGITS, square, ROWS)
        for tau in (2.0, 1.0, 0.3, 0.1)
    }
    bias = [float((each.mean(0) - exact).norm()) for each in estimates.values()]
    variance = [float(each.var(0).sum()) for each in estimates.values()]
    assert bias == sorted(bias, reverse=True)
    assert variance == sorted(variance)
    assert variance[1] == pytest.approx(0.81, rel=0.03)
    assert variance[3] == pytest.approx(15.3, rel=0.1)


def test_the_conditional_relaxed_sample_has_the_right_distribution():
    """y~ is y conditioned on b: both lie on b's side of 0.5 and have the same mean."""
    torch.manual_seed(0)
    logits = COINS.expand(ROWS, 3)
    two = torch.stack([logits, torch.zeros_like(logits)], -1)
    b, y, other = relaxed_pair(two, 0.5, coins(logits))
    assert torch.equal(y > 0.5, b == 1)
    assert torch.equal(other > 0.5, b == 1)
    deviation = ((y.var(0) + other.var(0)) / ROWS).sqrt()
    assert ((y.mean(0) - other.mean(0)) / deviation).abs().max() < 4.5


def test_variances_are_ordered_as_the_theorems_say():
    """Inequalities between variances that are proven in the literature."""

    def variance(estimator, family) -> float:
        logits, function = PROBLEMS[family]
        return float(gradient_estimates(estimator, family, logits, function, ROWS).var(0).sum())

    assert variance(DisARM(), coins) < variance(ARM(), coins)
    assert variance(SumAndSample(2), choice) < variance(ScoreFunction(), choice)
    value = ScoreFunction(num=4, baseline=EXPECTED_COST)
    assert variance(LeaveOneOut(4), choice) > 0.99 * variance(value, choice)  # Hoeffding
    arms, disarm_ = (variance(each, coins) for each in (ARMS(2), DisARM()))
    assert arms == pytest.approx(disarm_, rel=0.03)  # ARMS with two samples is DisARM
