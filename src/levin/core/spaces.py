"""Spaces of an env in plain values, what networks read of an observation, and the units of actions."""

import math
from collections.abc import Callable, Iterator
from typing import Any, Literal, NotRequired, TypedDict

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple

from levin.core.errors import ConfigError

VECTOR = "vector"  # of an observation with pixels: all the rest of it
CHANNELS = (1, 3, 4)
IS_FIRST = "is_first"  # [N, 1], for policies that ask for it: whether an observation begins an episode
# Of rollouts: a part of an observation can't have these names.
RESERVED = {"observation", "action", "reward", "terminated", "truncated", "done", "next", IS_FIRST}


class Space(TypedDict):
    """A gymnasium space in plain values, as a checkpoint can hold it (`weights_only`)."""

    type: Literal["box", "discrete", "multi_discrete", "dict"]
    shape: list[int]
    dtype: str
    low: list[float]  # box: flat bounds
    high: list[float]
    n: int  # discrete: number of actions; else 0
    start: int  # discrete: the env's first action; ours is 0
    nvec: NotRequired[list[int]]  # multi_discrete: flat numbers of actions
    starts: NotRequired[list[int]]  # multi_discrete: the env's first actions
    spaces: NotRequired[dict[str, "Space"]]  # dict


class EnvSpec(TypedDict):
    """All that an algorithm knows of its env, in plain values."""

    id: str
    num_envs: int
    observation: Space  # what networks read: a box, or a dict of them
    shown: NotRequired[Space]  # what the env shows, where that is something else
    action: Space
    action_units: Literal["rescale", "clip", "none"]
    action_repeat: int
    frame_stack: NotRequired[int]  # policies that were kept before it came are of 1
    observation_clip: float | None  # None: not normalised
    reward_clip: float | None  # None: not normalised


EMPTY: Space = {"type": "box", "shape": [], "dtype": "float32", "low": [], "high": [], "n": 0, "start": 0}


def describe_action(space: gym.Space) -> Space:
    """An action space in plain values. Raises ConfigError when no policy here can act in it."""
    if not isinstance(space, Box | Discrete | MultiDiscrete):
        raise ConfigError(f"the env's action space is {type(space).__name__}; valid here: Box, Discrete, MultiDiscrete")
    if isinstance(space, Box | MultiDiscrete) and len(space.shape) != 1:
        raise ConfigError(f"the env's action space has the shape {space.shape}; valid here: one dimension")
    described = describe_space(space)
    if isinstance(space, Box):
        described["low"], described["high"] = space.low.tolist(), space.high.tolist()
    return described


def describe_space(space: gym.Space) -> Space:
    """A space in plain values. Raises ConfigError when nothing here reads it."""
    if isinstance(space, Box):
        shape = list(space.shape)
        if space.dtype == np.uint8 and len(shape) > 3:
            raise ConfigError(
                f"the env's observation space has bytes of the shape {shape}; valid here: pixels [H, W], [H, W, C] or "
                "[C, H, W], which env.frame_stack stacks"
            )
        return {**EMPTY, "shape": shape, "dtype": "uint8" if is_image(space.dtype, shape) else "float32"}
    if isinstance(space, Discrete):
        return {**EMPTY, "type": "discrete", "dtype": "int64", "n": int(space.n), "start": int(space.start)}
    if isinstance(space, MultiDiscrete):
        sizes: list[int] = space.nvec.ravel().tolist()
        described: Space = {**EMPTY, "type": "multi_discrete", "shape": list(space.shape), "dtype": "int64"}
        return {**described, "nvec": sizes, "starts": space.start.ravel().tolist()}
    if isinstance(space, MultiBinary):
        return {**EMPTY, "shape": list(space.shape)}
    if isinstance(space, Dict | Tuple):
        parts = space.spaces.items() if isinstance(space, Dict) else enumerate(space.spaces)
        return {**EMPTY, "type": "dict", "spaces": {str(name): describe_space(part) for name, part in parts}}
    raise ConfigError(
        f"the env's observation space has a {type(space).__name__}; "
        "valid here: Box, Discrete, MultiDiscrete, MultiBinary, Dict, Tuple"
    )


def is_image(dtype: Any, shape: list[int]) -> bool:
    """Bytes in two or three dimensions are pixels; in one, such as Atari's memory, they are a vector."""
    return dtype == np.uint8 and len(shape) in (2, 3)


def is_channel_last(shape: list[int]) -> bool:
    """Whether pixels are `[H, W, C]`, not `[C, H, W]`."""
    return len(shape) == 3 and shape[-1] in CHANNELS and shape[0] not in CHANNELS


