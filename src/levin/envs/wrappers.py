"""What stands between a single env and the vector of them."""

from typing import Any

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box
from gymnasium.wrappers import FrameStackObservation, ReshapeObservation, TransformObservation

from levin.core.errors import ConfigError
from levin.core.spaces import is_channel_last, is_image


class ActionRepeat(gym.Wrapper):
    """Apply each action `times` times, or until the episode ends; rewards are summed.

    An env that has `draws` and `show` is told to draw what is shown only.
    """

    def __init__(self, env: gym.Env, times: int) -> None:
        super().__init__(env)
        self.times, self.lazy = times, hasattr(env.unwrapped, "draws")

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        total = 0.0
        self._draw(False)
        for _ in range(self.times - 1):
            observation, reward, terminated, truncated, info = self.env.step(action)
            total += float(reward)
            if terminated or truncated:
                self._draw(True)
                return self.unwrapped.show() if self.lazy else observation, total, terminated, truncated, info  # type: ignore[attr-defined]
        self._draw(True)
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, total + float(reward), terminated, truncated, info

    def _draw(self, whether: bool) -> None:
        if self.lazy:
            self.unwrapped.draws = whether  # type: ignore[attr-defined]


def stack_frames(env: gym.Env, num: int) -> gym.Env:
    """Show the last `num` observations along the first axis, oldest first; pixels are `[num * C, H, W]` then.

    Raises:
        ConfigError: There is more than a box to stack.
    """
    if not isinstance(env.observation_space, Box):
        raise ConfigError(f"env.frame_stack={num} stacks a Box, not a {type(env.observation_space).__name__}")
    stacked = FrameStackObservation(env, num)  # [num, *S]
    shape = stacked.observation_space.shape
    assert shape is not None
    if len(shape) == 3:
        return stacked
    if is_image(env.observation_space.dtype, list(shape[1:])) and is_channel_last(list(shape[1:])):
        num_frames, height, width, channels = shape
        space = Box(0, 255, (num_frames * channels, height, width), np.uint8)
        return TransformObservation(stacked, lambda frames: np.moveaxis(frames, -1, 1).reshape(space.shape), space)
    return ReshapeObservation(stacked, (shape[0] * shape[1], *shape[2:]))


def select_entries(env: gym.Env, entries: list[int]) -> gym.Env:
    """Show these numbers of a vector only, in this order.

    Raises:
        ConfigError: Observations are no vectors, or have no such entries.
    """
    space = env.observation_space
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise ConfigError(
            f"env.observation_entries={entries} is for vectors, not for {type(space).__name__}{space.shape}"
        )
    if not entries or min(entries) < 0 or max(entries) >= space.shape[0]:
        raise ConfigError(f"env.observation_entries={entries} names no entries: there are 0 to {space.shape[0] - 1}")
    shown = Box(space.low[entries], space.high[entries], dtype=space.dtype)
    return TransformObservation(env, lambda observation: observation[entries], shown)
