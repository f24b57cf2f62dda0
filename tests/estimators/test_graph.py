"""Stochastic computation graphs: exact gradients by enumeration of every outcome of every node, pruning, shapes."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Independent, Normal, OneHotCategorical
from torch.nn.functional import one_hot

from fixed_samples import FixedSamples
from levin.estimators import (
    Dice,
    Exact,
    LeaveOneOut,
    MeasureValued,
    OptimalConstant,
    Reparameterized,
    ScoreFunction,
    SelfCritical,
    StochasticGraph,
    StraightThrough,
    pathwise,
)

K = 3
PARAMETERS = ("first", "second", "third", "scale")


class Chain:
    """Chain of three categorical variables, each conditioned on the earlier ones, with parametric costs."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.first = torch.randn(K, generator=generator).requires_grad_()
        self.second = torch.randn(K, K, generator=generator).requires_grad_()
        self.third = torch.randn(K, K, K, generator=generator).requires_grad_()
        self.scale = torch.tensor(1.3).requires_grad_()
        self.costs = [torch.randn(*[K] * n, generator=generator) for n in (1, 2, 3)]

    def gradient(self, value: Tensor) -> list[Tensor]:
        parameters = [getattr(self, name) for name in PARAMETERS]
        gradients = torch.autograd.grad(value, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, gradients, strict=True)]

    def exact(self, nodes: int) -> list[Tensor]:
        p1, p2, p3 = (each.softmax(-1) for each in (self.first, self.second, self.third))
        c1, c2, c3 = self.costs
        expected = (p1 * self.scale * c1).sum() + (p1[:, None] * p2 * self.scale.square() * c2).sum()
        if nodes == 3:
            expected = expected + (p1[:, None, None] * p2[:, :, None] * p3 * c3).sum()
        return self.gradient(expected)

    def estimates(self, monkeypatch, estimators, *, prune=False, causal=True) -> tuple[Tensor, Tensor]:
        """Return the surrogate of every outcome `[M]`, and the probability of each `[M]`."""
        points = [1, *(POINTS.get(type(each), getattr(each, "num", 1)) for each in estimators)]
        random = [0 if type(each) is Exact else getattr(each, "num", 1) for each in estimators]
        outer = [torch.tensor(points[: n + 1]).prod().item() for n in range(len(estimators))]
        choices = [int(o) * r for o, r in zip(outer, random, strict=True)]
        every = torch.tensor(list(itertools.product(range(K), repeat=sum(choices)))).T  # [choices, M]
        num = every.shape[1]
        graph, probability, z = StochasticGraph(prune=prune), torch.zeros(num), []
        terms = ("i,...i", "ij,...i,...j", "ijk,...i,...j,...k")
        logits = [self.first.expand(num, K), None, None]
        for n, (estimator, indices) in enumerate(zip(estimators, every.split(choices), strict=True)):
            if n == 1:
                logits[1] = torch.einsum("...i,ij->...j", z[0], self.second)
            if n == 2:
                logits[2] = torch.einsum("...i,...j,ijk->...k", z[0], z[1], self.third)
            if random[n]:
                indices = indices.view(random[n], *graph.sizes, num)  # noqa: PLW2901
                drawn = one_hot(indices, K).to(self.first)
                monkeypatch.setattr(pathwise, "sample_one_hot", lambda _, drawn=drawn: drawn)
                log_probs = (drawn * logits[n].log_softmax(-1)).sum(-1)
                probability = probability + log_probs.detach().reshape(-1, num).sum(0)
            dist = FixedSamples(logits[n], indices)
            z.append(graph.sample(f"z{n}", dist, estimator))
            factor = (self.scale, self.scale.square(), 1.0)[n]
            graph.cost(f"c{n}", factor * torch.einsum(terms[n] + "->...", self.costs[n], *z))
        assert probability.exp().sum().item() == pytest.approx(1, abs=1e-10)
        return graph.surrogate(causal=causal), probability.exp()


POINTS = {Exact: K, MeasureValued: K}
SEVERAL = [
    (ScoreFunction(), LeaveOneOut(2)),
    (LeaveOneOut(2), Exact()),
    (Exact(), ScoreFunction(num=1, baseline=0.7)),
    (LeaveOneOut(3), StraightThrough()),
    (MeasureValued(), ScoreFunction()),
    (Dice(), Dice()),
    (OptimalConstant(2), LeaveOneOut(2)),
    (LeaveOneOut(2), ScoreFunction(), Exact()),
    (ScoreFunction(), LeaveOneOut(2), StraightThrough()),
    (Exact(), Dice(), LeaveOneOut(2)),
    (ScoreFunction(2), MeasureValued(), Exact()),
]


