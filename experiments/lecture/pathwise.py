"""Pathwise derivatives beside the score function: at a frozen critic, and for a cost that becomes a jump."""

from pathlib import Path

import numpy as np
import torch
from experiments.lecture.critics import gradient_statistics
from experiments.lecture.drawing import COLORS, INK, panels, save
from experiments.lecture.gradient_estimation import draw_cloud, draw_errors
from experiments.study import write_table
from torch import Tensor
from torch.distributions import Normal

from levin.estimators import LeaveOneOut, Reparameterized
from levin.lab.pictures import read_csv

HERE = Path(__file__).parent
SLOPES = (0.5, 1.0, 2.0, 5.0, 10.0, 20.0, 50.0, 100.0, 200.0, 1000.0)
ESTIMATES = 100_000
EDGE = 0.5  # position of the jump, in standard deviations from the mean of z


def cost(z: Tensor, slope: float) -> Tensor:
    """Return a smooth step: 0 far below the edge, 1 far above it."""
    return (slope * (z - EDGE)).sigmoid()


def exact_gradient(slope: float) -> Tensor:
    """Return d/d mu E_{z ~ N(mu, 1)}[cost(z)] at mu = 0, by quadrature, `[1]`."""
    z = torch.linspace(-8, 8, 400_001, dtype=torch.float64)
    density = torch.exp(-0.5 * z.square()) / np.sqrt(2 * np.pi)
    return torch.trapezoid(cost(z, slope) * z * density, z).float().unsqueeze(0)


def measure() -> None:
    """Write the errors of two samples, pathwise and by leave-one-out, over the slope of the cost."""
    torch.manual_seed(0)
    rows = []
    for slope in SLOPES:
        exact = exact_gradient(slope)
        for name, estimator in (("leave-one-out", LeaveOneOut(2)), ("pathwise", Reparameterized(2))):
            mu = torch.zeros(ESTIMATES, requires_grad=True)
            surrogate = estimator(Normal(mu, 1.0), lambda z, slope=slope: cost(z, slope))
            (estimates,) = torch.autograd.grad(surrogate.sum(), mu)
            numbers = gradient_statistics(list(estimates.unsqueeze(1)), exact)
            rows.append([name, slope, *(f"{number:.5g}" for number in numbers.values())])
    write_table(HERE / "pathwise.csv", ["estimator", "slope", *numbers], rows)


def draw() -> None:
    """Draw estimates at the critic (measured by `gradient_estimation`), and the errors over the slope."""
    critic = read_csv(HERE / "gradient_estimation.csv")
    figure, (left, middle, right) = panels(3, width=11.5, height=3.8)
    styles = {"score, value baseline": COLORS[0], "leave-one-out": COLORS[2], "pathwise": COLORS[1]}
    draw_cloud(left, critic, {name: styles[name] for name in ("score, value baseline", "pathwise")})
    draw_errors(middle, critic, styles)
    middle.set_title("A frozen critic, 64 states")
    table = read_csv(HERE / "pathwise.csv")
    for name in ("leave-one-out", "pathwise"):
        line = [(float(row["slope"]), float(row["std"])) for row in table if row["estimator"] == name]
        right.plot(*zip(*line, strict=True), "o-", ms=5, lw=2, color=styles[name], label=name)
    right.set(xscale="log", yscale="log", xlabel="slope k of the cost sigmoid(k (z - 1/2))")
    right.set(ylabel="standard deviation / gradient", title="A cost that becomes a jump")
    right.axhline(1, color=INK, lw=0.8)
    right.legend(fontsize=8.5)
    save(figure, "pathwise")
