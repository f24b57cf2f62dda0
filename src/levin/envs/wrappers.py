"""Wrappers that are applied to each env before vectorization."""

import warnings
from copy import copy
from typing import Any, Literal

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Dict, MultiBinary
from gymnasium.wrappers import FilterObservation, FrameStackObservation, ReshapeObservation, TransformObservation

from levin.core.errors import ConfigError
from levin.core.spaces import ACTION_MASK, add_mask, count_actions, describe_space, is_channel_last
from levin.envs.sync import as_number


class ActionRepeat(gym.Wrapper):
    """Wrapper that applies each action `times` times, or until the episode ends, and sums the rewards.

    An env with an attribute `draws` and a method `show` (`levin.envs.racing`) only draws the observation that is
    returned, not those in between.
    """

    def __init__(self, env: gym.Env, times: int) -> None:
        super().__init__(env)
        self.times = times
        # An env of the user may have an attribute of the same name.
        self.lazy = isinstance(getattr(env.unwrapped, "draws", None), bool) and hasattr(env.unwrapped, "show")

    def step(self, action: Any) -> tuple[Any, float, bool, bool, dict[str, Any]]:
        total = 0.0
        self._set_drawing(False)
        for _ in range(self.times - 1):
            # A copy each time: the env may write into its action.
            observation, reward, terminated, truncated, info = self.env.step(copy(action))
            total += float(as_number("reward", reward))
            if terminated or truncated:
                self._set_drawing(True)
                return self.unwrapped.show() if self.lazy else observation, total, terminated, truncated, info  # type: ignore[attr-defined]
        self._set_drawing(True)
        observation, reward, terminated, truncated, info = self.env.step(action)
        return observation, total + float(as_number("reward", reward)), terminated, truncated, info

    def _set_drawing(self, enabled: bool) -> None:
        if self.lazy:
            self.unwrapped.draws = enabled  # type: ignore[attr-defined]


class InfoMask(gym.Wrapper):
    """Wrapper that moves `info["action_mask"]` into the observation, which becomes a Dict.

    After the end of an episode the mask may be missing: it then allows nothing.

    Args:
        env: Env with discrete actions.

    Raises:
        ConfigError: The actions are not discrete, or the observation has a part of this name already.
    """

    def __init__(self, env: gym.Env) -> None:
        super().__init__(env)
        self.size, space = count_actions(env.action_space), env.observation_space
        if isinstance(space, Dict) and ACTION_MASK in space.spaces:
            raise ConfigError(f"the observation has a part {ACTION_MASK} itself: set env.action_mask={ACTION_MASK}")
        parts = space.spaces if isinstance(space, Dict) else space
        self.observation_space = Dict(add_mask(parts, MultiBinary(self.size)))

    def reset(self, *, seed: int | None = None, options: dict[str, Any] | None = None) -> tuple[Any, dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return add_mask(observation, self._mask(info, None)), info

    def step(self, action: Any) -> tuple[Any, Any, bool, bool, dict[str, Any]]:
        observation, reward, terminated, truncated, info = self.env.step(action)
        nothing = np.zeros(self.size, np.int8) if terminated or truncated else None
        return add_mask(observation, self._mask(info, nothing)), reward, terminated, truncated, info

    def _mask(self, info: dict[str, Any], default: np.ndarray | None) -> np.ndarray:
        """Return the mask `[A]` in an info.

        Raises:
            ValueError: It is missing and has no default, or does not have one number per action, 0 or 1.
        """
        mask = info.get(ACTION_MASK, default)
        if mask is None:
            raise ValueError("env.action_mask=info needs info['action_mask'] of every reset and step, and got none")
        mask = np.concatenate(mask) if isinstance(mask, tuple) else np.asarray(mask)  # a tuple: one mask per choice
        if mask.shape != (self.size,):
            raise ValueError(f"info['action_mask'] has the shape {mask.shape}; valid: ({self.size},), one per action")
        if mask.dtype.kind != "f":  # checked when it is read
            return mask
        if (wrong := mask[~np.isin(mask, (0, 1))]).size:
            raise ValueError(f"the action mask holds {wrong[0]:g}; valid: 1 for allowed actions, else 0")
        return mask.astype(np.int8)


def drop_texts(env: gym.Env) -> gym.Env:
    """Leave the texts out of an observation that is a dict, such as the mission of MiniGrid, and warn of it."""
    space = env.observation_space
    if not isinstance(space, Dict):
        return env
    texts = [name for name, part in space.spaces.items() if isinstance(part.sample(), str)]
    if not texts:
        return env
    warnings.warn(f"the observation of {env} has texts, which are left out: {', '.join(texts)}", stacklevel=1)
    return FilterObservation(env, [name for name in space.spaces if name not in texts])


def stack_frames(env: gym.Env, num: int, channels: Literal["first", "last"] | None = None) -> gym.Env:
    """Stack the last `num` observations along the first axis, oldest first; pixels become `[num * C, H, W]`.

    Args:
        env: Env whose observations are boxes.
        num: Number of observations.
        channels: Axis of the channels of images; None: guess it.

    Raises:
        ConfigError: The observation space is not a `Box`.
    """
    if not isinstance(env.observation_space, Box):
        raise ConfigError(f"env.frame_stack={num} stacks a Box, not a {type(env.observation_space).__name__}")
    if not env.observation_space.shape:  # a single number
        space = env.observation_space
        vector = Box(space.low.reshape(1), space.high.reshape(1), dtype=space.dtype.type)  # type: ignore[union-attr]
        env = TransformObservation(env, lambda observation: np.array(observation).reshape(1), vector)
    else:  # copies: an env may draw every frame into the same array
        env = TransformObservation(env, np.array, env.observation_space)
    assert isinstance(env.observation_space, Box)
    stacked = FrameStackObservation(env, num)  # [num, *S]
    shape = stacked.observation_space.shape
    assert shape is not None
    if len(shape) == 3:
        return stacked
    single = describe_space(env.observation_space, channels)
    if single["dtype"] == "uint8" and is_channel_last(single):
        num_frames, height, width, num_channels = shape
        space = Box(0, 255, (num_frames * num_channels, height, width), np.uint8)
        return TransformObservation(stacked, lambda frames: np.moveaxis(frames, -1, 1).reshape(space.shape), space)
    return ReshapeObservation(stacked, (shape[0] * shape[1], *shape[2:]))


def select_entries(env: gym.Env, entries: list[int]) -> gym.Env:
    """Reduce vector observations to the entries with these indices, in this order.

    Raises:
        ConfigError: Observations are not vectors, or have no such entries.
    """
    space = env.observation_space
    if not isinstance(space, Box) or len(space.shape) != 1:
        raise ConfigError(
            f"env.observation_entries={entries} is for vectors, not for {type(space).__name__}{space.shape}"
        )
    if not entries or min(entries) < 0 or max(entries) >= space.shape[0]:
        raise ConfigError(
            f"env.observation_entries={entries} must name entries of the vector; valid: 0 to {space.shape[0] - 1}"
        )
    shown = Box(space.low[entries], space.high[entries], dtype=space.dtype)
    return TransformObservation(env, lambda observation: observation[entries], shown)
