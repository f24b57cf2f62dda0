"""Score-function estimates of a SAC actor's gradient at a frozen critic, with and without a baseline."""

from pathlib import Path
from typing import cast

import matplotlib.pyplot as plt
import torch
from experiments.lecture.critics import gradient_statistics, train
from experiments.lecture.drawing import COLORS, INK, panels, save
from experiments.study import write_table
from torch import Tensor
from torch.distributions import Independent, Normal

from levin.algorithms.sac import SAC
from levin.envs.batched import Pendulum
from levin.estimators import Estimator, LeaveOneOut, Reparameterized, ScoreFunction
from levin.lab.pictures import read_csv
from levin.runs.load import load_algorithm

HERE = Path(__file__).parent
STATES, ESTIMATES = 64, 200
SAMPLES = (1, 2, 4, 16, 64)
CLOUD = 150  # estimates in the left panel, of one sample each
METHODS = ("score", "score, value baseline", "leave-one-out", "pathwise")


class FrozenActor:
    """Gradient of E_{a ~ pi}[min_i Q_i(s, a)] of a trained SAC at some states of its own episodes, critic frozen.

    The sampled variable is u, with the action tanh(u), so that the distribution is a Gaussian. theta is the output of
    the actor's network: mean and log standard deviation in each state, `[B, 2]`.
    """

    def __init__(self) -> None:
        run = train(("sac",))["sac", 0]
        self.sac = cast(SAC, load_algorithm(run).requires_grad_(False))
        self.observation = visited_states(self.sac)
        network, trunk = self.sac.actor.network, self.sac.actor.trunk
        self.theta = network(trunk(self.observation)).requires_grad_()

    def distribution(self) -> Independent:
        """Return the Gaussian of u in each state: batch shape `[B]`, event shape `[1]`."""
        loc, log_std = self.theta.chunk(2, -1)
        return Independent(Normal(loc, log_std.exp()), 1)

    def q(self, u: Tensor) -> Tensor:
        """Return the critics' smaller value of the actions tanh(u): `[S, B, 1] -> [S, B]`."""
        observation = self.observation.expand(len(u), -1, -1)
        return self.sac.critic(observation, u.tanh()).amin(0).squeeze(-1)

    def exact(self) -> tuple[Tensor, Tensor]:
        """Return E Q in each state, `[B]`, and its gradient in theta, `[2 B]`, by quadrature with 2001 nodes."""
        nodes = torch.linspace(-6, 6, 2001)
        weights = torch.softmax(-0.5 * nodes.square(), 0)
        loc, log_std = self.theta.chunk(2, -1)
        value = weights @ self.q(loc + log_std.exp() * nodes[:, None, None])
        return value.detach(), torch.autograd.grad(value.sum(), self.theta)[0].flatten()

    def estimate(self, estimator: Estimator) -> Tensor:
        """Return one estimate of the gradient in theta, `[2 B]`."""
        surrogate = estimator(self.distribution(), self.q)  # [B]
        return torch.autograd.grad(surrogate.sum(), self.theta)[0].flatten()


@torch.no_grad()
def visited_states(sac: SAC) -> Tensor:
    """Return observations `[STATES, 3]` of Pendulum-v1 at random times of episodes of the stochastic policy."""
    torch.manual_seed(0)
    env = Pendulum(num_envs=STATES)
    env.set_seed(0)
    observation, seen = env.reset()["observation"], []
    for _ in range(100):
        seen.append(observation)
        after, _, _ = env.dynamics(env.state, env.action_bound * sac.actor(observation).sample())
        env.state.copy_(after)
        observation = env.observe(after)
    return torch.stack(seen)[torch.randint(100, (STATES,)), torch.arange(STATES)]


