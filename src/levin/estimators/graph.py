"""Stochastic computation graph: combine one gradient estimator per sampling step into one surrogate.

The expected cost is nested, and so is its estimate: the cost of each node is the estimate of all that follows it.

    E_{z_1}[ c_1 + E_{z_2 | z_1}[ c_2 + ... ]]

    graph = StochasticGraph()
    z = graph.sample("z", OneHotCategorical(logits=encoder(x)), LeaveOneOut(4))    # [4, *B, K]
    a = graph.sample("a", Normal(network(z), 1.0), Reparameterized())              # [4, *B]: one sample adds no dim
    graph.cost("loss", (decoder(a) - x).square().sum(-1))                          # [4, *B]
    graph.surrogate().mean().backward()

Source: Schulman et al. 2015 (arXiv:1506.05254); van Krieken et al. 2021 (arXiv:2104.00428).
"""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor
from torch.distributions import Distribution

from levin.estimators.base import Draws, Estimator


class Node(NamedTuple):
    """One sampling step of the graph."""

    name: str
    dist: Distribution
    estimator: Estimator
    draws: Draws
    value: Tensor  # the points as the caller gets them: without the leading dimension if there is only one


@dataclass
class Cost:
    """A cost, or an estimate of one.

    Args:
        value: Costs `[*sizes, *B]`.
        after: Number of nodes sampled before the cost was recorded.
        depends_on: Indices of the nodes, among these, that the cost may depend on.
    """

    value: Tensor
    after: int
    depends_on: set[int]


