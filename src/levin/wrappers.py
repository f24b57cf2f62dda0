"""What stands between a single env and the vector of them."""

from typing import Any

import gymnasium as gym
from gymnasium.wrappers import FrameStackObservation, ReshapeObservation


class ActionRepeat(gym.Wrapper):
    """Apply each action `times` times, or until the episode ends; rewards are summed."""

    def __init__(self, env: gym.Env, times: int) -> None:
        super().__init__(env)
        self.times = times

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        total = 0.0
        for _ in range(self.times - 1):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                return observation, total, terminated, truncated, info
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, total + float(reward), terminated, truncated, info


def stack_frames(env: gym.Env, num: int) -> gym.Env:
    """Show the last `num` observations: `[C, H, W] -> [num * C, H, W]`, `[H, W] -> [num, H, W]`."""
    stacked = FrameStackObservation(env, num)  # [num, ...]
    shape = stacked.observation_space.shape
    assert shape is not None
    return stacked if len(shape) == 3 else ReshapeObservation(stacked, (shape[0] * shape[1], *shape[2:]))
