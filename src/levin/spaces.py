"""Spaces of an env in plain values, and the units of its actions."""

from collections.abc import Callable
from typing import Literal, NotRequired, TypedDict

import gymnasium as gym
import numpy as np
from gymnasium.spaces import Box, Discrete

from levin.errors import ConfigError


class Space(TypedDict):
    """A gymnasium space in plain values, as a checkpoint can hold it (`weights_only`)."""

    type: Literal["box", "discrete"]
    shape: list[int]
    dtype: str
    low: list[float]  # box: flat bounds
    high: list[float]
    n: int  # discrete: number of actions; else 0
    start: int  # discrete: the env's first action; ours is 0


class EnvSpec(TypedDict):
    """All that an algorithm knows of its env, in plain values."""

    id: str
    num_envs: int
    observation: Space
    action: Space
    action_units: Literal["rescale", "clip", "none"]
    action_repeat: int
    frame_stack: NotRequired[int]  # policies that were kept before it came are of 1
    observation_clip: float | None  # None: not normalised
    reward_clip: float | None  # None: not normalised


def describe_space(space: gym.Space, name: str, valid: tuple[type[gym.Space], ...]) -> Space:
    """A space in plain values. Raises ConfigError when it is not one of `valid`."""
    if not isinstance(space, valid):
        names = ", ".join(kind.__name__ for kind in valid)
        raise ConfigError(f"the env's {name} space is {type(space).__name__}; valid here: {names}")
    if isinstance(space, Discrete):
        n, start = int(space.n), int(space.start)
        return {"type": "discrete", "shape": [], "dtype": "int64", "low": [], "high": [], "n": n, "start": start}
    assert isinstance(space, Box)
    if name == "action" and len(space.shape) != 1:
        raise ConfigError(f"the env's action space has the shape {space.shape}; valid here: one dimension")
    shape, dtype = list(space.shape), "uint8" if space.dtype == np.uint8 else "float32"
    low, high = ([float(x) for x in bound.ravel()] if name == "action" else [] for bound in (space.low, space.high))
    return {"type": "box", "shape": shape, "dtype": dtype, "low": low, "high": high, "n": 0, "start": 0}


def action_units(space: Space, units: str) -> Callable[[np.ndarray], np.ndarray]:
    """The map from the policy's actions `[N, *A]` to those of the env."""
    if space["type"] == "discrete":
        return (lambda actions: actions + space["start"]) if space["start"] else (lambda actions: actions)
    low, high = (np.array(bound, np.float32).reshape(space["shape"]) for bound in (space["low"], space["high"]))
    if units == "none":
        return lambda actions: actions
    if units == "clip":
        return lambda actions: np.clip(actions, low, high)
    if not (np.isfinite(low).all() and np.isfinite(high).all()):
        raise ConfigError("env.action=rescale needs finite action bounds; valid here: clip, none")
    if (low == -1).all() and (high == 1).all():
        return lambda actions: actions
    scale, middle = (high - low) / 2, (high + low) / 2
    # float32 rounding may step over the bound by one unit in the last place
    return lambda actions: np.clip(actions * scale + middle, low, high)
