"""Gradient estimators for Normal, Poisson, Gamma and other distributions, and higher derivatives with DiCE."""

import math

import pytest
import torch
from test_unbiased import ROWS, z_scores
from torch import Tensor
from torch.distributions import (
    Bernoulli,
    Beta,
    Categorical,
    Distribution,
    Gamma,
    MixtureSameFamily,
    Normal,
    Poisson,
    TransformedDistribution,
)
from torch.distributions.transforms import TanhTransform

from estimator_cases import (
    gradient_estimates,
)
from levin.estimators import (
    Dice,
    LeaveOneOut,
    MeasureValued,
    MovingAverage,
    OptimalConstant,
    Reparameterized,
    ScoreFunction,
    SelfCritical,
)

# --- other distributions


@pytest.mark.parametrize("k", [0.3, 2.0])
def test_a_normal_variable_and_a_square(k):
    """The gradient of E[(x - k)^2] with respect to the mean m is 2 d, d = m - k; variances have closed forms."""
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
        each = gradient_estimates(estimator, family, loc, function, 400_000)
        assert abs(each.mean() - 2 * d) < 4.5 * each.std() / len(each) ** 0.5, estimator
        if variance is not None:
            assert each.var().item() == pytest.approx(variance, rel=0.03), estimator


class Grid(Normal):
    """Normal distribution whose samples are a fixed grid of the noise `[rows]`, for quadrature."""

    noise = torch.linspace(-12, 12, 24_001, dtype=torch.float64)

    def rsample(self, sample_shape=()):
        return (self.loc + self.scale * self.noise).expand(*sample_shape, -1)

    def sample(self, sample_shape=()):
        return self.rsample(sample_shape).detach()


@pytest.mark.parametrize(("d", "scale"), [(1.0, 1.0), (0.7, 0.5), (-2.0, 1.5)])
def test_closed_forms_of_a_square_by_quadrature(d, scale, monkeypatch):
    """Means and variances agree to nine digits."""
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
    # The distance between the two samples of MeasureValued has a Rayleigh distribution.
    far = torch.linspace(0, 14, 24_001)
    rayleigh = far * (-far.square() / 2).exp() * (far[1] - far[0])
    monkeypatch.setattr(Tensor, "exponential_", lambda self: self.copy_(far.square() / 2))
    assert moments_of(MeasureValued(), rayleigh) == pytest.approx((2 * d, d**2 * (16 / math.pi - 4)), rel=1e-5)


def test_a_value_baseline_for_a_square():
    each = gradient_estimates(
        ScoreFunction(baseline=2.0), lambda m: Normal(m, 1.0), torch.tensor(1.0), torch.square, 400_000
    )
    assert each.var().item() == pytest.approx(18, rel=0.03)
    plain = gradient_estimates(ScoreFunction(), lambda m: Normal(m, 1.0), torch.tensor(1.0), torch.square, 400_000)
    assert plain.var().item() == pytest.approx(30, rel=0.03)


@pytest.mark.parametrize("estimator", [ScoreFunction(), LeaveOneOut(4), MeasureValued(), MovingAverage(), Dice()])
def test_poisson(estimator):
    """E[x^2] = r + r^2 has the gradient 1 + 2 r, also as the difference of expectations E[(x + 1)^2 - x^2]."""
    rate = torch.tensor(1.7)
    each = gradient_estimates(estimator, Poisson, rate, torch.square, 200_000)
    assert abs(each.mean() - (1 + 2 * rate)) < 4.5 * each.std() / len(each) ** 0.5
    if isinstance(estimator, MeasureValued):
        assert each.var().item() == pytest.approx(4 * 1.7, rel=0.03)


@pytest.mark.parametrize("estimator", [ScoreFunction(), LeaveOneOut(4), Reparameterized(), Dice()])
def test_gamma(estimator):
    """E[x^2] = a (a + 1) / b^2 has the gradients (2 a + 1) / b^2 and -2 a (a + 1) / b^3."""
    a, b = 2.5, 1.4
    each = gradient_estimates(estimator, lambda p: Gamma(p[:, 0], p[:, 1]), torch.tensor([a, b]), torch.square, 200_000)
    exact = torch.tensor([(2 * a + 1) / b**2, -2 * a * (a + 1) / b**3])
    assert z_scores(each, exact) < 4.5


def test_the_score_function_works_for_any_density():
    """Beta, a mixture of normals and a tanh-transformed normal, compared with quadrature on a fine grid."""
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
            each = gradient_estimates(estimator, family, parameters, torch.sin, ROWS)
            assert z_scores(each, exact) < 4.5, name


def test_dice_has_derivatives_of_any_order():
    """The second derivative of E[f] of a coin is p (1 - p) (1 - 2 p) (f1 - f0); ScoreFunction's is wrong."""
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
