"""A computation with several sampling steps, whose gradient estimate is put together from those of its nodes.

The expected cost is nested, and so is its estimate: each node's estimator takes all that comes after it as its cost.

    E_{z_1}[ c_1 + E_{z_2 | z_1}[ c_2 + ... ]]

    graph = StochasticGraph()
    z = graph.sample("z", OneHotCategorical(logits=encoder(x)), LeaveOneOut(4))    # [4, *B, K]
    a = graph.sample("a", Normal(network(z), 1.0), Reparameterized())              # [4, *B]: one draw, no dimension
    graph.cost("loss", (decoder(a) - x).square().sum(-1))                          # [4, *B]
    graph.surrogate().mean().backward()

Source: Schulman et al. 2015 (arXiv:1506.05254); van Krieken et al. 2021 (arXiv:2104.00428); the lecture's row 23.
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from levin.estimators.base import Draws, Estimator


class Node(NamedTuple):
    """A sampling step."""

    name: str
    dist: Distribution
    estimator: Estimator
    draws: Draws
    value: Tensor  # what the caller has: the points, without the dimension of a single one


@dataclass
class Cost:
    """What is paid once the first `after` nodes have been sampled; `of`: those of them that it may depend on."""

    value: Tensor
    after: int
    of: set[int]


class StochasticGraph:
    """Records sampling steps and costs in the order of the computation, and gives the surrogate of the expected cost.

    A node with several draws puts a dimension in front of all that are there: with the batch shape `[*B]` of the first
    distribution, what comes after nodes of 4 and then 2 draws is `[2, 4, *B, ...]`. A later distribution, or a cost,
    that does not depend on them may have the batch shape `[*B]` alone.

    Args:
        prune: A node is charged with the costs that are reachable from its points by autograd, instead of with all that
            are recorded after it. That is less variance, and right only if costs and later parameters depend on points
            by differentiable operations: no env, no `argmax`, no indexing, no `detach` in between. Points that are
            integers, and costs without a graph, are never pruned.
    """

    def __init__(self, *, prune: bool = False) -> None:
        self.prune = prune
        self.nodes: list[Node] = []
        self.costs: dict[str, Cost] = {}
        self.sizes: tuple[int, ...] = ()  # of the dimensions in front of the batch
        self.batch: torch.Size | None = None

    def sample(self, name: str, dist: Distribution, estimator: Estimator) -> Tensor:
        """The points of a new node: `[S, *sizes, *B, *E]`; those of an estimator with one point `[*sizes, *B, *E]`.

        Raises:
            ValueError: The name is taken, or the batch shape of the distribution is not that of the graph.
        """
        self._check_new(name)
        self.batch = dist.batch_shape if self.batch is None else self.batch
        expected = torch.Size([*self.sizes, *self.batch])
        if dist.batch_shape == self.batch != expected:
            dist = dist.expand(expected)
        if dist.batch_shape != expected:
            raise ValueError(f"{name!r} has the batch shape {[*dist.batch_shape]}, the graph {[*expected]} before it")
        draws = estimator.sample(dist)
        if self.prune and draws.value.is_floating_point() and not draws.value.requires_grad:
            draws = draws._replace(value=draws.value.detach().requires_grad_())  # so that autograd sees who reads it
        value = draws.value if len(draws.value) > 1 else draws.value.squeeze(0)
        self.nodes.append(Node(name, dist, estimator, draws, value))
        if len(draws.value) > 1:
            self.sizes = (len(draws.value), *self.sizes)
        return value

    def cost(self, name: str, value: Tensor) -> None:
        """Record a cost, `[*sizes, *B]` or `[*B]`, of all that was sampled so far.

        Raises:
            ValueError: The name is taken, or the shape is another.
        """
        self._check_new(name)
        self.batch = value.shape if self.batch is None else self.batch
        expected = torch.Size([*self.sizes, *self.batch])
        if value.shape not in (expected, self.batch):
            raise ValueError(f"the cost {name!r} is {[*value.shape]}, and {[*expected]} is wanted")
        self.costs[name] = Cost(value.expand(expected), len(self.nodes), self._reached(value))

    def surrogate(self, *, causal: bool = True) -> Tensor:
        """`[*B]`: forward an estimate of the expected sum of the costs, backward one of its gradient.

        Args:
            causal: A node is charged with what is recorded after it. Without, with every cost: a score function is then
                as unbiased, and as noisy, as simple REINFORCE.

        Raises:
            ValueError: There is no cost.
        """
        if not self.costs:
            raise ValueError("a graph without a cost has no expected cost")
        terms = list(self.costs.values())
        if not causal:
            everyone, full = set(range(len(self.nodes))), [*self.sizes, *(self.batch or ())]
            terms = [Cost(term.value.expand(full), len(self.nodes), everyone) for term in terms]
        for index in reversed(range(len(self.nodes))):
            later = [term for term in terms if term.after > index]
            terms = [term for term in terms if term.after <= index]
            charged = [term for term in later if index in term.of]
            others = [term for term in later if index not in term.of]
            if charged:
                terms.append(self._surrogate_of(index, charged))
            if others:
                terms.append(self._mean_over(index, others))
        return sum_terms(terms)

    def _surrogate_of(self, index: int, terms: list[Cost]) -> Cost:
        """What a node is charged with, as seen before it was sampled."""
        _, dist, estimator, draws, _ = self.nodes[index]
        of = set(range(index))
        if self.prune:  # through later costs, and through the parameters of the node itself
            source = draws.value if draws.value.grad_fn is not None else dist.log_prob(draws.value)
            of = set[int]().union(self._reached(source, index), *(term.of for term in terms)) - {index}
        return Cost(estimator.surrogate(draws, with_points(sum_terms(terms), draws)), index, of)

    def _mean_over(self, index: int, terms: list[Cost]) -> Cost:
        """What a node has no part in: its expectation over the points."""
        _, _, estimator, draws, _ = self.nodes[index]
        of = set[int]().union(*(term.of for term in terms))
        # The plain mean: that of Dice has a gradient of its own
        return Cost(Estimator.mean(estimator, draws, with_points(sum_terms(terms), draws)), index, of)

    def _check_new(self, name: str) -> None:
        if name in self.costs or any(node.name == name for node in self.nodes):
            raise ValueError(f"there is a {name!r} in this graph already")

    def _reached(self, value: Tensor, before: int | None = None) -> set[int]:
        """Which of the nodes `before` one it may depend on."""
        nodes = dict(enumerate(self.nodes[:before]))
        traced = {index: node.value for index, node in nodes.items() if node.value.requires_grad}
        if not self.prune or not value.requires_grad or not traced:
            return set(nodes)
        slopes = torch.autograd.grad(value.sum(), list(traced.values()), retain_graph=True, allow_unused=True)
        unread = {index for index, slope in zip(traced, slopes, strict=True) if slope is None}
        return set(nodes) - unread


def sum_terms(terms: list[Cost]) -> Tensor:
    """Their sum."""
    return torch.stack([term.value for term in terms]).sum(0)


def with_points(value: Tensor, draws: Draws) -> Tensor:
    """`[S, ...]`, also where there is one point, which has no dimension."""
    return value if len(draws.value) > 1 else value.unsqueeze(0)
