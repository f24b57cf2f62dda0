"""Env descriptions, records and rollouts for the tests of world models."""

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from levin.bench.peers import fake_env_spec
from levin.core.spaces import EMPTY


def env_description(num_envs: int = 1, actions: int = 1, pixels: bool = False, discrete: int = 0):
    """Return the description of an env with vectors `[3]` or pixels.

    Args:
        num_envs: Number of envs.
        actions: Size of the continuous action.
        pixels: Whether observations are pixels `[3, 64, 64]`.
        discrete: Number of discrete actions; 0 for a continuous action.
    """
    shape, dtype = ([3, 64, 64], "uint8") if pixels else ([3], "float32")
    observation = {**EMPTY, "shape": shape, "dtype": dtype}
    action = {**EMPTY, "shape": [actions], "dtype": "float32", "low": [-1.0] * actions, "high": [1.0] * actions}
    if discrete:
        action = {**EMPTY, "type": "discrete", "dtype": "int64", "n": discrete}
    return {**fake_env_spec(observation, action), "id": "a toy", "num_envs": num_envs}


class Constant(nn.Module):
    """Network whose output does not depend on its input."""

    def __init__(self, numbers: Tensor) -> None:
        super().__init__()
        self.numbers = numbers

    def forward(self, feature: Tensor) -> Tensor:
        return self.numbers


def random_records(
    num: int = 3, length: int = 7, observation: int = 3, action: int = 1, first: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """Return random records `[num, length, *]` of episodes that start at steps 0 and `first`."""
    generator = torch.Generator().manual_seed(0)
    is_first = torch.zeros(num, length, 1, dtype=torch.bool)
    is_first[:, [0, *first]] = True
    return {
        "observation": torch.randn(num, length, observation, generator=generator),
        "action": torch.randn(num, length, action, generator=generator).tanh(),
        "reward": torch.randn(num, length, 1, generator=generator),
        "is_first": is_first,
        "is_terminal": torch.zeros(num, length, 1, dtype=torch.bool),
        "is_last": torch.zeros(num, length, 1, dtype=torch.bool),
    }


# --- replay of sequences


def numbered_steps(env: int, lengths: list[int], steps: int) -> tuple[dict[str, Tensor], list[tuple]]:
    """Return transitions of an env whose observation is (env, episode, step), and the records that replay must store.

    Rewards are 10 episode + step, counted from 1; even episodes terminate, odd ones are truncated.

    Args:
        env: Index of the env.
        lengths: Lengths of the episodes, repeated in this order.
        steps: Number of transitions.
    """
    transitions, expected, episode, t = [], [], 0, 0
    while len(transitions) < steps:
        last = t + 1 == lengths[episode % len(lengths)]
        reward = 10.0 * episode + t + 1
        transitions.append(([env, episode, t], [env, episode, t + 1], reward, last, episode % 2 == 0))
        came_with = 0.0 if t == 0 else 10.0 * episode + t
        expected.append((env, episode, t, came_with, t == 0, False, float(episode + t)))
        if last:
            expected.append((env, episode, t + 1, reward, False, episode % 2 == 0, 0.0))
        episode, t = (episode + 1, 0) if last else (episode, t + 1)
    before, after, reward, done, terminated = (torch.tensor(each) for each in zip(*transitions, strict=True))
    action = (before[:, 1] + before[:, 2]).float().unsqueeze(-1)
    flags = done.unsqueeze(-1)
    steps_ = {"observation": before.float(), "after": after.float(), "reward": reward.unsqueeze(-1), "done": flags}
    return {**steps_, "terminated": flags & terminated.unsqueeze(-1), "action": action}, expected


def numbered_rollouts(lengths: list[list[int]], steps: int, chunk: int) -> tuple[list[TensorDict], list[list[tuple]]]:
    """Return rollouts `[N, chunk]` of `numbered_steps`, and the expected records of each env.

    Args:
        lengths: Episode lengths of each env.
        steps: Number of transitions of each env.
        chunk: Number of transitions per rollout.
    """
    parts, expected = zip(*(numbered_steps(env, each, steps) for env, each in enumerate(lengths)), strict=True)
    data = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
    rollout = TensorDict(
        {
            "observation": data["observation"],
            "action": data["action"],
            "next": {
                "observation": data["after"],
                "reward": data["reward"],
                "done": data["done"],
                "terminated": data["terminated"],
            },
        },
        batch_size=(len(lengths), steps),
    )
    return list(rollout.split(chunk, 1)), list(expected)
