"""Reward-to-go against the whole return over the horizon, and the factor gamma^t."""

from functools import cache
from typing import Any

import torch
from experiments.lecture.cartpole import FORMS, build, gradient, total_variance
from experiments.lecture.drawing import HERE, panels, read, save
from experiments.lecture.learning import draw_curves, measure_curves, read_curves, variance_curves
from experiments.study import write_table
from experiments.variance.run import collect_episodes
from tensordict import TensorDict
from torch import Tensor

NAME = "credit_assignment"
CURVES = HERE / f"{NAME}_curves.csv"
TRAJECTORIES = 1000
HORIZONS, GAMMAS = (5, 10, 20, 40, 80), (0.8, 0.9, 0.95, 0.99)
KEPT = "with gamma^t"  # name of the runs


def measure() -> None:
    """Write credit_assignment.csv: variances by horizon and cosines by gamma; and the learning curves with gamma^t."""
    write_table(HERE / f"{NAME}.csv", ["quantity", "at", "value", "standard_error"], [*variances(), *cosines()])
    measure_curves({KEPT: ["algo.discount_state_weighting=true"]}, range(3), CURVES)


@cache
def trajectories() -> list[TensorDict]:
    """Return trajectories of the fixed policy, `[1, T]` each."""
    loader = build("return", seed=1)[1]
    return [collect_episodes(loader, 1) for _ in range(TRAJECTORIES)]


def shorten(rollout: TensorDict, horizon: int) -> TensorDict:
    """Return the first steps of an episode, as an episode that ends there."""
    short = rollout[:, :horizon].clone()
    short["next", "done"][:, -1] = True
    return short


def variances() -> list[list[Any]]:
    """Return Var[g] of simple REINFORCE and of reward-to-go, if only the first steps of an episode count."""
    rows, episodes = [], trajectories()
    for name in list(FORMS)[:2]:
        algorithm = build(FORMS[name], seed=0)[0]
        for horizon in HORIZONS:
            short = [shorten(each, horizon) for each in episodes]
            samples = torch.stack([gradient(algorithm, each, algorithm.weight(each)) for each in short])
            rows.append([f"variance of {name}", horizon, *(f"{each:.5g}" for each in total_variance(samples))])
    return rows


def cosines() -> list[list[Any]]:
    """Return the cosine between the mean gradients with and without gamma^t, and that of two estimates with it.

    The second shows the noise: both halves of the trajectories have the same expectation.
    """
    rows, episodes = [], trajectories()
    for gamma in GAMMAS:
        algorithm = build("reward_to_go", seed=0, overrides=(f"algo.gamma={gamma}",))[0]
        means: dict[bool, Tensor] = {}
        for keep in (True, False):
            algorithm.discount_state_weighting = keep
            samples = torch.stack([gradient(algorithm, each, algorithm.weight(each)) for each in episodes])
            means[keep] = torch.stack([samples[::2].mean(0), samples[1::2].mean(0)])  # [2, P]
        across = torch.cosine_similarity(means[True], means[False].flip(0)).mean()
        noise = torch.cosine_similarity(means[True][0], means[True][1], dim=0)
        rows.append(["cosine across", gamma, f"{float(across):.4f}", ""])
        rows.append(["cosine of halves", gamma, f"{float(noise):.4f}", ""])
    return rows


def draw() -> None:
    """Draw variances, cosines and learning curves."""
    figure, (left, middle, right) = panels(3, width=11.5)
    values: dict[str, dict[float, float]] = {}
    for row in read(NAME):
        values.setdefault(row["quantity"], {})[float(row["at"])] = float(row["value"])
    for name in list(FORMS)[:2]:
        by_horizon = values[f"variance of {name}"]
        left.plot(list(by_horizon), list(by_horizon.values()), "o-", label=name)
    left.set(xscale="log", yscale="log", xlabel="steps that count", ylabel="Var[g] of one trajectory", title="variance")
    left.set_xticks(HORIZONS, [str(each) for each in HORIZONS])
    left.minorticks_off()
    left.legend()
    labels = {"cosine of halves": "with and with (noise)", "cosine across": "with and without"}
    for name, label in labels.items():
        middle.plot([f"{gamma:g}" for gamma in values[name]], list(values[name].values()), "o-", label=label)
    middle.set(xlabel=r"$\gamma$", ylabel="cosine of mean gradients", title=r"direction with and without $\gamma^t$")
    middle.legend(loc="lower right")
    dropped = variance_curves("reward-to-go")["reward-to-go"]
    curves = {r"without $\gamma^t$": dropped, r"with $\gamma^t$": read_curves(CURVES)[KEPT]}
    draw_curves(right, curves)
    right.set_title(r"learning with $G_t$, $\gamma = 0.99$")
    right.legend(loc="upper left")
    save(figure, NAME)
