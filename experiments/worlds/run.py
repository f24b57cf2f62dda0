"""Study of training inside a world model: do policies that are trained in the dream also act well in the env?

World Models evolves controllers in the dream of the dodge game: at five temperatures, without M's memory, and in two
rounds. PPO learns in the same dreams, and SAC in those of a Dreamer of Pendulum-v1. No env takes a step while a policy
is trained in a dream.

`make study NAME=worlds` writes returns.csv, generations.csv, a picture and README.md beside this file. Complete runs
are kept.
"""

import shutil
from itertools import product
from pathlib import Path
from statistics import mean, stdev
from typing import Any, cast

import matplotlib.pyplot as plt
from experiments.study import continue_runs, read_evaluations, read_words, set_aside, train_runs, write_table
from lightning import Callback, LightningModule, Trainer
from omegaconf import DictConfig, OmegaConf

from levin.algorithms.world_models import WorldModels
from levin.core import files
from levin.core.process import silence_libraries
from levin.evaluate import evaluate_run
from levin.lab.pictures import read_csv
from levin.runs.folder import read_provenance
from levin.runs.load import load_algorithm, load_config

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
RANDOM = {"Dodge": 27.7, "Pendulum-v1": -1246.0}  # mean returns of uniformly random actions
EPISODES = 100  # of the final evaluations, in the env and in the dream


class StopBeforeController(Callback):
    """Stop a run when V and M are trained, so that several runs can continue from it."""

    def on_train_batch_end(self, trainer: Trainer, pl_module: LightningModule, *_: Any) -> None:
        if cast(WorldModels, pl_module).stage == "controller":
            trainer.should_stop = True


def train_base() -> None:
    """Train V and M of every seed, but no controller. Runs that used an earlier V and M are set aside."""
    train_runs({RUNS / f"base_s{seed}": [*DODGE, f"seed={seed}", STOP] for seed in SEEDS})
    for seed, name in product(SEEDS, [*(f"tau{temperature}" for temperature in TEMPERATURES), "ppo"]):
        run, base = RUNS / f"{name}_s{seed}", read_provenance(RUNS / f"base_s{seed}")
        # A copy has the date of the base run that it was copied from.
        if base and read_provenance(run).get("date", base["date"]) < base["date"]:
            set_aside(run)


def prepare_controller(seed: int, temperature: float) -> tuple[Path, DictConfig]:
    """Copy the base run of this seed, to evolve a controller in its dreams at this temperature.

    Returns:
        The run folder and its config.
    """
    run = RUNS / f"tau{temperature}_s{seed}"
    if not run.exists():
        copy = run.with_suffix(".partial")
        shutil.rmtree(copy, ignore_errors=True)
        shutil.copytree(RUNS / f"base_s{seed}", copy, symlinks=True)
        cfg = OmegaConf.load(copy / "config.yaml")
        cfg.callbacks, cfg.algo.temperature = {}, temperature
        OmegaConf.save(cfg, copy / "config.yaml")
        files.save_json({**read_provenance(copy), "ended_at": None}, copy, "provenance.json")  # the copy is to go on
        copy.rename(run)
    return run, load_config(run)


def return_in_env(name: str, seed: int) -> float:
    """Return the mean return of 100 episodes in the env."""
    return evaluate_run(run=str(RUNS / f"{name}_s{seed}"), episodes=EPISODES)["return_mean"]


def return_in_dream(name: str, seed: int, rows: list[dict[str, str]]) -> float:
    """Return the mean return of 100 dreams; for PPO and SAC, that of the last training episodes.

    Args:
        name: Name of the run.
        seed: Seed of the run.
        rows: Rows of its metrics.csv.
    """
    if name in ("ppo", "sac"):
        return float(next(row["episode/return"] for row in reversed(rows) if row["episode/return"]))
    algorithm = cast(WorldModels, load_algorithm(RUNS / f"{name}_s{seed}"))
    returns, _ = algorithm.evaluate_in_dreams(algorithm.controllers.best.unsqueeze(0), list(range(EPISODES)))
    return float(returns.mean())