class NetworkInput:
    """Convert observations of an env, one batch at a time, into the input of networks.

    A box of numbers stays. Pixels become `[C, H, W]`. Of everything else numbers become one flat vector, those of
    finite sets one-hot. Pixels with something beside them are a dict: they by their names, all the rest as `vector`.

    Args:
        shown: The env's observation space.

    Attributes:
        space: The space of the networks' input.
        is_identity: Whether there is nothing to convert.

    Raises:
        ConfigError: Two parts have the same name.
    """

    def __init__(self, shown: Space) -> None:
        self.space: Space = shown
        self.is_identity = shown["type"] == "box" and bool(shown["shape"])
        self.is_identity &= shown["dtype"] != "uint8" or _channel_first(shown) == shown
        if self.is_identity:
            return
        leaves = list(_leaves(shown))
        self._images = {_key_name(path): (path, leaf) for path, leaf in leaves if leaf["dtype"] == "uint8"}
        self._numbers = [(path, leaf) for path, leaf in leaves if leaf["dtype"] != "uint8"]
        parts = {name: _channel_first(leaf) for name, (_, leaf) in self._images.items()}
        if self._numbers:
            parts[VECTOR] = {**EMPTY, "shape": [sum(_flat_size(leaf) for _, leaf in self._numbers)]}
        if len(parts) < len(leaves) - len(self._numbers) + bool(self._numbers):
            raise ConfigError(f"two parts of the env's observation have the same name, or pixels that of {VECTOR}")
        self.space = {**EMPTY, "type": "dict", "spaces": parts} if len(parts) > 1 else next(iter(parts.values()))

    def __call__(self, observation: Any) -> Any:
        """Convert a batch `[N, *S]` of the env's observations, or of each of their parts."""
        if self.is_identity:
            return observation
        found = {
            name: _to_channel_first(_select_part(observation, path), leaf)
            for name, (path, leaf) in self._images.items()
        }
        if self._numbers:
            flat = [_flatten(_select_part(observation, path), leaf) for path, leaf in self._numbers]
            found[VECTOR] = np.concatenate(flat, axis=-1, dtype=np.float32, casting="unsafe")
        return found if len(found) > 1 else next(iter(found.values()))


def _key_name(path: tuple[str, ...]) -> str:
    """Of pixels in an observation, as networks and TensorDicts can have it."""
    name = "_".join(path).replace(".", "_")
    return f"{name}_pixels" if name in RESERVED else name


def _leaves(space: Space, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Space]]:
    if "spaces" not in space:
        yield path, space
    for name, part in space.get("spaces", {}).items():
        yield from _leaves(part, (*path, name))


def _select_part(observation: Any, path: tuple[str, ...]) -> np.ndarray:
    for name in path:
        observation = observation[int(name)] if isinstance(observation, tuple) else observation[name]
    return np.asarray(observation)


def _channel_first(space: Space) -> Space:
    """Of pixels: `[H, W, C] -> [C, H, W]`, `[H, W] -> [1, H, W]`."""
    shape = space["shape"]
    if len(shape) == 2:
        return {**space, "shape": [1, *shape]}
    return {**space, "shape": [shape[2], *shape[:2]]} if is_channel_last(shape) else space


def _to_channel_first(observation: np.ndarray, space: Space) -> np.ndarray:
    """`[N, *S] -> [N, C, H, W]`."""
    if len(space["shape"]) == 2:
        return observation[:, None]
    return np.moveaxis(observation, -1, 1) if is_channel_last(space["shape"]) else observation


def _flat_size(space: Space) -> int:
    """How many numbers `_flat` makes of it."""
    return sum(space.get("nvec", [])) or space["n"] or math.prod(space["shape"])


def _flatten(observation: np.ndarray, space: Space) -> np.ndarray:
    """`[N, *S] -> [N, D]`; of finite sets, whether it is each of their members."""
    flat = observation.reshape(len(observation), -1)
    if space["type"] == "box":
        return flat
    sizes, starts = space.get("nvec", [space["n"]]), space.get("starts", [space["start"]])
    one_hot = [flat[:, i, None] - starts[i] == np.arange(size) for i, size in enumerate(sizes)]
    return np.concatenate(one_hot, axis=-1)


def to_gym(space: Space) -> gym.Space:
    """The gymnasium space of what networks read."""
    if "spaces" in space:
        return Dict({name: to_gym(part) for name, part in space["spaces"].items()})
    low, high = (0, 255) if space["dtype"] == "uint8" else (-np.inf, np.inf)
    return Box(low, high, tuple(space["shape"]), np.dtype(space["dtype"]).type)


def observation_dtypes(space: Space) -> set[str]:
    """Of what networks read."""
    return {part["dtype"] for part in space.get("spaces", {"": space}).values()}


def to_tensors(space: Space, observation: Any, device: torch.device | None = None) -> Any:
    """A batch of what networks read, as they take it: `[N, *S]`, or such a tensor for each part of a dict."""
    if "spaces" in space:
        return {name: to_tensors(part, observation[name], device) for name, part in space["spaces"].items()}
    batch = torch.from_numpy(np.ascontiguousarray(observation, dtype=space["dtype"]))
    return batch if device is None else batch.to(device)


def is_unbatched(shown: Space, observation: Any) -> bool:
    """Whether what an env showed is one observation, not a batch."""
    path, leaf = next(_leaves(shown))
    return _select_part(observation, path).ndim == len(leaf["shape"])


def unsqueeze(observation: Any) -> Any:
    """A batch of one observation."""
    if isinstance(observation, dict):
        return {name: unsqueeze(part) for name, part in observation.items()}
    if isinstance(observation, tuple):
        return tuple(map(unsqueeze, observation))
    return np.asarray(observation)[None]


def action_converter(space: Space, units: str) -> Callable[[np.ndarray], np.ndarray]:
    """The map from the policy's actions `[N, *A]` to those of the env."""
    if space["type"] != "box":
        first = np.array(space.get("starts", space["start"]))
        return (lambda actions: actions + first) if first.any() else (lambda actions: actions)
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


def random_actions(space: gym.Space, *shape: int) -> np.ndarray:
    """Uniform actions `[*shape, *A]`, in the policy's units."""
    shape = (*shape, *(space.shape or ()))
    if isinstance(space, Discrete):
        return torch.randint(int(space.n), shape).numpy()
    if isinstance(space, MultiDiscrete):
        return (torch.rand(shape, dtype=torch.float64).numpy() * space.nvec).astype(np.int64)
    assert isinstance(space, Box)
    low, high = space.low, space.high
    low, high = np.where(np.isfinite(low), low, -1), np.where(np.isfinite(high), high, 1)
    return (low + torch.rand(shape).numpy() * (high - low)).astype(np.float32)
