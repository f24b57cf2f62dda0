"""Algorithms without a Trainer, for measurements between two updates, and true returns of CartPole's states."""

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pandas as pd
import torch
from tensordict import TensorDict
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


def policy_gradient(algorithm: Any, rollout: TensorDict) -> tuple[Any, ...]:
    """Return what a step of TRPO begins with, at the policy that has collected a rollout.

    Returns:
        The batch, its features, the distribution of the actions without gradients, the gradient of the surrogate, and
        the product of the Fisher matrix with a vector.
    """
    batch = algorithm.advantages(rollout)
    features = algorithm.trunk(batch["observation"])
    new = algorithm.actor(features)
    old = new.detach()
    gradient = algorithm.flat_gradient(algorithm.surrogate(batch, new, old))
    return batch, features, old, gradient, algorithm.fisher_vector_product(old.kl(new).mean())


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
