"""REINFORCE with a value baseline, as a whole: learning curves of stored results, and how soon each form is there."""

import csv
import gzip
from pathlib import Path

import numpy as np
from experiments.lecture.cartpole import FORMS
from experiments.lecture.drawing import COLORS, HERE, panels, save
from experiments.lecture.learning import Curves, draw_curves, variance_curves
from experiments.study import write_table

from levin.core.paths import EXPERIMENTS

NAME = "reinforce_with_baseline"
RESULTS = {
    "baseline, rollout": "reinforce_inverted_pendulum",
    "baseline, bootstrap": "reinforce_inverted_pendulum_bootstrap",
}
EVERY = 25_000  # env steps of the grid on which the results are compared
ENOUGH = {"CartPole-v1": 400.0, "InvertedPendulum-v4": 950.0}


def read_training(path: Path) -> dict[int, dict[int, float]]:
    """Return the mean return of a stored result's training episodes, by seed and by env steps in steps of `EVERY`."""
    values: dict[int, dict[int, list[float]]] = {}
    with gzip.open(path, "rt") as file:
        for row in csv.DictReader(file):
            step = (int(row["env_steps"]) // EVERY + 1) * EVERY
            values.setdefault(int(row["seed"]), {}).setdefault(step, []).append(float(row["return_mean"]))
    return {seed: {step: float(np.mean(each)) for step, each in by_step.items()} for seed, by_step in values.items()}


def curves_by_env() -> dict[str, Curves]:
    """Return the stored curves of both envs."""
    results = {name: read_training(EXPERIMENTS / result / "training.csv.gz") for name, result in RESULTS.items()}
    return {"CartPole-v1": variance_curves(*FORMS), "InvertedPendulum-v4": results}


def measure() -> None:
    """Write reinforce_with_baseline.csv: the env steps at which each seed is first above a return; no training."""
    rows = []
    for env, curves in curves_by_env().items():
        for form, by_seed in curves.items():
            for seed, by_step in by_seed.items():
                reached = [step for step, value in sorted(by_step.items()) if value >= ENOUGH[env]]
                rows.append([env, form, seed, ENOUGH[env], reached[0] if reached else ""])
    write_table(HERE / f"{NAME}.csv", ["env", "form", "seed", "return", "env_steps"], rows)


def draw() -> None:
    """Draw the learning curves, and the env steps that each seed took."""
    figure, (left, middle, right) = panels(3, width=11.5)
    for axes, (env, curves) in zip((left, right), curves_by_env().items(), strict=True):
        draw_curves(axes, curves)
        axes.set_title(env)
        axes.legend(loc="lower right" if axes is right else "upper left", fontsize=8)
    right.xaxis.set_major_formatter(lambda step, _: f"{step / 1e6:g}M")
    with (EXPERIMENTS / "variance" / "gradient.csv").open() as file:
        variance = {row["form"]: float(row["variance"]) for row in csv.DictReader(file)}
    middle.bar(["simple", "reward-to-go", "value baseline"], [variance[form] for form in FORMS], color=COLORS[:3])
    middle.set(
        yscale="log",
        ylim=(1e3, 3e5),
        ylabel="Var[g] of one trajectory",
        title="variance, a fixed policy on CartPole-v1",
    )
    save(figure, NAME)
