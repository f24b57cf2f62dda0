"""Small agents with critics to freeze: SAC and DDPG on Pendulum-v1, discrete SAC on CartPole-v1.

A complete run in runs/lecture is kept as it is.
"""

import math
from pathlib import Path
from typing import Any

import torch
from experiments.study import train_runs
from lightning import Callback, LightningModule, Trainer
from torch import Tensor

from levin.algorithms.base import Algorithm
from levin.runs.checkpoint import list_checkpoints
from levin.runs.load import load_algorithm

RUNS = Path(__file__).parent.parent.parent / "runs" / "lecture"
CELLS = 20  # of the grid over angle and over velocity, each
PENDULUM = ["env=pendulum", "trainer.threads=1", "trainer.accelerator=cpu", "logger=csv", "log_every=500"]
PENDULUM += ["algo.hidden_sizes=[64,64]", "algo.batch_size=128", "algo.actor_lr=1e-3", "algo.critic_lr=1e-3"]
PENDULUM += [
    "total_env_steps=5000",
    "eval.every=1000",
    "eval.episodes=20",
    "checkpoint.every=1000",
    "checkpoint.keep=9",
]
SAC = [*PENDULUM, "algo=sac", "+callbacks.coverage={_target_:experiments.lecture.critics.Coverage}"]
DISCRETE = ["algo=sac_discrete", "env=cartpole", "trainer.threads=1", "trainer.accelerator=cpu", "logger=csv"]
DISCRETE += ["algo.critic=state_action", "algo.hidden_sizes=[128,128]", "algo.batch_size=128", "algo.actor_lr=1e-3"]
DISCRETE += ["algo.critic_lr=1e-3", "algo.alpha_lr=1e-3", "total_env_steps=6000", "eval.every=2000"]
AGENTS = {
    "sac": [*SAC, "algo.alpha_lr=1e-3"],
    "sac_alpha_0": [*SAC, "algo.alpha_lr=0", "algo.initial_alpha=1e-6"],
    "sac_alpha_5": [*SAC, "algo.alpha_lr=0", "algo.initial_alpha=5"],
    "ddpg": [*PENDULUM, "algo=ddpg", "algo.learning_starts=500"],
    "sac_discrete": DISCRETE,
}


class Coverage(Callback):
    """Record the share of cells of Pendulum's angle and velocity that the run has visited, as train/coverage."""

    def __init__(self) -> None:
        self.visited = torch.zeros(CELLS, CELLS, dtype=torch.bool)

    def on_train_batch_end(
        self, trainer: Trainer, pl_module: LightningModule, outputs: Any, batch: Any, _: int
    ) -> None:
        cos, sin, velocity = batch["observation"].flatten(0, -2).unbind(-1)
        angle = torch.atan2(sin, cos) / (2 * math.pi) + 0.5
        cells = [(part * CELLS).long().clamp(0, CELLS - 1) for part in (angle, velocity / 16 + 0.5)]
        self.visited[tuple(cells)] = True
        pl_module.record(coverage=self.visited.float().mean())  # type: ignore[operator]


def train(names: tuple[str, ...], seeds: range = range(1)) -> dict[tuple[str, int], Path]:
    """Train these agents unless they are complete, and return their run folders by name and seed."""
    runs = {(name, seed): RUNS / f"{name}_s{seed}" for name in names for seed in seeds}
    train_runs({run: [*AGENTS[name], f"seed={seed}"] for (name, seed), run in runs.items()})
    return runs


def checkpoints(run: Path) -> list[Algorithm]:
    """Return the algorithm of each checkpoint of a run, oldest first."""
    return [load_algorithm(folder) for folder in list_checkpoints(run / "checkpoints")]


def gradient_statistics(gradients: list[Tensor], exact: Tensor) -> dict[str, float]:
    """Return errors of gradient estimates `[P]`, relative to the exact gradient `[P]`.

    Returns:
        Relative standard deviation, bias and root mean squared error of one estimate, and the standard error of the
        bias, which is also what an unbiased estimator shows as its bias.
    """
    estimates = torch.stack(gradients)
    scale, mean = exact.norm(), estimates.mean(0)
    variance = (estimates - mean).square().sum(1).sum() / (len(estimates) - 1)
    numbers = {
        "std": variance.sqrt(),
        "bias": (mean - exact).norm(),
        "rmse": (estimates - exact).square().sum(1).mean().sqrt(),
        "standard_error": (variance / len(estimates)).sqrt(),
    }
    return {name: float(number / scale) for name, number in numbers.items()}
