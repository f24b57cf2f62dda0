"""Study of world models: how much imagination and a recurrent state help on Pendulum-v1, and prediction of pixels.

`make study NAME=dreaming` writes learning.csv, pixels.csv, pictures and README.md beside this file. Complete runs are
kept. Pendulum-v1 is also played with the velocity hidden; pixels are predicted by DreamerV3.
"""
# needs the extra: dmc

import shutil
from collections import defaultdict
from pathlib import Path
from statistics import mean

import matplotlib.pyplot as plt
import numpy as np
from experiments.study import read_evaluations, read_words, train_runs, write_table

from levin.core.process import silence_libraries
from levin.lab.pictures import read_csv
from levin.results.aggregates import iqm_with_interval

HERE = Path(__file__).parent
RUNS = HERE.parent.parent / "runs" / "dreaming"
SEEDS = range(2)
COMMON = ["env=pendulum", "trainer.threads=1", "trainer.accelerator=cpu", "logger=csv", "total_env_steps=20_000"]
COMMON += ["eval.every=1000", "eval.episodes=20", "checkpoint.every=20_000"]
HIDDEN = "env.observation_entries=[0,1]"
# Panel -> name -> overrides
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
AHEAD = (1, 5, 15, 45)  # steps of the open-loop predictions of pixels
DISTINCT = {tuple(words): words for panel in ARMS.values() for words in panel.values()}  # some arms are in both panels


def run_path(words: tuple[str, ...], seed: int) -> Path:
    """Return the run folder of these overrides and this seed."""
    name = "_".join(word.partition("=")[2].strip("[]").replace(",", "") for word in words)
    return RUNS / f"{name}_s{seed}"


def measure_pixels() -> None:
    """Write pixels.csv, the prediction errors of every evaluation, and pixels.png, the predictions of the last one."""
    rows = [row for row in read_evaluations(RUNS / "pixels") if row.get("eval/open_loop_45")]
    names = [f"{kind}_{ahead}" for kind in ("open_loop", "repeat_last") for ahead in AHEAD]
    lines = ([row["env_steps"], row["updates"], *(row[f"eval/{name}"] for name in names)] for row in rows)
    write_table(HERE / "pixels.csv", ["env_steps", "updates", *names], lines)
    pictures = (RUNS / "pixels" / "pictures").glob("*.png")
    shutil.copy(max(pictures, key=lambda picture: int(picture.stem)), HERE / "pixels.png")


def measure() -> None:
    """Train all runs, and write learning.csv with every evaluation of every run on Pendulum-v1."""
    jobs = [(words, seed) for seed in SEEDS for words in DISTINCT]
    runs = {run_path(words, seed): [*COMMON, *words, f"seed={seed}"] for words, seed in jobs}
    train_runs({RUNS / "pixels": PIXELS, **runs})
    rows = []
    for words, seed in jobs:
        for row in read_evaluations(run_path(words, seed)):
            error = [row.get(f"eval/{name}_15", "") for name in ("open_loop", "repeat_last")]
            rows.append([" ".join(words), seed, row["env_steps"], row["eval/return_mean"], *error])
    columns = ["run", "seed", "env_steps", "return_mean", "open_loop_15", "repeat_last_15"]
    write_table(HERE / "learning.csv", columns, rows)


def report() -> None:
    """Write README.md and learning.png from learning.csv and pixels.csv."""
    curves: dict[str, dict[int, list[float]]] = defaultdict(lambda: defaultdict(list))
    # Relative error of predictions 15 steps ahead, in every evaluation of a seed.
    relative_errors: dict[str, dict[str, list[float]]] = defaultdict(lambda: defaultdict(list))
    for row in read_csv(HERE / "learning.csv"):
        steps = int(row["env_steps"]) // 1000 * 1000
        curves[row["run"]][steps].append(float(row["return_mean"]))
        if row["open_loop_15"]:
            relative = float(row["open_loop_15"]) / float(row["repeat_last_15"])
            relative_errors[row["run"]][row["seed"]].append(relative)
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
            errors = [error for seed in relative_errors[" ".join(words)].values() for error in seed[-3:]]
            relative = f"{mean(errors):.2f}" if errors else ""
            early = mean(by_step[5000])
            lines.append(f"| {panel} | {name} | {early:.0f} | {mean(last):.0f} | {seeds} | {relative} |")
        axes.set(xlabel="env steps", ylabel="return", title=f"{panel}: Pendulum-v1, {len(SEEDS)} seeds, IQM")
        axes.legend(loc="lower right", fontsize=8)
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "learning.png", dpi=110)
    plt.close(figure)
    last = read_csv(HERE / "pixels.csv")[-1]
    errors = {ahead: [float(last[f"{kind}_{ahead}"]) for kind in ("open_loop", "repeat_last")] for ahead in AHEAD}
    pixels = [f"| {ahead} | {predicted:.1f} | {repeated:.1f} |" for ahead, (predicted, repeated) in errors.items()]
    values = {
        "lines": "\n".join(lines),
        "pixels": "\n".join(pixels),
        "env_steps": last["env_steps"],
        "updates": last["updates"],
    }
    (HERE / "README.md").write_text(TEXT.format(**values))


TEXT = """# How much do imagination and memory help?

`make study NAME=dreaming` writes everything in this folder. Every run has 20,000 env steps of Pendulum-v1. Returns are
means of 20 evaluation episodes, after 5,000 and after 20,000 env steps. The last column is an error of open-loop
predictions: the squared error of the observation predicted 15 steps ahead, divided by the squared error of repeating
the last observation, averaged over the last three evaluations of each seed. Below 1 the model predicts better than
repeating does.

| | | return at 5,000 | return at 20,000 | each seed at 20,000 | prediction error |
|---|---|---|---|---|---|
{lines}

![Learning curves](learning.png)

"The dream" compares two actor gradients in imagination, backpropagation through the world model (dynamics) and the
score function (reinforce), with SAC, which has no world model. "The memory" compares a recurrent transition model (GRU)
with one that has no recurrent state (MLP). When the velocity is hidden, the MLP can't know how fast the pendulum turns.

## Pixels

DreamerV3 (`1m`) on 64 x 64 images of DM Control's cartpole balance, {env_steps} env steps and {updates} updates. The
model observes five steps of a window and then predicts from the actions alone. The table has the mean squared error of
pixels (0 to 255) over 16 windows, for the prediction and for repeating the last observed image.

| steps ahead | predicted | repeated |
|---|---|---|
{pixels}

![From top to bottom: what happened, the open-loop prediction, and their difference](pixels.png)

After so few updates the model predicts the cart, but not yet the pole, which is thin.
"""


if __name__ == "__main__":
    read_words()
    silence_libraries()
    measure()
    measure_pixels()
    report()
