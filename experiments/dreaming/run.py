"""What a dream is worth, and what a memory: Pendulum-v1, and the same with the velocity hidden; and one of pixels.

`make study NAME=dreaming` writes learning.csv, pixels.csv, pictures and README.md beside this file. Runs that are
there are not made again.
"""

import shutil
from collections import defaultdict
from collections.abc import Callable
from pathlib import Path
from statistics import mean
from typing import Any

import matplotlib.pyplot as plt
import numpy as np
from experiments.study import evaluations, in_processes, train_once, write_table

from levin.core.process import silence_libraries
from levin.lab.pictures import read_csv
from levin.results.aggregates import iqm_with_interval

HERE = Path(__file__).parent
RUNS = HERE.parent.parent / "runs" / "dreaming"
SEEDS = range(2)
COMMON = ["env=pendulum", "trainer.threads=1", "trainer.accelerator=cpu", "logger=csv", "total_env_steps=20_000"]
COMMON += ["eval.every=1000", "eval.episodes=20", "checkpoint.every=20_000"]
HIDDEN = "env.observation_entries=[0,1]"
# Panel -> name -> words
ARMS = {
    "The dream": {
        "Dreamer, dynamics": ["algo=dreamer"],
        "Dreamer, reinforce": ["algo=dreamer", "algo.actor_gradient=reinforce"],
        "SAC": ["algo=sac"],
    },
    "The memory": {
        "GRU": ["algo=dreamer"],
        "MLP": ["algo=dreamer", "algo.transition=mlp"],
        "GRU, velocity hidden": ["algo=dreamer", HIDDEN],
        "MLP, velocity hidden": ["algo=dreamer", "algo.transition=mlp", HIDDEN],
    },
}
PIXELS = ["algo=dreamer_v3", "env=cartpole_balance", "env.pixels=64", "trainer.threads=1", "trainer.accelerator=cpu"]
PIXELS += ["logger=csv", "total_env_steps=5000", "eval.every=1000", "eval.episodes=1", "checkpoint.every=5000"]
AHEAD = (1, 5, 15, 45)
DISTINCT = {tuple(words): words for panel in ARMS.values() for words in panel.values()}


def run_of(words: tuple[str, ...], seed: int) -> Path:
    """Its folder."""
    name = "_".join(word.partition("=")[2].strip("[]").replace(",", "") for word in words)
    return RUNS / f"{name}_s{seed}"


def learn(words: tuple[str, ...], seed: int) -> None:
    """One run."""
    train_once([*COMMON, *words, f"seed={seed}"], run_of(words, seed))


def look() -> None:
    """One run of pixels."""
    train_once(PIXELS, RUNS / "pixels")


def work(function: Callable[..., None], *arguments: Any) -> None:
    """One run of either kind."""
    function(*arguments)


def measure_pixels() -> None:
    """Write pixels.csv, the errors of every evaluation, and pixels.png, what was foreseen in the last."""
    rows = [row for row in evaluations(RUNS / "pixels") if row.get("eval/open_loop_45")]
    names = [f"{what}_{ahead}" for what in ("open_loop", "repeat_last") for ahead in AHEAD]
    lines = ([row["env_steps"], row["updates"], *(row[f"eval/{name}"] for name in names)] for row in rows)
    write_table(HERE / "pixels.csv", ["env_steps", "updates", *names], lines)
    pictures = (RUNS / "pixels" / "pictures").glob("*.png")
    shutil.copy(max(pictures, key=lambda picture: int(picture.stem)), HERE / "pixels.png")


def measure() -> None:
    """Write learning.csv: every evaluation of every run."""
    jobs = [(words, seed) for seed in SEEDS for words in DISTINCT]
    in_processes(work, [(look,), *((learn, *job) for job in jobs)])
    rows = []
    for words, seed in jobs:
        for row in evaluations(run_of(words, seed)):
            error = [row.get(f"eval/{name}_15", "") for name in ("open_loop", "repeat_last")]
            rows.append([" ".join(words), seed, row["env_steps"], row["eval/return_mean"], *error])
    columns = ["run", "seed", "env_steps", "return_mean", "open_loop_15", "repeat_last_15"]
    write_table(HERE / "learning.csv", columns, rows)


def report() -> None:
    """README.md and learning.png from the table alone."""
    curves: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    shares: dict[str, list[float]] = defaultdict(list)
    for row in read_csv(HERE / "learning.csv"):
        steps = int(row["env_steps"]) // 1000 * 1000
        curves[row["run"]][steps].append(float(row["return_mean"]))
        if row["open_loop_15"]:
            shares[row["run"]].append(float(row["open_loop_15"]) / float(row["repeat_last_15"]))
    figure, panels = plt.subplots(1, 2, figsize=(12, 4.4), layout="constrained")
    lines = []
    for axes, (panel, arms) in zip(panels, ARMS.items(), strict=True):
        for name, words in arms.items():
            by_step = curves[" ".join(words)]
            steps = sorted(by_step)
            middle, (low, high) = iqm_with_interval(np.array([by_step[step] for step in steps]).T[:, None])
            (line,) = axes.plot(steps, middle, label=name)
            axes.fill_between(steps, low, high, color=line.get_color(), alpha=0.12, linewidth=0)
            last = by_step[steps[-1]]
            seeds = " ".join(f"{value:.0f}" for value in last)
            error = shares[" ".join(words)]
            foreseen = f"{mean(error[-3 * len(last) :]):.2f}" if error else ""
            half = mean(by_step[5000])
            lines.append(f"| {panel} | {name} | {half:.0f} | {mean(last):.0f} | {seeds} | {foreseen} |")
        axes.set(xlabel="env steps", ylabel="return", title=f"{panel}: Pendulum-v1, {len(SEEDS)} seeds, IQM")
        axes.legend(loc="lower right", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "learning.png", dpi=110)
    plt.close(figure)
    last = read_csv(HERE / "pixels.csv")[-1]
    errors = {ahead: [float(last[f"{what}_{ahead}"]) for what in ("open_loop", "repeat_last")] for ahead in AHEAD}
    seen = [f"| {ahead} | {foreseen:.1f} | {repeated:.1f} |" for ahead, (foreseen, repeated) in errors.items()]
    words = {
        "lines": "\n".join(lines),
        "seen": "\n".join(seen),
        "env_steps": last["env_steps"],
        "updates": last["updates"],
    }
    (HERE / "README.md").write_text(TEXT.format(**words))


TEXT = """# What a dream is worth, and what a memory

Made by `make study NAME=dreaming`: `learning.csv`, the picture and this page. 20,000 env steps of Pendulum-v1 each,
evaluations of 20 episodes. "Foreseen" is the squared error of the observation 15 steps ahead as a share of that of
repeating the last one.

| | | return at 5,000 | at 20,000 | its seeds | foreseen |
|---|---|---|---|---|---|
{lines}

![Learning](learning.png)

The dream: the gradient through the model beside the score function in the same dreams, and beside SAC, which has none.
The memory: without a recurrent state the model can't know how fast the pendulum turns when that is not shown.

## Pixels

DreamerV3 (`1m`) on 64 x 64 pictures of DM Control's cartpole balance, {env_steps} env steps, {updates} updates: squared
error of a picture (0 to 255), the mean over 16 windows of which five moments are seen, and that of repeating the last.

| steps ahead | foreseen | repeated |
|---|---|---|
{seen}

![What happened, what was foreseen, and how they differ](pixels.png)

After so few updates the cart is foreseen, and the pole, which is thin, is not there yet.
"""


if __name__ == "__main__":
    silence_libraries()
    measure()
    measure_pixels()
    report()
