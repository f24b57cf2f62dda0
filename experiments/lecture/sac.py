"""Entropy, temperature, state coverage and return of SAC with a learned and with fixed temperatures."""

from pathlib import Path
from statistics import mean
from typing import Any

from experiments.lecture.critics import train
from experiments.lecture.drawing import COLORS, INK, panels, save
from experiments.study import write_table

from levin.lab.pictures import read_csv
from levin.results.curves import align_curves, read_curves

HERE = Path(__file__).parent
SEEDS = range(3)
ARMS = {"sac": "learned", "sac_alpha_0": "alpha 0", "sac_alpha_5": "alpha 5", "ddpg": "DDPG"}
METRICS = ("train/entropy", "train/alpha", "train/coverage", "eval/return_mean")


def measure() -> None:
    """Train SAC on Pendulum-v1 with each temperature, and DDPG, and write its metrics over the env steps."""
    rows: list[list[Any]] = []
    for (name, seed), run in train(tuple(ARMS), SEEDS).items():
        for row in read_csv(run / "metrics.csv"):
            step = round(int(row["env_steps"]) / 500) * 500  # the same for all seeds
            rows += [[name, seed, step, metric, row[metric]] for metric in METRICS if row.get(metric)]
    write_table(HERE / "sac.csv", ["run", "seed", "env_steps", "metric", "value"], rows)


def draw() -> None:
    """Draw the four metrics, and stored learning curves of SAC, TD3 and DDPG."""
    table = read_csv(HERE / "sac.csv")
    figure, axes = panels(4, width=13.0, height=3.6)
    for (name, label), color in zip(ARMS.items(), (COLORS[0], COLORS[3], COLORS[1], COLORS[2]), strict=True):
        for panel, metric in zip(axes, ("train/entropy", "train/coverage", "eval/return_mean"), strict=False):
            rows = [row for row in table if row["run"] == name and row["metric"] == metric]
            if not rows:  # DDPG has only a return
                continue
            steps = sorted({int(row["env_steps"]) for row in rows})
            values = [[float(row["value"]) for row in rows if int(row["env_steps"]) == step] for step in steps]
            panel.plot(steps, [mean(each) for each in values], color=color, lw=2, label=label)
            low, high = [min(each) for each in values], [max(each) for each in values]
            panel.fill_between(steps, low, high, color=color, alpha=0.2, lw=0)
    axes[0].axhline(-1, color=INK, ls=":", lw=1.5, label="target")
    axes[0].set(ylabel="entropy of the policy, nats", title="Entropy", ylim=(-8, 1.2))
    axes[1].set(ylabel="share of cells visited", title="Coverage of states", ylim=(0, 1))
    axes[2].set(ylabel="return", title="Deterministic policy")
    axes[2].legend(fontsize=8.5, loc="lower right")
    for name, color in (("SAC", COLORS[0]), ("TD3", COLORS[4]), ("DDPG", COLORS[2])):
        steps, returns = align_curves(list(read_curves(HERE.parent / f"{name.lower()}_pendulum").values()))
        axes[3].plot(steps, returns.mean(0), color=color, lw=2, label=name)
    axes[3].set(ylabel="return", title="Stored results, 5 seeds")
    for panel in axes:
        panel.set_xlabel("env steps")
    axes[0].legend(fontsize=8.5)
    axes[3].legend(fontsize=8.5)
    save(figure, "sac")
