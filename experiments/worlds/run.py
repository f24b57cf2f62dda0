"""What comes of dreams: controllers that were evolved in them, and PPO and SAC, that were trained in them.

At five temperatures, without a memory, and in two rounds. While anything is trained in a dream, no env takes a step.

`make study NAME=worlds` writes returns.csv, generations.csv, pictures and README.md beside this file. Runs that are
there are not made again.
"""

import shutil
from collections.abc import Callable
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast

import matplotlib.pyplot as plt
from experiments.study import evaluations, in_processes, is_complete, train_once, write_table
from lightning import Callback, LightningModule, Trainer
from omegaconf import OmegaConf

from levin import resume
from levin.algorithms.world_models import WorldModels
from levin.config.compose import compose
from levin.core.process import silence_libraries
from levin.evaluate import evaluate_run
from levin.lab.pictures import read_csv
from levin.runs.load import load_algorithm
from levin.training.session import train

HERE = Path(__file__).parent
RUNS = HERE.parent.parent / "runs" / "worlds"
SEEDS = range(3)
TEMPERATURES = (0.1, 0.5, 1.0, 1.15, 1.3)
COMMON = ["trainer.threads=1", "trainer.accelerator=cpu", "logger=csv"]
DODGE = [*COMMON, "algo=world_models", "env=dodge"]
STOP = "+callbacks.stop={_target_:experiments.worlds.run.StopBeforeController}"
OTHERS = {
    "blind": [*DODGE, "algo.controller_input=latent"],
    "rounds": [*DODGE, "algo.rounds=2", "total_env_steps=300_000"],
}
PPO = [*COMMON, "algo=ppo", "env=dream", "total_env_steps=300_000", "eval.every=25_000", "eval.episodes=50"]
PPO += ["algo.steps_per_iteration=128", "algo.batch_size=256", "algo.epochs=4", "log_every=25_000"]
SAC = [*COMMON, "algo=sac", "env=dream", "env.run=experiments/dreamer_pendulum", "env.num_envs=4"]
SAC += ["total_env_steps=10_000", "eval.every=1000", "eval.episodes=20", "algo.learning_starts=1000"]
SAC += ["algo.hidden_sizes=[128,128]", "algo.batch_size=128"]
RANDOM = {"Dodge": 27.7, "Pendulum-v1": -1246.0}  # mean returns of uniform actions
EPISODES = 100


class StopBeforeController(Callback):
    """Ends a run when V and M are trained: others go on from there."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if cast(WorldModels, pl_module).stage == "controller":
            trainer.should_stop = True


def base(seed: int) -> Path:
    """A run whose V and M are trained, and nothing else."""
    run = RUNS / f"base_s{seed}"
    if not (run / "checkpoints" / "last").exists():
        train(compose([*DODGE, f"seed={seed}", STOP]), run)
    return run


def branch(seed: int, temperature: float) -> None:
    """C of the base's V and M, in dreams of this temperature."""
    run = RUNS / f"tau{temperature}_s{seed}"
    if is_complete(run):
        return
    shutil.rmtree(run, ignore_errors=True)
    shutil.copytree(RUNS / f"base_s{seed}", run, symlinks=True)
    cfg = OmegaConf.load(run / "config.yaml")
    cfg.callbacks, cfg.algo.temperature = {}, temperature
    OmegaConf.save(cfg, run / "config.yaml")
    resume.resume(run=str(run))


def whole(name: str, seed: int, words: list[str]) -> None:
    """A run from its beginning."""
    train_once([*words, f"seed={seed}"], RUNS / f"{name}_s{seed}")


def evaluated(name: str, seed: int) -> float:
    """Mean return in the env of 100 episodes."""
    return evaluate_run(run=str(RUNS / f"{name}_s{seed}"), episodes=EPISODES)["return_mean"]


def dreamt(name: str, seed: int, rows: list[dict[str, str]]) -> float:
    """Mean return in 100 dreams of C; of others, that of the training episodes at the end."""
    if name in ("ppo", "sac"):
        return float(next(row["episode/return"] for row in reversed(rows) if row["episode/return"]))
    algorithm = cast(WorldModels, load_algorithm(RUNS / f"{name}_s{seed}"))
    returns, _ = algorithm.evaluate_in_dreams(algorithm.controllers.best.unsqueeze(0), list(range(EPISODES)))
    return float(returns.mean())


def jobs(stage: int) -> list[tuple[Any, ...]]:
    """What can be done at once, first the bases, then what goes on from them."""
    if stage == 0:
        return [(base, seed) for seed in SEEDS]
    many: list[tuple[Any, ...]] = [(branch, seed, temperature) for seed in SEEDS for temperature in TEMPERATURES]
    many += [(whole, "ppo", seed, [*PPO, f"env.run={RUNS / f'base_s{seed}'}"]) for seed in SEEDS]
    many += [(whole, "sac", seed, SAC) for seed in SEEDS]
    return many + [(whole, name, seed, words) for name, words in OTHERS.items() for seed in SEEDS]


def work(function: Callable[..., Any], *arguments: Any) -> None:
    """One run."""
    function(*arguments)


