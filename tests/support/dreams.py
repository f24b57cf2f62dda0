"""Records, rollouts and spaces for the tests of world models."""

import torch
from tensordict import TensorDict
from torch import Tensor, nn

from levin.core.spaces import EMPTY


def spec(num_envs: int = 1, actions: int = 1, pixels: bool = False, discrete: int = 0):
    shape, dtype = ([3, 64, 64], "uint8") if pixels else ([3], "float32")
    observation = {**EMPTY, "shape": shape, "dtype": dtype}
    action = {**EMPTY, "shape": [actions], "dtype": "float32", "low": [-1.0] * actions, "high": [1.0] * actions}
    if discrete:
        action = {**EMPTY, "type": "discrete", "dtype": "int64", "n": discrete}
    return {
        "id": "a toy",
        "num_envs": num_envs,
        "observation": observation,
        "action": action,
        "action_units": "none",
        "action_repeat": 1,
        "observation_clip": None,
        "reward_clip": None,
    }


class Says(nn.Module):
    """The same numbers, whatever it is asked."""

    def __init__(self, numbers: Tensor) -> None:
        super().__init__()
        self.numbers = numbers

    def forward(self, feature: Tensor) -> Tensor:
        return self.numbers


def records(
    num: int = 3, length: int = 7, observation: int = 3, action: int = 1, first: tuple[int, ...] = ()
) -> dict[str, Tensor]:
    """Random ones `[num, length]`; episodes begin at 0 and at `first`."""
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


def stream(env: int, lengths: list[int], steps: int) -> tuple[dict[str, Tensor], list[tuple]]:
    """Steps of an env that shows (env, episode, step) and rewards with 10 episode + step; and their records."""
    found, expected, episode, t = [], [], 0, 0
    while len(found) < steps:
        last = t + 1 == lengths[episode % len(lengths)]
        reward = 10.0 * episode + t + 1
        found.append(([env, episode, t], [env, episode, t + 1], reward, last, episode % 2 == 0))
        came_with = 0.0 if t == 0 else 10.0 * episode + t
        expected.append((env, episode, t, came_with, t == 0, False, float(episode + t)))
        if last:
            expected.append((env, episode, t + 1, reward, False, episode % 2 == 0, 0.0))
        episode, t = (episode + 1, 0) if last else (episode, t + 1)
    before, after, reward, done, dies = (torch.tensor(each) for each in zip(*found, strict=True))
    action = (before[:, 1] + before[:, 2]).float().unsqueeze(-1)
    flags = done.unsqueeze(-1)
    steps_ = {"observation": before.float(), "after": after.float(), "reward": reward.unsqueeze(-1), "done": flags}
    return {**steps_, "terminated": flags & dies.unsqueeze(-1), "action": action}, expected


def rollouts(lengths: list[list[int]], steps: int, chunk: int) -> tuple[list[TensorDict], list[list[tuple]]]:
    parts, expected = zip(*(stream(env, each, steps) for env, each in enumerate(lengths)), strict=True)
    data = {key: torch.stack([part[key] for part in parts]) for key in parts[0]}
    whole = TensorDict(
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
    return list(whole.split(chunk, 1)), list(expected)
