"""Staleness of A3C's gradients: of real lock-free workers, and its effect on learning when it is set exactly."""

import csv
from types import SimpleNamespace
from typing import Any

import numpy as np
from experiments.lecture.agents import HERE, SEEDS, build, read, write
from experiments.lecture.drawing import COLORS, INK, panels, save
from experiments.study import train_runs

from levin.algorithms.a3c import A3C
from levin.results.curves import align_curves, read_curves

WORDS = ["env=cartpole", "env.num_envs=1", "algo=a3c", "algo.lr_schedule=constant"]
WORKERS = (1, 8, 32)
STEPS, EVERY = 16_000, 2000
REAL_WORKERS, REAL_STEPS = (2, 4), 4_000
RUNS = HERE.parent.parent / "runs" / "lecture"


class InTurn(A3C):
    """A3C whose workers take turns in one process, so that the staleness of each push is their number less 1."""

    trainer = SimpleNamespace(global_rank=0)  # type: ignore[assignment]


def measure() -> None:
    """Train with workers that take turns, and with real ones."""
    rows: list[dict[str, Any]] = []
    for workers in WORKERS:
        for seed in SEEDS:
            rows += [
                {"part": "in turn", "workers": workers, "seed": seed} | row for row in train_in_turn(workers, seed)
            ]
    for workers in REAL_WORKERS:
        for seed in SEEDS:
            rows.append({"part": "lock-free", "workers": workers, "seed": seed} | train_lock_free(workers, seed))
    write("staleness", rows)


def train_in_turn(workers: int, seed: int) -> list[dict[str, float]]:
    """Train one global network by workers that take turns; return the mean return of each `EVERY` env steps."""
    pairs = [build([*WORDS, f"seed={seed + 1000 * worker}"]) for worker in range(workers)]
    first = pairs[0][0]
    for algorithm, _ in pairs:
        algorithm.__class__ = InTurn
        for name in ("theta", "mean_square", "pushes", "staleness"):
            setattr(algorithm, name, getattr(first, name))
        algorithm.pull()
    rows, env_steps = [], 0
    for end in range(EVERY, STEPS + 1, EVERY):
        for _, loader in pairs:
            loader.returns.clear()
        while env_steps < end:
            for algorithm, loader in pairs:
                rollout = next(loader)
                algorithm.training_step(rollout, 0)  # push, then pull for the next turn
                env_steps += rollout.numel()
        returns = [each for _, loader in pairs for each in loader.returns]
        rows.append({"env_steps": end, "return_mean": float(np.mean(returns))})
    return rows


def train_lock_free(workers: int, seed: int) -> dict[str, float]:
    """Train with real workers in processes of their own; return the mean staleness and the fraction of stale pushes."""
    run = RUNS / f"a3c_w{workers}_s{seed}"
    words = [f"trainer.workers={workers}", "trainer.strategy=hogwild", "trainer.threads=1", f"seed={seed}"]
    settings = [f"{key}={REAL_STEPS}" for key in ("total_env_steps", "eval.every", "log_every")]
    train_runs({run: [*WORDS, *words, *settings, "eval.episodes=1", "logger=csv"]})  # alone: other runs add staleness
    with (run / "metrics.csv").open() as file:
        last = list(csv.DictReader(file))[-1]
    return {name: float(last[f"train/{name}"]) for name in ("staleness", "stale_pushes")}


def draw() -> None:
    """Draw learning curves by exact staleness and of stored results, and the staleness of real workers."""
    table = read("staleness")
    figure, (left, middle, right) = panels(3, width=12, height=3.8)
    for workers, color in zip(WORKERS, (COLORS[0], COLORS[1], COLORS[3]), strict=True):
        rows = table[(table.part == "in turn") & (table.workers == workers)]
        by_step = rows.groupby("env_steps").return_mean
        x = by_step.median().index / 1000
        left.plot(x, by_step.median(), color=color, label=f"{workers - 1} updates behind")
        left.fill_between(x, by_step.min(), by_step.max(), color=color, alpha=0.2, linewidth=0)
    left.set(xlabel="thousands of env steps of all workers", ylabel="return in training", title="Staleness set exactly")
    left.legend(loc="upper left")
    for name, color, label in (
        ("a2c_cartpole", COLORS[2], "A2C, 8 envs"),
        ("a3c_cartpole", COLORS[4], "A3C, 2 workers"),
    ):
        steps, returns = align_curves(list(read_curves(HERE.parent / name).values()))
        middle.plot(steps / 1000, np.median(returns, 0), color=color, label=label)
        middle.fill_between(steps / 1000, returns.min(0), returns.max(0), color=color, alpha=0.2, linewidth=0)
    middle.set(xlim=(0, 200), xlabel="thousands of env steps", ylabel="return", title="Stored results, 5 seeds")
    middle.legend(loc="lower right")
    by_workers = table[table.part == "lock-free"].groupby("workers")
    labels = [str(workers) for workers in REAL_WORKERS]
    right.bar(labels, by_workers.staleness.mean(), color=COLORS[4], width=0.5)
    right.plot(labels, [workers - 1 for workers in REAL_WORKERS], "_", color=INK, markersize=60, label="workers - 1")
    for index, fraction in enumerate(by_workers.stale_pushes.mean()):
        right.text(index, 0.1, f"{fraction:.0%} of\npushes stale", ha="center", color="white", fontsize=9)
    right.set(xlabel="lock-free workers", ylabel="updates behind, mean", title="Staleness on two cores", ylim=(0, 3.6))
    right.legend(loc="upper left", handletextpad=1.5, markerscale=0.3)
    save(figure, "staleness")
