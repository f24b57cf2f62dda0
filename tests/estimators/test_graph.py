"""Stochastic graphs: exact, by going through every outcome of every node, and against REINFORCE's own loss."""

import itertools

import pytest
import torch
from torch import Tensor
from torch.distributions import Bernoulli, Categorical, Independent, Normal, OneHotCategorical
from torch.nn.functional import one_hot

from given import Given
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
    """Three choices, each depending on those before, and costs of them that have a parameter too."""

    def __init__(self) -> None:
        generator = torch.Generator().manual_seed(0)
        self.first = torch.randn(K, generator=generator).requires_grad_()
        self.second = torch.randn(K, K, generator=generator).requires_grad_()
        self.third = torch.randn(K, K, K, generator=generator).requires_grad_()
        self.scale = torch.tensor(1.3).requires_grad_()
        self.costs = [torch.randn(*[K] * n, generator=generator) for n in (1, 2, 3)]

    def gradient(self, value: Tensor) -> list[Tensor]:
        parameters = [getattr(self, name) for name in PARAMETERS]
        found = torch.autograd.grad(value, parameters, allow_unused=True)
        return [torch.zeros_like(p) if g is None else g for p, g in zip(parameters, found, strict=True)]

    def exact(self, nodes: int) -> list[Tensor]:
        p1, p2, p3 = (each.softmax(-1) for each in (self.first, self.second, self.third))
        c1, c2, c3 = self.costs
        expected = (p1 * self.scale * c1).sum() + (p1[:, None] * p2 * self.scale.square() * c2).sum()
        if nodes == 3:
            expected = expected + (p1[:, None, None] * p2[:, :, None] * p3 * c3).sum()
        return self.gradient(expected)

    def estimates(self, monkeypatch, estimators, *, prune=False, causal=True) -> tuple[Tensor, Tensor]:
        """The surrogates of all outcomes `[M]`, and the probability of each."""
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
            dist = Given(logits[n], indices)
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
    for name, found, exact in zip(PARAMETERS, mean, chain.exact(len(estimators)), strict=True):
        assert (found - exact).abs().max() < 1e-10, name


@pytest.mark.parametrize("estimators", SEVERAL[:3], ids=lambda each: "-".join(type(e).__name__ for e in each))
def test_pruning_a_chain_prunes_nothing(monkeypatch, estimators):
    chain = Chain()
    plain = chain.gradient(chain.estimates(monkeypatch, estimators)[0].sum())
    pruned = chain.gradient(chain.estimates(monkeypatch, estimators, prune=True)[0].sum())
    for one, other in zip(plain, pruned, strict=True):
        torch.testing.assert_close(one, other, rtol=0, atol=1e-10)


def two_branches(prune: bool, a: Tensor, b: Tensor) -> StochasticGraph:
    graph = StochasticGraph(prune=prune)
    x = graph.sample("x", OneHotCategorical(logits=a, validate_args=False), ScoreFunction())
    y = graph.sample("y", OneHotCategorical(logits=b, validate_args=False), ScoreFunction())
    graph.cost("of y", 10 * (y * torch.arange(float(K))).sum(-1))
    graph.cost("of x", (x * torch.arange(float(K))).sum(-1))
    return graph


def test_pruning_leaves_out_the_costs_of_other_branches():
    """Both are unbiased; the one that is pruned does not hear the other branch."""
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


def test_pruning_spares_dice_too():
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


def test_pruning_sees_parameters_that_the_points_do_not_carry():
    """x ~ Normal(loc, 0.5 + z): z is in the deviation alone, and the mode of x is its loc."""
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
        (found,) = torch.autograd.grad(graph.surrogate().sum(), logit)
        p = torch.tensor(0.3).sigmoid()
        exact = p * (1 - p) * (0.1 + 1.5**2 - 0.5**2)
        assert abs(found.mean() - exact) < 4.5 * found.std() / rows**0.5


def test_integers_are_not_pruned():
    graph = StochasticGraph(prune=True)
    logits = torch.zeros(K, requires_grad=True)
    index = graph.sample("index", Categorical(logits=logits), ScoreFunction())
    scale = torch.ones((), requires_grad=True)
    graph.cost("looked up", scale * torch.arange(float(K))[index])
    graph.surrogate().backward()
    assert logits.grad is not None


def test_a_path_through_two_nodes():
    """d/dm E[x^2], x ~ N(z, 1), z ~ N(m, 1), is 2 m on average; through both draws it is 2 x."""
    m = torch.full((20_000,), 0.5, requires_grad=True)
    graph = StochasticGraph()
    z = graph.sample("z", Normal(m, 1.0), Reparameterized())
    x = graph.sample("x", Normal(z, 1.0), Reparameterized())
    graph.cost("square", x.square())
    (gradient,) = torch.autograd.grad(graph.surrogate().sum(), m)
    torch.testing.assert_close(gradient, 2 * x.detach())


def test_a_relaxed_node_before_a_score_function():
    """The gradient of a reparameterised draw goes on through the parameters of a later choice."""
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
    assert abs(exact) > 20 * gradient.std() / rows**0.5  # it could fail


def test_two_graphs_at_once():
    """There is no state between them: interleaved, each gives what it gives alone."""

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


def test_shapes():
    graph = StochasticGraph()
    logits = torch.zeros(5, 2, K, requires_grad=True)
    z = graph.sample("z", Independent(OneHotCategorical(logits=logits), 1), LeaveOneOut(4))
    assert z.shape == (4, 5, 2, K)
    a = graph.sample("a", Normal(z.sum((-1, -2)), 1.0), Reparameterized())
    assert a.shape == (4, 5)
    b = graph.sample("b", Bernoulli(logits=torch.zeros(5)), LeaveOneOut(2))  # knows nothing of z and a
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


def test_wrong_use_is_said():
    graph = StochasticGraph()
    with pytest.raises(ValueError, match="without a cost"):
        graph.surrogate()
    graph.sample("z", Bernoulli(logits=torch.zeros(5)), LeaveOneOut(4))
    with pytest.raises(ValueError, match="'z' in this graph already"):
        graph.sample("z", Bernoulli(logits=torch.zeros(5)), LeaveOneOut(4))
    with pytest.raises(ValueError, match="'z' in this graph already"):
        graph.cost("z", torch.zeros(5))
    with pytest.raises(ValueError, match=r"batch shape \[6\], the graph \[4, 5\]"):
        graph.sample("w", Bernoulli(logits=torch.zeros(6)), LeaveOneOut(4))
    with pytest.raises(ValueError, match=r"the cost 'c' is \[4\], and \[4, 5\] is wanted"):
        graph.cost("c", torch.zeros(4))
    with pytest.raises(TypeError, match="SelfCritical is for"):
        graph.sample("p", torch.distributions.Poisson(torch.ones(5)), SelfCritical())
