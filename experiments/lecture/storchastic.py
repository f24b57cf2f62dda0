"""Two sampling steps in one graph: what each choice of estimators costs in variance and in bias."""

from pathlib import Path

import matplotlib.pyplot as plt
import numpy as np
import torch
from experiments.lecture.critics import gradient_statistics
from experiments.lecture.drawing import COLORS, INK, panels, save
from experiments.study import write_table
from torch import Tensor
from torch.distributions import Normal, OneHotCategorical

from levin.estimators import (
    Estimator,
    Exact,
    GumbelSoftmax,
    LeaveOneOut,
    ReinMax,
    Reparameterized,
    ScoreFunction,
    StochasticGraph,
    StraightThrough,
)
from levin.lab.pictures import read_csv

HERE = Path(__file__).parent
ESTIMATES = 20_000  # of each pair
PRICE = torch.tensor([3.0, 2.5, 3.5])  # of the three choices
THETA = torch.tensor([0.3, -0.4, 0.1, -1.0, 0.2, 1.2])  # logits of z, then the mean of x after each choice
STD = 0.5

# Name -> estimators of z and x, and whether a node pays only for later costs. Each has three or four evaluations.
PAIRS: dict[str, tuple[Estimator, Estimator, bool]] = {
    "score 4, score, every cost": (ScoreFunction(4), ScoreFunction(1), False),
    "score 4, score": (ScoreFunction(4), ScoreFunction(1), True),
    "leave-one-out 2, leave-one-out 2": (LeaveOneOut(2), LeaveOneOut(2), True),
    "leave-one-out 4, pathwise": (LeaveOneOut(4), Reparameterized(1), True),
    "Gumbel-softmax 4, pathwise": (GumbelSoftmax(0.5, num=4), Reparameterized(1), True),
    "straight-through 4, pathwise": (StraightThrough(num=4), Reparameterized(1), True),
    "ReinMax 4, pathwise": (ReinMax(num=4), Reparameterized(1), True),
    "exact 3, pathwise": (Exact(), Reparameterized(1), True),
}


def surrogate(theta: Tensor, first: Estimator, second: Estimator, causal: bool) -> Tensor:
    """Return the surrogate `[N]` of a choice z with a price, followed by a number x with a loss; theta is `[N, 6]`."""
    graph = StochasticGraph()
    z = graph.sample("z", OneHotCategorical(logits=theta[:, :3]), first)  # [4, N, 3]
    graph.cost("price", (z * PRICE).sum(-1))
    x = graph.sample("x", Normal((z * theta[:, 3:]).sum(-1), STD), second)  # [4, N]
    graph.cost("loss", loss(x))
    return graph.surrogate(causal=causal)


def loss(x: Tensor) -> Tensor:
    """Return the loss of x, which is far from linear."""
    return (2 * x).sin() + 0.5 * x.square()


def exact_gradient() -> Tensor:
    """Return the gradient of the expected cost by summing over z and by Gauss-Hermite quadrature over x."""
    nodes, weights = (torch.from_numpy(each) for each in np.polynomial.hermite_e.hermegauss(80))
    theta = THETA.double().requires_grad_()
    expected = (weights / weights.sum() * loss(theta[3:, None] + STD * nodes)).sum(-1) + PRICE.double()
    (gradient,) = torch.autograd.grad((theta[:3].softmax(-1) * expected).sum(), theta)
    return gradient.float()


def measure() -> None:
    """Estimate the gradient many times with each pair, and write bias and standard deviation for each node."""
    torch.manual_seed(0)
    exact, rows = exact_gradient(), []
    for name, (first, second, causal) in PAIRS.items():
        theta = THETA.expand(ESTIMATES, -1).clone().requires_grad_()
        (estimates,) = torch.autograd.grad(surrogate(theta, first, second, causal).sum(), theta)
        for node, part in (("z", slice(0, 3)), ("x", slice(3, 6)), ("both", slice(0, 6))):
            numbers = gradient_statistics(list(estimates[:, part]), exact[part])
            rows.append([name, node, *(f"{value:.5g}" for value in numbers.values())])
    write_table(HERE / "storchastic.csv", ["pair", "node", *numbers], rows)


def draw() -> None:
    """Draw the graph, and the bias and the standard deviation of every pair."""
    rows = {(row["pair"], row["node"]): row for row in read_csv(HERE / "storchastic.csv")}
    figure, (left, right) = panels(2, width=10.5, height=4.0, ratios=(1, 2.1))
    draw_graph(left)
    for place, name in enumerate(reversed(PAIRS)):
        for offset, node, color in ((0.17, "z", COLORS[0]), (-0.17, "x", COLORS[1])):
            row = rows[name, node]
            right.barh(place + offset, float(row["std"]), 0.3, color=color, label=node if not place else None)
            if float(row["bias"]) > 4 * float(row["standard_error"]):
                right.plot(float(row["bias"]), place + offset, "D", color=COLORS[3], ms=6, clip_on=False, zorder=3)
    right.plot([], [], "D", color=COLORS[3], label="bias, where there is one")
    right.set_yticks(range(len(PAIRS)), list(reversed(PAIRS)))
    right.set(xlabel="standard deviation of one estimate / length of the gradient", title="Estimates of its gradient")
    right.legend(loc="lower right")
    save(figure, "storchastic")


def draw_graph(axes: plt.Axes) -> None:
    """Draw parameters, sampling steps (circles) and costs (diamonds) with the paths between them."""
    places = {"logits": (0, 2), "z": (0, 1), "price": (1.1, 1), "means": (-1.1, 1), "x": (0, 0), "loss": (1.1, 0)}
    for start, end in (("logits", "z"), ("z", "price"), ("z", "x"), ("means", "x"), ("x", "loss")):
        arrow = {"arrowstyle": "-|>", "color": INK, "shrinkA": 17, "shrinkB": 17, "lw": 1.4}
        axes.annotate("", places[end], places[start], arrowprops=arrow)
    styles = {"z": ("o", COLORS[0]), "x": ("o", COLORS[1]), "price": ("D", COLORS[3]), "loss": ("D", COLORS[3])}
    for name, place in places.items():
        marker, color = styles.get(name, ("s", INK))
        axes.plot(*place, marker, ms=28 if marker != "D" else 24, mfc="none", mec=color, mew=1.8)
        axes.text(place[0], place[1] if name in "zx" else place[1] + 0.36, name, ha="center", va="center", color=INK)
    axes.set(xlim=(-1.6, 1.6), ylim=(-0.5, 2.6), title="Two sampling steps")
    axes.axis("off")
