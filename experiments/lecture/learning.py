"""Learning curves in the figures: of the study of the variance, and of runs that a part trains itself."""

import csv
from collections.abc import Iterable
from pathlib import Path

import numpy as np
from experiments.lecture.drawing import HERE
from experiments.study import read_evaluations, train_runs, write_table
from experiments.variance.run import COMMON, ENV_STEPS, REINFORCE
from matplotlib.axes import Axes

RUNS = HERE.parent.parent / "runs" / "lecture"
EVERY = 5000  # env steps
Curves = dict[str, dict[int, dict[int, float]]]  # label -> seed -> env steps -> return


def measure_curves(forms: dict[str, list[str]], seeds: Iterable[int], path: Path) -> None:
    """Train REINFORCE with these overrides, and write every evaluation of every seed. Complete runs are kept."""
    runs = {(name, seed): RUNS / f"{name.replace(' ', '_')}_s{seed}" for name in forms for seed in seeds}
    settings = [f"total_env_steps={ENV_STEPS}", f"eval.every={EVERY}"]
    train_runs(
        {run: [*COMMON, *REINFORCE, *forms[name], f"seed={seed}", *settings] for (name, seed), run in runs.items()}
    )
    rows = []
    for (name, seed), run in runs.items():
        # Iterations end with an episode, at other env steps for each seed: round down to a grid that all share.
        grid = {int(row["env_steps"]) // EVERY * EVERY: row["eval/return_mean"] for row in read_evaluations(run)}
        rows += [[name, seed, *each] for each in grid.items()]
    write_table(path, ["form", "seed", "env_steps", "return_mean"], rows)


def read_curves(path: Path) -> Curves:
    """Return the curves of a table with the columns form, seed, env_steps and return_mean."""
    curves: Curves = {}
    with path.open() as file:
        for row in csv.DictReader(file):
            by_step = curves.setdefault(row["form"], {}).setdefault(int(row["seed"]), {})
            by_step[int(row["env_steps"])] = float(row["return_mean"])
    return curves


def variance_curves(*names: str) -> Curves:
    """Return curves of these forms from the study of the variance."""
    curves = read_curves(HERE.parent / "variance" / "curves.csv")
    return {name: curves[name] for name in names}


def draw_curves(axes: Axes, curves: Curves) -> None:
    """Draw the mean over seeds of each form, where all seeds were evaluated, and each seed as a thin line."""
    for name, by_seed in curves.items():
        steps = sorted(set.intersection(*(set(each) for each in by_seed.values())))
        returns = np.array([[each[step] for step in steps] for each in by_seed.values()])  # [seeds, steps]
        (line,) = axes.plot(steps, returns.mean(0), label=name, linewidth=2)
        axes.plot(steps, returns.T, color=line.get_color(), alpha=0.3, linewidth=0.8)
    axes.xaxis.set_major_formatter(lambda step, _: f"{step / 1000:g}k")
    axes.set(xlabel="env steps", ylabel="return")