def estimators(value: Tensor, samples: int) -> dict[str, Estimator]:
    """Return the estimators by name; leave-one-out needs two samples."""
    made = {
        "score": ScoreFunction(samples),
        "score, value baseline": ScoreFunction(samples, baseline=value),
        "leave-one-out": LeaveOneOut(max(samples, 2)),
        "pathwise": Reparameterized(samples),
    }
    return {name: made[name] for name in METHODS if samples > 1 or name != "leave-one-out"}


def measure() -> None:
    """Write the errors by number of samples, and single estimates of the gradient in one state."""
    problem = FrozenActor()
    torch.manual_seed(0)
    value, exact = problem.exact()
    rows = []
    for samples in SAMPLES:
        for name, estimator in estimators(value, samples).items():
            numbers = gradient_statistics([problem.estimate(estimator) for _ in range(ESTIMATES)], exact)
            rows.append(["error", name, samples, *(f"{number:.5g}" for number in numbers.values())])
    median = int(exact.view(-1, 2).square().sum(1).sqrt().argsort()[STATES // 2])  # of median slope
    pair = exact.view(-1, 2)[median].tolist()
    rows.append(["cloud", "exact", 0, *[""] * 4, *(f"{number:.5g}" for number in pair)])
    for name, estimator in estimators(value, 1).items():
        for _ in range(CLOUD):
            pair = problem.estimate(estimator).view(-1, 2)[median].tolist()
            rows.append(["cloud", name, 1, *[""] * 4, *(f"{number:.5g}" for number in pair)])
    write_table(HERE / "gradient_estimation.csv", ["kind", "estimator", "samples", *numbers, "mean", "log_std"], rows)


def draw_errors(axes: plt.Axes, table: list[dict[str, str]], styles: dict[str, str]) -> None:
    """Draw the relative error of each estimator (name -> color) over the number of samples."""
    for name, color in styles.items():
        rows = [row for row in table if row["kind"] == "error" and row["estimator"] == name]
        line = [(int(row["samples"]), float(row["rmse"])) for row in rows]
        axes.plot(*zip(*line, strict=True), "o-", ms=5, lw=2, color=color, label=name)
    axes.axhline(1, color=INK, lw=0.8)
    axes.set(xscale="log", yscale="log", xlabel="samples per state", ylabel="RMS error / length of the gradient")
    axes.set_xticks(SAMPLES, [str(number) for number in SAMPLES])
    axes.set_xticks([], minor=True)
    axes.legend(fontsize=8.5)


def draw_cloud(axes: plt.Axes, table: list[dict[str, str]], styles: dict[str, str]) -> None:
    """Draw single estimates in one state as points, with the exact gradient as a cross."""
    for name, color in styles.items():
        rows = [row for row in table if row["kind"] == "cloud" and row["estimator"] == name]
        points = [(float(row["mean"]), float(row["log_std"])) for row in rows]
        axes.scatter(*zip(*points, strict=True), s=14, color=color, alpha=0.6, lw=0, label=name)
    exact = next(row for row in table if row["estimator"] == "exact")
    axes.plot(float(exact["mean"]), float(exact["log_std"]), "P", ms=12, mfc=COLORS[5], mec=INK, label="exact")
    axes.set(xlabel="gradient in the mean", ylabel="gradient in the log std", title="One state, one sample each")
    axes.legend(fontsize=8.5)


def draw() -> None:
    """Draw a cloud of estimates without a baseline and with one, and the error by number of samples."""
    table = read_csv(HERE / "gradient_estimation.csv")
    figure, (left, middle, right) = panels(3, width=11.5, height=3.8)
    styles = {"score": COLORS[3], "score, value baseline": COLORS[0], "leave-one-out": COLORS[2]}
    draw_cloud(left, table, {name: styles[name] for name in METHODS[:2]})
    draw_cloud(middle, table, {name: styles[name] for name in METHODS[1:2]})
    middle.set_title("The estimates with a baseline")
    draw_errors(right, table, styles)
    right.set_title(f"A frozen critic, {STATES} states")
    save(figure, "gradient_estimation")
