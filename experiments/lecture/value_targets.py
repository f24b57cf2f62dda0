"""Bias and variance of value functions that were trained on rollouts, and on bootstrap targets.

The policy on CartPole-v1 is fixed, so that the true value of a state can be measured by many rollouts from it.
"""

from typing import Any

import numpy as np
import torch
from experiments.lecture.cartpole import GAMMA, build
from experiments.lecture.drawing import COLORS, HERE, panels, read, save
from experiments.study import write_table
from experiments.variance.run import collect_episodes
from gymnasium.envs.classic_control.cartpole import CartPoleVectorEnv
from tensordict import TensorDict
from torch import Tensor

NAME = "value_targets"
STATES, ROLLOUTS = 50, 1000  # at which values are compared; rollouts from each for its true value
EPISODES, REPETITIONS = (4, 16, 64), 5  # data sets of so many episodes each
UPDATES = (10, 30, 100, 300, 1000)
LONGEST = 2000  # steps after which gamma^t is 2e-9
TARGETS = ("rollout", "bootstrap")


@torch.no_grad()
def sample_returns(algorithm: Any, states: Tensor, rollouts: int) -> Tensor:
    """Return discounted returns of rollouts from each state `[S, 4]`, without a time limit: `[S, rollouts]`."""
    num = len(states) * rollouts
    envs = CartPoleVectorEnv(num_envs=num, max_episode_steps=LONGEST + 1)
    envs.reset(seed=0)
    envs.state = states.repeat_interleave(rollouts, 0).double().numpy().T.copy()  # [4, S rollouts]
    observation, total = states.repeat_interleave(rollouts, 0), torch.zeros(num)
    alive = torch.ones(num, dtype=torch.bool)
    for t in range(LONGEST):
        total += GAMMA**t * alive  # the reward is 1 in every step, the last one included
        action = algorithm.actor(algorithm.trunk(observation)).sample()
        after, _, terminated, _, _ = envs.step(action.numpy())
        alive &= ~torch.from_numpy(terminated)
        if not alive.any():
            break
        observation = torch.from_numpy(after)
    envs.close()
    return total.view(len(states), rollouts)


def train_values(data: TensorDict, target: str, states: Tensor, seed: int) -> dict[int, Tensor]:
    """Return the values `[S]` of the states after each number of updates, by a new critic."""
    algorithm, _ = build("baseline", seed=seed, overrides=(f"algo.value_target={target}", "algo.critic_lr=3e-3"))
    values = {}
    for update in range(1, max(UPDATES) + 1):
        algorithm.step(algorithm.critic_optimizer, algorithm.critic_loss(data))
        if update in UPDATES:
            values[update] = algorithm.value(states.unsqueeze(0)).detach().flatten()
    return values


def measure() -> None:
    """Write value_targets.csv: squared bias and variance, means over the states, by target, episodes and updates."""
    algorithm, loader = build("baseline", seed=10_000)
    torch.manual_seed(0)
    visited = collect_episodes(loader, 200)["observation"].squeeze(0)
    states = visited[torch.randperm(len(visited))[:STATES]]
    returns = sample_returns(algorithm, states, ROLLOUTS)
    true = returns.mean(1)
    rows: list[list[Any]] = [["truth", "", "", f"{true.square().mean():.5g}", f"{returns.var(1).mean():.5g}"]]
    for episodes in EPISODES:
        values: dict[tuple[str, int], list[Tensor]] = {}
        for repetition in range(REPETITIONS):
            data = collect_episodes(loader, episodes)
            for target in TARGETS:
                for update, each in train_values(data, target, states, seed=repetition).items():
                    values.setdefault((target, update), []).append(each)
        for (target, update), each in values.items():
            samples = torch.stack(each)  # [repetitions, S]
            variance = samples.var(0)
            # The square of a mean over few repetitions is too large by their variance over their number.
            bias = (samples.mean(0) - true).square() - variance / REPETITIONS
            rows.append([target, episodes, update, f"{bias.mean():.5g}", f"{variance.mean():.5g}"])
    write_table(HERE / f"{NAME}.csv", ["target", "episodes", "updates", "squared_bias", "variance"], rows)


def draw() -> None:
    """Draw bias and deviation against the updates of the critic, and the final error by number of episodes."""
    table = {(row["target"], row["episodes"], row["updates"]): row for row in read(NAME)}
    figure, (left, right) = panels(2)
    for color, target in zip(COLORS[:2], TARGETS, strict=True):
        rows = [table[target, str(EPISODES[-1]), str(update)] for update in UPDATES]
        bias, variance = (np.array([float(row[key]) for row in rows]) for key in ("squared_bias", "variance"))
        left.plot(UPDATES, np.sqrt(np.maximum(bias, 0)), "o-", color=color, label=f"{target}, bias")
        left.plot(UPDATES, np.sqrt(variance), "s:", color=color, label=f"{target}, deviation")
    left.set(xscale="log", xlabel="updates of the critic", ylabel="root mean square over states")
    left.set_title(f"V from {EPISODES[-1]} episodes")
    left.legend()
    places = np.arange(len(EPISODES))
    for shift, color, target in zip((-0.2, 0.2), COLORS[:2], TARGETS, strict=True):
        rows = [table[target, str(episodes), str(UPDATES[-1])] for episodes in EPISODES]
        bias, variance = (np.array([float(row[key]) for row in rows]) for key in ("squared_bias", "variance"))
        right.bar(places + shift, variance, 0.36, color=color, label=f"{target}, variance")
        right.bar(places + shift, np.maximum(bias, 0), 0.36, variance, color=color, alpha=0.4, label="squared bias")
    right.set_xticks(places, [str(episodes) for episodes in EPISODES])
    right.set(xlabel="episodes of data", ylabel="squared error of V", title=f"after {UPDATES[-1]:,} updates")
    right.legend()
    save(figure, NAME)