@pytest.mark.parametrize("causal", [True, False])
@pytest.mark.parametrize("estimators", SEVERAL, ids=lambda each: "-".join(type(e).__name__ for e in each))
def test_mixed_estimators_are_exact_in_expectation(monkeypatch, estimators, causal):
    if not causal and isinstance(estimators[-1], StraightThrough):
        estimators = (*estimators[:-1], LeaveOneOut(2))
    chain = Chain()
    surrogate, probability = chain.estimates(monkeypatch, estimators, causal=causal)
    mean = chain.gradient((surrogate * probability).sum())
    for name, gradient, exact in zip(PARAMETERS, mean, chain.exact(len(estimators)), strict=True):
        assert (gradient - exact).abs().max() < 1e-10, name


@pytest.mark.parametrize("estimators", SEVERAL[:3], ids=lambda each: "-".join(type(e).__name__ for e in each))
def test_pruning_a_chain_prunes_nothing(monkeypatch, estimators):
    chain = Chain()
    plain = chain.gradient(chain.estimates(monkeypatch, estimators)[0].sum())
    pruned = chain.gradient(chain.estimates(monkeypatch, estimators, prune=True)[0].sum())
    for one, other in zip(plain, pruned, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def two_branches(prune: bool, a: Tensor, b: Tensor) -> StochasticGraph:
    """Build a graph of two independent variables with one cost each."""
    graph = StochasticGraph(prune=prune)
    x = graph.sample("x", OneHotCategorical(logits=a, validate_args=False), ScoreFunction())
    y = graph.sample("y", OneHotCategorical(logits=b, validate_args=False), ScoreFunction())
    graph.cost("of y", 10 * (y * torch.arange(float(K))).sum(-1))
    graph.cost("of x", (x * torch.arange(float(K))).sum(-1))
    return graph


def test_pruning_leaves_out_the_costs_of_other_branches():
    """Both gradients are unbiased; the pruned one has less variance, because it ignores the other branch."""
    rows = 50_000
    spread, means = {}, {}
    for prune in (True, False):
        torch.manual_seed(0)
        a = torch.zeros(rows, K, requires_grad=True)
        b = torch.zeros(rows, K, requires_grad=True)
        (gradient,) = torch.autograd.grad(two_branches(prune, a, b).surrogate().sum(), a)
        spread[prune], means[prune] = gradient.var(0).sum(), gradient.mean(0)
    exact = torch.tensor([-1.0, 0.0, 1.0]) / 3
    assert spread[True] < 0.02 * spread[False]
    for prune in (True, False):
        assert (means[prune] - exact).abs().max() < 5 * (spread[prune] / rows).sqrt()


def test_pruning_reduces_the_variance_of_dice():
    spread = {}
    for prune in (True, False):
        torch.manual_seed(0)
        a = torch.zeros(20_000, K, requires_grad=True)
        graph = StochasticGraph(prune=prune)
        graph.sample("x", OneHotCategorical(logits=a, validate_args=False), Dice())
        b = torch.zeros(20_000, K, requires_grad=True)
        y = graph.sample("y", OneHotCategorical(logits=b, validate_args=False), Dice())
        graph.cost("of y", 10 * y[..., 0])
        graph.cost("of x", graph.nodes[0].value[..., 0])
        spread[prune] = torch.autograd.grad(graph.surrogate().sum(), a)[0].var(0).sum()
    assert spread[True] < 0.05 * spread[False]


def test_pruning_keeps_dependences_through_distribution_parameters():
    """x ~ Normal(loc, 0.5 + z) depends on z through its standard deviation, to which x's value has no autograd path."""
    rows = 200_000
    logit = torch.full((rows,), 0.3, requires_grad=True)
    loc = torch.zeros(rows, requires_grad=True)
    for estimator in (ScoreFunction(), SelfCritical()):
        torch.manual_seed(0)
        graph = StochasticGraph(prune=True)
        z = graph.sample("z", Bernoulli(logits=logit), ScoreFunction())
        x = graph.sample("x", Normal(loc, 0.5 + z), estimator)
        graph.cost("of z", 0.1 * z)
        graph.cost("of x", x.square())
        (gradient,) = torch.autograd.grad(graph.surrogate().sum(), logit)
        p = torch.tensor(0.3).sigmoid()
        exact = p * (1 - p) * (0.1 + 1.5**2 - 0.5**2)
        assert abs(gradient.mean() - exact) < 4.5 * gradient.std() / rows**0.5


def test_integers_are_not_pruned():
    graph = StochasticGraph(prune=True)
    logits = torch.zeros(K, requires_grad=True)
    index = graph.sample("index", Categorical(logits=logits), ScoreFunction())
    scale = torch.ones((), requires_grad=True)
    graph.cost("looked up", scale * torch.arange(float(K))[index])
    graph.surrogate().backward()
    assert logits.grad is not None


def test_a_pathwise_gradient_through_two_nodes():
    """For x ~ N(z, 1), z ~ N(m, 1), the pathwise gradient of x^2 with respect to m is 2 x."""
    m = torch.full((20_000,), 0.5, requires_grad=True)
    graph = StochasticGraph()
    z = graph.sample("z", Normal(m, 1.0), Reparameterized())
    x = graph.sample("x", Normal(z, 1.0), Reparameterized())
    graph.cost("square", x.square())
    (gradient,) = torch.autograd.grad(graph.surrogate().sum(), m)
    torch.testing.assert_close(gradient, 2 * x.detach())


def test_a_relaxed_node_before_a_score_function():
    """A reparameterized sample gets a gradient through the parameters of a later Bernoulli variable."""
    rows = 200_000
    torch.manual_seed(0)
    m = torch.full((rows,), 0.3, requires_grad=True)
    graph = StochasticGraph()
    z = graph.sample("z", Normal(m, 0.5), Reparameterized())
    b = graph.sample("b", Bernoulli(logits=z), ScoreFunction())
    graph.cost("cost", (b - 0.2).square())
    (gradient,) = torch.autograd.grad(graph.surrogate().sum(), m)
    noise = torch.linspace(-8, 8, 4001)
    weight = torch.exp(-noise.square() / 2) / (2 * torch.pi) ** 0.5 * (noise[1] - noise[0])
    p = torch.sigmoid(0.3 + 0.5 * noise)
    exact = (weight * p * (1 - p) * (0.64 - 0.04)).sum()
    assert abs(gradient.mean() - exact) < 4.5 * gradient.std() / rows**0.5
    assert abs(exact) > 20 * gradient.std() / rows**0.5  # the test has enough power


def test_interleaved_graphs_are_independent():
    """Two graphs built at the same time give the gradients that each gives alone."""

    def alone(seed: int) -> Tensor:
        torch.manual_seed(seed)
        logits = torch.zeros(4, K, requires_grad=True)
        graph = StochasticGraph()
        z = graph.sample("z", OneHotCategorical(logits=logits), LeaveOneOut(4))
        graph.cost("cost", z[..., 0])
        return torch.autograd.grad(graph.surrogate().sum(), logits)[0]

    expected = alone(1), alone(2)
    logits = [torch.zeros(4, K, requires_grad=True) for _ in range(2)]
    graphs = [StochasticGraph(), StochasticGraph()]
    z = []
    for seed, graph, each in zip((1, 2), graphs, logits, strict=True):
        torch.manual_seed(seed)
        z.append(graph.sample("z", OneHotCategorical(logits=each), LeaveOneOut(4)))
    for graph, each in zip(graphs, z, strict=True):
        graph.cost("cost", each[..., 0])
    for graph, each, gradient in reversed(list(zip(graphs, logits, expected, strict=True))):
        torch.testing.assert_close(torch.autograd.grad(graph.surrogate().sum(), each)[0], gradient)


def test_shapes_of_values_and_costs():
    graph = StochasticGraph()
    logits = torch.zeros(5, 2, K, requires_grad=True)
    z = graph.sample("z", Independent(OneHotCategorical(logits=logits), 1), LeaveOneOut(4))
    assert z.shape == (4, 5, 2, K)
    a = graph.sample("a", Normal(z.sum((-1, -2)), 1.0), Reparameterized())
    assert a.shape == (4, 5)
    b = graph.sample("b", Bernoulli(logits=torch.zeros(5)), LeaveOneOut(2))  # independent of z and a
    assert b.shape == (2, 4, 5)
    graph.cost("small", torch.ones(5))
    graph.cost("large", a + b)
    assert graph.surrogate().shape == (5,)
    assert graph.surrogate(causal=False).shape == (5,)


def test_the_value_is_the_expected_cost():
    logits = torch.tensor([0.2, -0.4, 0.9])
    graph = StochasticGraph()
    graph.cost("before", torch.tensor(2.0))
    z = graph.sample("z", OneHotCategorical(logits=logits), Exact())
    graph.cost("after", (z * torch.tensor([1.0, 2.0, 3.0])).sum(-1))
    expected = 2 + (logits.softmax(-1) * torch.tensor([1.0, 2.0, 3.0])).sum()
    torch.testing.assert_close(graph.surrogate(), expected)


def test_invalid_use_of_a_graph_is_an_error():
    graph = StochasticGraph()
    with pytest.raises(ValueError, match="the graph has no cost"):
        graph.surrogate()
    graph.sample("z", Bernoulli(logits=torch.zeros(5)), LeaveOneOut(4))
    with pytest.raises(ValueError, match="the name 'z' is already used"):
        graph.sample("z", Bernoulli(logits=torch.zeros(5)), LeaveOneOut(4))
    with pytest.raises(ValueError, match="the name 'z' is already used"):
        graph.cost("z", torch.zeros(5))
    with pytest.raises(ValueError, match=r"batch shape \[6\], but the graph needs \[4, 5\]"):
        graph.sample("w", Bernoulli(logits=torch.zeros(6)), LeaveOneOut(4))
    with pytest.raises(ValueError, match=r"the cost 'c' has shape \[4\], but needs \[4, 5\]"):
        graph.cost("c", torch.zeros(4))
    with pytest.raises(TypeError, match="SelfCritical is for"):
        graph.sample("p", torch.distributions.Poisson(torch.ones(5)), SelfCritical())
