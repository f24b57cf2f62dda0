"""World Models in CarRacing-v3, with M trained and with M as it was initialised.

`make study NAME=racing` writes returns.csv, a picture and README.md beside this file. Runs that are there are not made
again, and one that was interrupted goes on.
"""

from pathlib import Path
from typing import Any

import matplotlib.pyplot as plt
from experiments.study import evaluations, in_processes, train_once, write_table

from levin.core.process import silence_libraries
from levin.evaluate import evaluate_run
from levin.lab.pictures import read_csv

HERE = Path(__file__).parent
RUNS = HERE.parent.parent / "runs" / "racing"
WORDS = ["algo=world_models", "env=racing", "env.vectorization=sync"]  # the same numbers as async, on one core
WORDS += ["trainer.threads=1", "trainer.accelerator=cpu", "logger=csv"]
KINDS = {"trained": [], "untrained": ["algo.memory_updates=0"]}
TRACKS, TESTED = 16, 100  # episodes of an evaluation, and of the last controller
FIRST = -55  # mean return of the first generation in the log beside the paper


def work(kind: str) -> None:
    """One run, from its beginning or from where it is."""
    train_once([*WORDS, *KINDS[kind]], RUNS / kind)


def measure() -> None:
    """Write returns.csv: every evaluation, and the last controller on other tracks."""
    in_processes(work, [(kind,) for kind in KINDS])
    lines: list[list[Any]] = []
    for kind in KINDS:
        rows = evaluations(RUNS / kind)
        lines += [[kind, row["env_steps"], row["eval/return_mean"], row["eval/return_std"], TRACKS] for row in rows]
        last = evaluate_run(run=str(RUNS / kind), episodes=TESTED)
        lines.append([kind, rows[-1]["env_steps"], last["return_mean"], last["return_std"], TESTED])
    write_table(HERE / "returns.csv", ["memory", "env_steps", "return_mean", "return_std", "episodes"], lines)


def report() -> None:
    """README.md and learning.png from the table alone."""
    table = read_csv(HERE / "returns.csv")
    figure, axes = plt.subplots(figsize=(7, 4), layout="constrained")
    lines = []
    for kind in KINDS:
        *rows, last = [row for row in table if row["memory"] == kind]
        steps, returns = ([float(row[name]) for row in rows] for name in ("env_steps", "return_mean"))
        axes.plot(steps, returns, marker="o", label=f"M {kind}")
        said = [f"{float(row['return_mean']):.0f} +- {float(row['return_std']):.0f}" for row in (rows[-1], last)]
        lines.append(f"| {kind} | {int(last['env_steps']):,} | {' | '.join(said)} |")
    axes.axhline(FIRST, color="gray", linestyle=":", label="the paper's first generation")
    axes.set(xlabel="env steps of four frames", ylabel="return", title=f"CarRacing-v3, {TRACKS} tracks, one seed")
    axes.legend(frameon=False)
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "learning.png", dpi=110)
    plt.close(figure)
    (HERE / "README.md").write_text(TEXT.format(lines="\n".join(lines)))


TEXT = """# World Models in CarRacing-v3

Made by `make study NAME=racing`: `returns.csv`, the picture and this page. V and M learn from 20,000 env steps of
random actions, of four frames each; C is evolved in the env, in generations of 32 episodes: an hour on one core. Means
and deviations over episodes. The first generation in the log beside the paper has -55; the paper's controller, after
1800 generations of 1024 episodes, 906.

| M | env steps | the run's last evaluation, 16 tracks | 100 other tracks |
|---|---|---|---|
{lines}

![Learning](learning.png)

An LSTM with random weights is a memory, too. So what C earns here says little about how well M foresees: an independent
implementation found the same, 860 +- 120 trained and 870 +- 120 untrained (`ctallec/world-models`).

What a night on many cores could do, with the paper's population, is pinned in
[world_models_racing](../world_models_racing): **not run**.
"""


if __name__ == "__main__":
    silence_libraries()
    measure()
    report()