def measure() -> None:
    """Write returns.csv, a row for each run, and generations.csv, of the runs at the paper's temperature."""
    for stage in (0, 1):
        in_processes(work, jobs(stage))
    names = [*(f"tau{temperature}" for temperature in TEMPERATURES), *OTHERS, "ppo", "sac"]
    lines = []
    for name, seed in product(names, SEEDS):
        rows = read_csv(RUNS / f"{name}_s{seed}" / "metrics.csv")
        steps = rows[-1]["env_steps"]
        counts = (0, steps) if name in ("ppo", "sac") else (steps, rows[-1]["dream_steps"])
        lines.append([name, seed, dreamt(name, seed, rows), evaluated(name, seed), *counts])
    columns = ["run", "seed", "dream_return", "return", "env_steps", "dream_steps"]
    write_table(HERE / "returns.csv", columns, lines)
    lines = []
    for temperature, seed in product(TEMPERATURES, SEEDS):
        for row in evaluations(RUNS / f"tau{temperature}_s{seed}"):
            if row.get("train/generations") and row["eval/dream_return"]:
                found = [row["train/generations"], row["eval/dream_return"], row["eval/return_mean"]]
                lines.append([temperature, seed, *found])
    write_table(HERE / "generations.csv", ["temperature", "seed", "generation", "dream_return", "return"], lines)


def spread(values: list[float]) -> str:
    """Mean and deviation."""
    return f"{mean(values):.0f} +- {stdev(values):.0f}"


def report() -> None:
    """README.md and worlds.png from the tables alone."""
    table = read_csv(HERE / "returns.csv")
    real = {name: [float(row["return"]) for row in table if row["run"] == name] for name in {r["run"] for r in table}}
    dream = {name: [float(row["dream_return"]) for row in table if row["run"] == name] for name in real}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for values, label, color in ((dream, "in the dream", "#2b6cb0"), (real, "in the env", "#c05621")):
        found = [values[f"tau{temperature}"] for temperature in TEMPERATURES]
        left.errorbar(
            TEMPERATURES, [mean(each) for each in found], [stdev(each) for each in found], color=color, label=label,
            marker="o", capsize=4,
        )  # fmt: skip
    left.axhline(RANDOM["Dodge"], color="gray", linestyle=":", label="uniform actions")
    left.set(xlabel="temperature", ylabel="return", title=f"Dodge, {len(SEEDS)} seeds, mean and deviation")
    left.legend(frameon=False)
    rows = read_csv(HERE / "generations.csv")
    for temperature, style in ((0.1, "--"), (1.15, "-")):
        for key, color in (("dream_return", "#2b6cb0"), ("return", "#c05621")):
            by_generation: dict[int, list[float]] = {}
            for row in rows:
                if float(row["temperature"]) == temperature:
                    by_generation.setdefault(round(float(row["generation"]) / 5) * 5, []).append(float(row[key]))
            steps = sorted(by_generation)
            where = "dream" if key == "dream_return" else "env"
            line = [mean(by_generation[step]) for step in steps]
            right.plot(steps, line, style, color=color, label=f"{where}, temperature {temperature}")
    right.set(xlabel="generation", ylabel="return", title="Dodge, evolved in the dream")
    right.legend(frameon=False)
    for axes in (left, right):
        axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(HERE / "worlds.png", dpi=110)
    plt.close(figure)
    temperatures = []
    for name in (f"tau{temperature}" for temperature in TEMPERATURES):
        apart = mean(dream[name]) - mean(real[name])
        temperatures.append(f"| {name[3:]} | {spread(dream[name])} | {spread(real[name])} | {apart:.0f} |")
    others = [
        f"| {said} | {spread(dream[name])} | {spread(real[name])} | {' '.join(f'{each:.0f}' for each in real[name])} |"
        for name, said in (
            ("tau1.15", "V, M and C, temperature 1.15"),
            ("blind", "C reads z alone"),
            ("rounds", "two rounds, each of 150,000 env steps"),
            ("ppo", "PPO in the dreams of the same V and M, temperature 1"),
            ("sac", "SAC in the dreams of a Dreamer of Pendulum-v1"),
        )
    ]
    words = {"temperatures": "\n".join(temperatures), "others": "\n".join(others), **RANDOM}
    (HERE / "README.md").write_text(TEXT.format(words=words))


TEXT = """# What comes of dreams

Made by `make study NAME=worlds`: `returns.csv`, `generations.csv`, the picture and this page. 150,000 env steps of the
dodge game with random actions train V and M; C is evolved in dreams alone, where no env takes a step. Returns are the
means of 100 episodes, with the deviation over three seeds; uniform actions have {words[Dodge]}, and an episode is over
at 200.

| temperature | in the dream | in the env | apart |
|---|---|---|---|
{words[temperatures]}

![Returns](worlds.png)

At low temperatures balls vanish from the dream, and C learns what helps in the dream alone.

| | in the dream | in the env | seeds |
|---|---|---|---|
{words[others]}

Uniform actions have {words[Pendulum-v1]:.0f} in Pendulum-v1. PPO and SAC have seen no env at all; where they are
evaluated, the model shows them what it makes of each observation. Their returns in the dream are those of their last
training episodes.
"""


if __name__ == "__main__":
    silence_libraries()
    measure()
    report()
