"""Study of World Models in CarRacing-v3, with a trained M and with a randomly initialised M.

`make study NAME=racing` writes returns.csv, a picture and README.md beside this file. Complete runs are kept, and
interrupted ones continue.
"""
# needs the extra: box2d

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from experiments.study import read_evaluations, read_words, train_runs, write_table

from levin.core.process import silence_libraries
from levin.evaluate import evaluate_run
from levin.lab.pictures import read_csv

HERE = Path(__file__).parent
RUNS = HERE.parent.parent / "runs" / "racing"
WORDS = ["algo=world_models", "env=racing", "env.vectorization=sync"]  # on one core; the numbers are those of async
WORDS += ["trainer.threads=1", "trainer.accelerator=cpu", "logger=csv"]
KINDS = {"trained": [], "untrained": ["algo.memory_updates=0"]}
TRACKS, TESTED = 16, 100  # episodes of an evaluation during the run, and of the final one
FIRST = -55  # mean return of the first generation, in the log published with the paper


def measure() -> None:
    """Train both runs, and write returns.csv: every evaluation, and the final one of 100 other tracks."""
    train_runs({RUNS / kind: [*WORDS, *words] for kind, words in KINDS.items()})
    lines: list[list[Any]] = []
    for kind in KINDS:
        rows = read_evaluations(RUNS / kind)
        lines += [[kind, row["env_steps"], row["eval/return_mean"], row["eval/return_std"], TRACKS] for row in rows]
        last = evaluate_run(run=str(RUNS / kind), episodes=TESTED)
        lines.append([kind, rows[-1]["env_steps"], last["return_mean"], last["return_std"], TESTED])
    write_table(HERE / "returns.csv", ["memory", "env_steps", "return_mean", "return_std", "episodes"], lines)


def report() -> None:
    """Write README.md and learning.png from returns.csv."""
    table = read_csv(HERE / "returns.csv")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    lines = []
    for kind in KINDS:
        *rows, last = [row for row in table if row["memory"] == kind]
        steps, returns = ([float(row[name]) for row in rows] for name in ("env_steps", "return_mean"))
        axes.plot(steps, returns, marker="o", label=f"M {kind}")
        scores = [f"{float(row['return_mean']):.0f} +- {float(row['return_std']):.0f}" for row in (rows[-1], last)]
        lines.append(f"| {kind} | {int(last['env_steps']):,} | {' | '.join(scores)} |")
    axes.axhline(FIRST, color="gray", linestyle=":", label="the paper's first generation")
    axes.set(xlabel="env steps of four frames", ylabel="return", title=f"CarRacing-v3, {TRACKS} tracks, one seed")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "learning.png", dpi=110)
    plt.close(figure)
    (HERE / "README.md").write_text(TEXT.format(lines="\n".join(lines)))


TEXT = """# World Models in CarRacing-v3

`make study NAME=racing` writes everything in this folder. The autoencoder V and the recurrent model M learn from 20,000
env steps of random actions, each of four frames. The controller C is then evolved in the env, with 32 episodes per
generation. A run takes an hour on one core. The table has means and standard deviations over episodes.

| M | env steps | last evaluation of the run, 16 tracks | 100 other tracks |
|---|---|---|---|
{lines}

![Learning curves](learning.png)

For comparison: in the log published with the paper the first generation has a mean return of -55, and the paper's
controller has 906 after 1800 generations of 1024 episodes.

With an untrained M the returns are similar (one seed each): an LSTM with random weights is a memory, too. So the
returns here say little about how well M predicts. An independent implementation found the same: 860 +- 120 with a
trained M and 870 +- 120 with an untrained one (`ctallec/world-models`).

[world_models_racing](../world_models_racing) has the config of a run with the paper's population, meant for a night on
many cores: **not run**.
"""


if __name__ == "__main__":
    read_words()
    silence_libraries()
    measure()
    report()