def measure() -> None:
    """Train all runs; write returns.csv, one row per run, and generations.csv, one row per evaluated generation."""
    train_base()
    continue_runs(dict(prepare_controller(seed, temperature) for seed in SEEDS for temperature in TEMPERATURES))
    words = {("ppo", seed): [*PPO, f"env.run={RUNS / f'base_s{seed}'}"] for seed in SEEDS}
    words |= {("sac", seed): SAC for seed in SEEDS}
    words |= {(name, seed): each for name, each in OTHERS.items() for seed in SEEDS}
    train_runs({RUNS / f"{name}_s{seed}": [*each, f"seed={seed}"] for (name, seed), each in words.items()})
    names = [*(f"tau{temperature}" for temperature in TEMPERATURES), *OTHERS, "ppo", "sac"]
    lines = []
    for name, seed in product(names, SEEDS):
        rows = read_csv(RUNS / f"{name}_s{seed}" / "metrics.csv")
        steps = rows[-1]["env_steps"]
        counts = (0, steps) if name in ("ppo", "sac") else (steps, rows[-1]["dream_steps"])
        lines.append([name, seed, return_in_dream(name, seed, rows), return_in_env(name, seed), *counts])
    columns = ["run", "seed", "dream_return", "return", "env_steps", "dream_steps"]
    write_table(HERE / "returns.csv", columns, lines)
    lines = []
    for temperature, seed in product(TEMPERATURES, SEEDS):
        for row in read_evaluations(RUNS / f"tau{temperature}_s{seed}"):
            if row.get("train/generations") and row["eval/dream_return"]:
                values = [row["train/generations"], row["eval/dream_return"], row["eval/return_mean"]]
                lines.append([temperature, seed, *values])
    write_table(HERE / "generations.csv", ["temperature", "seed", "generation", "dream_return", "return"], lines)


def mean_and_std(values: list[float]) -> str:
    """Format the mean and the standard deviation."""
    return f"{mean(values):.0f} +- {stdev(values):.0f}"


def report() -> None:
    """Write README.md and worlds.png from returns.csv and generations.csv."""
    table = read_csv(HERE / "returns.csv")
    real = {name: [float(row["return"]) for row in table if row["run"] == name] for name in {r["run"] for r in table}}
    dream = {name: [float(row["dream_return"]) for row in table if row["run"] == name] for name in real}
    figure, (left, right) = plt.subplots(1, 2, figsize=(11, 4), layout="constrained")
    for values, label, color in ((dream, "in the dream", "#2b6cb0"), (real, "in the env", "#c05621")):
        returns = [values[f"tau{temperature}"] for temperature in TEMPERATURES]
        left.errorbar(
            TEMPERATURES, [mean(each) for each in returns], [stdev(each) for each in returns], color=color, label=label,
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
        gap = mean(dream[name]) - mean(real[name])
        temperatures.append(f"| {name[3:]} | {mean_and_std(dream[name])} | {mean_and_std(real[name])} | {gap:.0f} |")
    others = []
    for name, description in (
        ("tau1.15", "World Models, temperature 1.15"),
        ("blind", "World Models, C reads z alone"),
        ("rounds", "World Models, two rounds of 150,000 env steps each"),
        ("ppo", "PPO in the dreams of the same V and M, temperature 1"),
        ("sac", "SAC in the dreams of a Dreamer, Pendulum-v1"),
    ):
        seeds = " ".join(f"{value:.0f}" for value in real[name])
        others.append(f"| {description} | {mean_and_std(dream[name])} | {mean_and_std(real[name])} | {seeds} |")
    values = {"temperatures": "\n".join(temperatures), "others": "\n".join(others), **RANDOM}
    (HERE / "README.md").write_text(TEXT.format(values=values))


TEXT = """# Do policies trained in a dream act well in the env?

`make study NAME=worlds` writes everything in this folder. World Models trains the autoencoder V and the recurrent
model M on 150,000 env steps of the dodge game with random actions. The controller C is then evolved in the dream alone,
where no env takes a step. Returns are means of 100 episodes, with the standard deviation over three seeds. Uniformly
random actions earn {values[Dodge]}. An episode ends after 200 steps, so 200 is the largest return.

| temperature | return in the dream | return in the env | difference |
|---|---|---|---|
{values[temperatures]}

![Returns by temperature and by generation](worlds.png)

At low temperatures the balls vanish from the dream, and C learns what helps in the dream alone.

| trained with | return in the dream | return in the env | each seed, in the env |
|---|---|---|---|
{values[others]}

Uniformly random actions earn {values[Pendulum-v1]:.0f} in Pendulum-v1. PPO and SAC never act in an env while they
learn. For an evaluation, the world model encodes each observation of the env into the latent state that they read.
Their returns in the dream are those of their last training episodes: of SAC only four a seed,
whose mean has a standard error of about 40.
"""


if __name__ == "__main__":
    read_words()
    silence_libraries()
    measure()
    report()
