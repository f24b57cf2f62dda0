"""Rollouts of random frames, each of which is unique."""

import numpy as np
import torch
from tensordict import TensorDict

from levin.data.replay import KEYS


class Camera:
    """Generates rollouts `[N, T]` of frame stacks whose frames are all different."""

    def __init__(self, num_envs: int, stack: int, channels: int = 1, seed: int = 0) -> None:
        self.random = np.random.default_rng(seed)
        self.stack, self.channels = stack, channels
        self.shown = [self.begin() for _ in range(num_envs)]

    def frame(self) -> np.ndarray:
        return self.random.integers(0, 256, (self.channels, 4, 4), dtype=np.uint8)

    def begin(self) -> np.ndarray:
        return np.concatenate([self.frame()] * self.stack)

    def rollout(self, steps: int, end_probability: float = 0.2) -> TensorDict:
        rows = []
        for env in range(len(self.shown)):
            for _ in range(steps):
                observation = self.shown[env]
                after = np.concatenate([observation[self.channels :], self.frame()])
                terminated, truncated = self.random.random(2) < end_probability / 2
                rows.append((observation, self.random.integers(5), after, self.random.normal(), terminated, truncated))
                self.shown[env] = self.begin() if terminated or truncated else after
        observation, action, after, reward, terminated, truncated = (np.stack(each) for each in zip(*rows, strict=True))
        flags = {"terminated": terminated, "truncated": truncated, "done": terminated | truncated}
        following = {"observation": torch.from_numpy(after), "reward": torch.from_numpy(reward).float().unsqueeze(-1)}
        following |= {key: torch.from_numpy(value).unsqueeze(-1) for key, value in flags.items()}
        flat = {"observation": torch.from_numpy(observation), "action": torch.from_numpy(action), "next": following}
        return TensorDict(flat, batch_size=[len(rows)]).reshape(len(self.shown), steps)


def key(transition: TensorDict) -> bytes:
    """Return a transition as bytes, for look-ups; random frames make it unique."""
    flat = transition.select(*KEYS).flatten_keys().items()
    return b"".join(value.numpy().tobytes() for _, value in sorted(flat))