class StochasticGraph:
    """Record sampling steps and costs in the order of computation, and return the surrogate of the expected cost.

    A node with several points adds a leading dimension: if the first distribution has the batch shape `[*B]`, tensors
    computed from nodes with 4 and then 2 points are `[2, 4, *B, ...]`. A later distribution or cost that does not
    depend on these nodes may have the batch shape `[*B]` alone.

    Args:
        prune: Charge a node only with the costs that autograd reaches from its points, instead of with all costs
            recorded after it. This lowers the variance, but is correct only if costs and later parameters depend on the
            points through differentiable operations: no env, no `argmax`, no indexing, no `detach` in between. Nodes
            with integer points are never pruned, nor are costs without an autograd graph.
    """

    def __init__(self, *, prune: bool = False) -> None:
        self.prune = prune
        self.nodes: list[Node] = []
        self.costs: dict[str, Cost] = {}
        self.sizes: tuple[int, ...] = ()  # numbers of points, the dimensions before the batch shape
        self.batch: torch.Size | None = None

    def sample(self, name: str, dist: Distribution, estimator: Estimator) -> Tensor:
        """Add a node and return its points: `[S, *sizes, *B, *E]`, or `[*sizes, *B, *E]` if S is 1.

        Raises:
            ValueError: The name is taken, or the batch shape of the distribution does not fit the graph.
            TypeError: The estimator does not support this distribution.
        """
        self._check_new(name)
        self.batch = dist.batch_shape if self.batch is None else self.batch
        expected = torch.Size([*self.sizes, *self.batch])
        if dist.batch_shape == self.batch != expected:
            dist = dist.expand(expected)
        if dist.batch_shape != expected:
            raise ValueError(
                f"the distribution of {name!r} has the batch shape {[*dist.batch_shape]}, "
                f"but the graph needs {[*expected]} here"
            )
        draws = estimator.sample(dist)
        if self.prune and draws.value.is_floating_point() and not draws.value.requires_grad:
            # So that autograd finds what depends on the points
            draws = draws._replace(value=draws.value.detach().requires_grad_())
        value = draws.value if len(draws.value) > 1 else draws.value.squeeze(0)
        self.nodes.append(Node(name, dist, estimator, draws, value))
        if len(draws.value) > 1:
            self.sizes = (len(draws.value), *self.sizes)
        return value

    def cost(self, name: str, value: Tensor) -> None:
        """Record a cost, `[*sizes, *B]` or `[*B]`, that may depend on all nodes so far.

        Raises:
            ValueError: The name is taken, or the shape of the cost does not fit the graph.
        """
        self._check_new(name)
        self.batch = value.shape if self.batch is None else self.batch
        expected = torch.Size([*self.sizes, *self.batch])
        if value.shape not in (expected, self.batch):
            raise ValueError(f"the cost {name!r} has shape {[*value.shape]}, but needs {[*expected]}")
        self.costs[name] = Cost(value.expand(expected), len(self.nodes), self._dependencies(value))

    def surrogate(self, *, causal: bool = True) -> Tensor:
        """Return the surrogate `[*B]`: its value estimates the expected sum of the costs, its gradient the gradient.

        Args:
            causal: True: charge a node only with the costs recorded after it. False: charge it with every cost; a score
                function is then still unbiased, and as noisy as REINFORCE with the full return.

        Raises:
            ValueError: The graph has no cost.
        """
        if not self.costs:
            raise ValueError("the graph has no cost: record one with cost(name, value) before surrogate()")
        terms = list(self.costs.values())
        if not causal:
            all_nodes, shape = set(range(len(self.nodes))), [*self.sizes, *(self.batch or ())]
            terms = [Cost(term.value.expand(shape), len(self.nodes), all_nodes) for term in terms]
        for index in reversed(range(len(self.nodes))):
            later = [term for term in terms if term.after > index]
            terms = [term for term in terms if term.after <= index]
            charged = [term for term in later if index in term.depends_on]
            others = [term for term in later if index not in term.depends_on]
            if charged:
                terms.append(self._charge_node(index, charged))
            if others:
                terms.append(self._average_over_node(index, others))
        return sum_costs(terms)

    def _charge_node(self, index: int, terms: list[Cost]) -> Cost:
        """Return the surrogate of a node for these costs, as one cost recorded before the node was sampled."""
        _, dist, estimator, draws, _ = self.nodes[index]
        depends_on = set(range(index))
        if self.prune:  # earlier nodes are reached through the costs, and through the parameters of this node
            source = draws.value if draws.value.grad_fn is not None else dist.log_prob(draws.value)
            depends_on = self._dependencies(source, index).union(*(term.depends_on for term in terms)) - {index}
        return Cost(estimator.surrogate(draws, with_point_dimension(sum_costs(terms), draws)), index, depends_on)

    def _average_over_node(self, index: int, terms: list[Cost]) -> Cost:
        """Return the mean over the node's points of costs that do not depend on the node."""
        _, _, estimator, draws, _ = self.nodes[index]
        depends_on = set[int]().union(*(term.depends_on for term in terms))
        # Not `estimator.mean`: that of Dice adds a gradient
        return Cost(Estimator.mean(estimator, draws, with_point_dimension(sum_costs(terms), draws)), index, depends_on)

    def _check_new(self, name: str) -> None:
        if name in self.costs or any(node.name == name for node in self.nodes):
            raise ValueError(f"the name {name!r} is already used in this graph")

    def _dependencies(self, value: Tensor, before: int | None = None) -> set[int]:
        """Return the indices of the nodes that `value` may depend on, among those below `before` (None: all)."""
        nodes = dict(enumerate(self.nodes[:before]))
        traced = {index: node.value for index, node in nodes.items() if node.value.requires_grad}
        if not self.prune or not value.requires_grad or not traced:
            return set(nodes)
        gradients = torch.autograd.grad(value.sum(), list(traced.values()), retain_graph=True, allow_unused=True)
        unreached = {index for index, gradient in zip(traced, gradients, strict=True) if gradient is None}
        return set(nodes) - unreached


def sum_costs(terms: list[Cost]) -> Tensor:
    """Return the sum of the costs, `[*sizes, *B]`."""
    return torch.stack([term.value for term in terms]).sum(0)


def with_point_dimension(value: Tensor, draws: Draws) -> Tensor:
    """Return `[S, ...]`: add the dimension that the value lacks if there is only one point."""
    return value if len(draws.value) > 1 else value.unsqueeze(0)
