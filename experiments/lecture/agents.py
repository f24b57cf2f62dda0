<<<<<<< HEAD
"""Small agents whose critics the parts about gradients freeze: SAC, DDPG and discrete SAC.

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
SAC = [*PENDULUM, "algo=sac", "+callbacks.coverage={_target_:experiments.lecture.agents.Coverage}"]
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
=======
"""Algorithms without a Trainer, for measurements between two updates, and true returns of CartPole's states."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from torch import Tensor

from levin.collectors.loader import CollectorLoader
from levin.config.compose import compose
from levin.envs.batched import CartPole
from levin.training.session import build_run

HERE = Path(__file__).parent
SEEDS = range(3)


def build(words: list[str]) -> tuple[Any, CollectorLoader]:
    """Build the algorithm of a config with its optimisers, and its rollout loader."""
    algorithm, loader = build_run(compose([*words, "trainer.threads=1", "trainer.accelerator=cpu"]))
    algorithm.configure_optimizers()
    algorithm.manual_backward = Tensor.backward  # type: ignore[method-assign]
    return algorithm, loader


def iterate(algorithm: Any, loader: CollectorLoader) -> None:
    """Run one iteration: collect a rollout and train on it."""
    rollout = next(loader)
    algorithm.on_train_batch_start(rollout, 0)
    algorithm.training_step(rollout, 0)


@torch.no_grad()
def true_returns(
    observation: Tensor, act: Callable[[Tensor], Tensor], gamma: float, first: Tensor | None = None, steps: int = 1000
) -> Tensor:
    """Return the discounted returns `[B]` of one CartPole episode from each observation `[B, 4]`, without a time limit.

    Args:
        observation: First observations, which are CartPole's states.
        act: Policy, observations `[B, 4]` -> actions `[B]`.
        gamma: Discount factor.
        first: First actions `[B]`; None: those of the policy.
        steps: Steps after which an episode is cut.
    """
    env = CartPole(num_envs=len(observation))
    state, running = observation.double(), torch.ones(len(observation), dtype=torch.bool)
    total = torch.zeros(len(observation), dtype=torch.float64)
    for step in range(steps):
        action = first if step == 0 and first is not None else act(env.observe(state))
        state, reward, terminated = env.dynamics(state, action)
        total += gamma**step * reward * running
        running &= ~terminated
        if not running.any():
            break
    return total


def write(name: str, rows: list[dict[str, Any]], digits: int = 5) -> None:
    """Write rows to `<name>.csv` beside this file, with numbers of so many significant digits."""
    pd.DataFrame(rows).to_csv(HERE / f"{name}.csv", index=False, float_format=f"%.{digits}g")


def read(name: str) -> pd.DataFrame:
    """Return the table `<name>.csv` beside this file."""
    return pd.read_csv(HERE / f"{name}.csv")
>>>>>>> main
