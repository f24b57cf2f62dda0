"""Gumbel-softmax at a frozen critic of discrete SAC: bias and noise by temperature, and the error by samples."""

from pathlib import Path
from typing import cast

import torch
from experiments.lecture.critics import gradient_statistics, train
from experiments.lecture.drawing import COLORS, INK, panels, save
from experiments.study import write_table
from torch import Tensor

from levin.algorithms.sac_discrete import SACDiscrete
from levin.envs.batched import CartPole
from levin.estimators import (
    Estimator,
    Exact,
    GumbelSoftmax,
    LeaveOneOut,
    ReinMax,
    ScoreFunction,
    StraightThrough,
)
from levin.estimators.latent import DiscreteLatent
from levin.lab.pictures import read_csv
from levin.runs.load import load_algorithm

HERE = Path(__file__).parent
STATES, ESTIMATES = 64, 200
TEMPERATURES = (0.1, 0.2, 0.3, 0.5, 0.7, 1.0, 1.5, 2.0, 3.0)
SAMPLES = (1, 2, 4, 16, 64)


class FrozenDiscreteActor:
    """Gradient of E_{a ~ pi}[min_i Q_i(s, a)] of a trained discrete SAC at some states, critic frozen.

    The critic reads a one-hot action. theta are the logits in each state, `[B, 2]`.
    """

    def __init__(self) -> None:
        run = train(("sac_discrete",))["sac_discrete", 0]
        self.sac = cast(SACDiscrete, load_algorithm(run).requires_grad_(False))
        self.observation = visited_states(self.sac)
        self.theta = self.sac.actor(self.sac.trunk(self.observation)).logits.requires_grad_()

    def distribution(self) -> DiscreteLatent:
        """Return the distribution of one-hot actions: batch shape `[B]`, event shape `[1, 2]`."""
        return self.sac.one_hot.distribution(self.theta)

    def q(self, action: Tensor) -> Tensor:
        """Return the critics' smaller value of one-hot or relaxed actions: `[S, B, 1, 2] -> [S, B]`."""
        observation = self.observation.expand(len(action), -1, -1)
        return self.sac.critic(observation, action.squeeze(-2)).amin(0).squeeze(-1)

    def estimate(self, estimator: Estimator) -> Tensor:
        """Return one estimate of the gradient in the logits, `[2 B]`."""
        surrogate = estimator(self.distribution(), self.q)
        return torch.autograd.grad(surrogate.sum(), self.theta)[0].flatten()


@torch.no_grad()
def visited_states(sac: SACDiscrete) -> Tensor:
    """Return observations `[STATES, 4]` of CartPole-v1 at random times of the first 100 steps of episodes."""
    torch.manual_seed(0)
    env = CartPole(num_envs=STATES)
    env.set_seed(0)
    observation, seen = env.reset()["observation"], []
    for _ in range(100):
        seen.append(observation)
        after, _, ended = env.dynamics(env.state, sac.actor(sac.trunk(observation)).sample())
        env.state.copy_(torch.where(ended.unsqueeze(-1), env.state, after))  # a pole that falls stays where it was
        observation = env.observe(env.state)
    return torch.stack(seen)[torch.randint(100, (STATES,)), torch.arange(STATES)]


def estimators(samples: int) -> dict[str, Estimator]:
    """Return the estimators that are compared by number of samples; leave-one-out needs two."""
    made: dict[str, Estimator] = {
        "score": ScoreFunction(samples),
        "Gumbel-softmax, 0.2": GumbelSoftmax(0.2, num=samples),
        "Gumbel-softmax, 1": GumbelSoftmax(1.0, num=samples),
        "straight-through": StraightThrough(num=samples),
        "ReinMax": ReinMax(num=samples),
    }
    return made | ({"leave-one-out": LeaveOneOut(samples)} if samples > 1 else {})


def measure() -> None:
    """Write the errors by temperature and by number of samples, and the critic between two actions of some states."""
    problem = FrozenDiscreteActor()
    torch.manual_seed(0)
    exact = problem.estimate(Exact())
    jobs = [("samples", name, samples, each) for samples in SAMPLES for name, each in estimators(samples).items()]
    for tau in TEMPERATURES:
        jobs.append(("temperature", "Gumbel-softmax", tau, GumbelSoftmax(tau)))
        jobs.append(("temperature", "ST Gumbel-softmax", tau, GumbelSoftmax(tau, hard=True)))
    rows = []
    for kind, name, x, estimator in jobs:
        numbers = gradient_statistics([problem.estimate(estimator) for _ in range(ESTIMATES)], exact)
        rows.append([kind, name, x, *(f"{number:.5g}" for number in numbers.values())])
    share = torch.linspace(0, 1, 41)
    line = torch.stack([1 - share, share], -1)[:, None, None].expand(-1, STATES, -1, -1)  # from left to right
    with torch.no_grad():
        values = problem.q(line)
    for state in range(8):
        for at, value in zip(share.tolist(), (values[:, state] - values[0, state]).tolist(), strict=True):
            rows.append(["critic", str(state), f"{at:.3f}", f"{value:.5g}", "", "", ""])
    write_table(HERE / "gumbel_softmax.csv", ["kind", "name", "x", *numbers], rows)


def draw() -> None:
    """Draw the critic between actions, bias and noise by temperature, and errors by number of samples."""
    table = read_csv(HERE / "gumbel_softmax.csv")
    figure, (left, middle, right) = panels(3, width=12.0, height=3.8)
    for state in range(8):
        rows = [row for row in table if row["kind"] == "critic" and row["name"] == str(state)]
        line = [(float(row["x"]), float(row["std"])) for row in rows]
        left.plot(*zip(*line, strict=True), color=COLORS[0], lw=1.6, alpha=0.8)
        left.plot([0, 1], [line[0][1], line[-1][1]], "o", color=COLORS[1], ms=6, zorder=3, clip_on=False)
    left.set(xlabel="weight of the action 'right'", ylabel="Q(s, a) - Q(s, left)", title="The critic between actions")
    for name, color in (("Gumbel-softmax", COLORS[0]), ("ST Gumbel-softmax", COLORS[4])):
        rows = [row for row in table if row["kind"] == "temperature" and row["name"] == name]
        for column, style in (("std", "o-"), ("bias", "o--")):
            line = [(float(row["x"]), float(row[column])) for row in rows]
            label = f"{name}, {'standard deviation' if column == 'std' else 'bias'}"
            middle.plot(*zip(*line, strict=True), style, ms=4, lw=2, color=color, label=label)
    middle.set(xscale="log", yscale="log", xlabel="temperature", ylabel="error / length of the gradient")
    middle.set_ylim(0.2, 100)
    middle.set_title("One sample per state")
    middle.legend(fontsize=8)
    names = dict.fromkeys(row["name"] for row in table if row["kind"] == "samples")
    colors = {"score": COLORS[3], "leave-one-out": COLORS[2], "straight-through": COLORS[5], "ReinMax": COLORS[1]}
    for name in names:
        rows = [row for row in table if row["kind"] == "samples" and row["name"] == name]
        line = [(int(row["x"]), float(row["rmse"])) for row in rows]
        style = "o--" if name.endswith(" 1") else "o-"
        right.plot(*zip(*line, strict=True), style, ms=5, lw=2, color=colors.get(name, COLORS[0]), label=name)
    right.axhline(1, color=INK, lw=0.8)
    right.set(xscale="log", yscale="log", xlabel="samples per state", ylabel="RMS error / length of the gradient")
    right.set_xticks(SAMPLES, [str(number) for number in SAMPLES])
    right.set_xticks([], minor=True)
    right.set_title("Error by number of samples")
    right.set_ylim(0.1, 3000)
    right.legend(fontsize=8, ncols=2, loc="upper right")
    save(figure, "gumbel_softmax")
