"""Describe env spaces in plain values, and convert actions to the env's units."""

from collections.abc import Callable, Iterator
from typing import Any, Literal, NotRequired

import gymnasium as gym
import numpy as np
import torch
from gymnasium.spaces import Box, Dict, Discrete, MultiBinary, MultiDiscrete, Tuple
from torch import Tensor
from typing_extensions import TypedDict  # pydantic needs this one before Python 3.12

from levin.core.errors import ConfigError

VECTOR = "vector"  # in a network input that is a dict, the name of the part with everything but pixels
CHANNELS = (1, 3, 4)  # numbers of channels by which an image is recognised
ACTION_MASK = "action_mask"  # in a network input, the name of the part that says which actions are allowed
IS_FIRST = "is_first"  # [N, 1], input of policies with a memory: whether an observation begins an episode


class Space(TypedDict):
    """A gymnasium space in plain values, so that checkpoints load with `weights_only`."""

    type: Literal["box", "discrete", "multi_discrete", "dict", "mask"]  # mask: 1 for each allowed action, else 0
    shape: list[int]
    dtype: str
    low: list[float]  # box of actions: bounds; else empty
    high: list[float]
    n: int  # discrete: number of values; else 0
    start: int  # discrete: the env's first value; the policy's is 0
    nvec: NotRequired[list[int]]  # multi_discrete: number of values of each choice, flat
    starts: NotRequired[list[int]]  # multi_discrete: the env's first value of each choice, flat
    spaces: NotRequired[dict[str, "Space"]]  # dict: its parts
    channels: NotRequired[Literal["first", "last"]]  # pixels with three dimensions: axis of the channels


class EnvSpec(TypedDict):
    """Everything that an algorithm knows about its env, in plain values."""

    id: str
    num_envs: int
    observation: Space  # the network input: a box, or a dict of boxes
    shown: NotRequired[Space]  # the env's observation space; if missing, `observation`
    action: Space
    action_units: Literal["rescale", "clip", "none"]
    action_repeat: int
    frame_stack: NotRequired[int]  # missing in policies saved by older versions, which have 1
    observation_clip: float | None  # None: observations are not normalised, or are pixels only
    reward_clip: float | None  # None: rewards are not normalised


EMPTY: Space = {"type": "box", "shape": [], "dtype": "float32", "low": [], "high": [], "n": 0, "start": 0}


def describe_action(space: gym.Space) -> Space:
    """Return an action space in plain values.

    Raises:
        ConfigError: No policy here can act in the space.
    """
    if not isinstance(space, Box | Discrete | MultiDiscrete):
        raise ConfigError(f"the env's action space is {type(space).__name__}; valid: Box, Discrete, MultiDiscrete")
    if isinstance(space, Box | MultiDiscrete) and len(space.shape) != 1:
        raise ConfigError(f"the env's action space has the shape {space.shape}; valid: one dimension")
    if isinstance(space, Box) and not np.issubdtype(space.dtype, np.floating):
        raise ConfigError(
            f"the env's action space is a Box of {space.dtype}, whole numbers, but a Box is for continuous actions: "
            "use Discrete or MultiDiscrete in the env"
        )
    described = describe_space(space)
    if isinstance(space, Box):
        described["low"], described["high"] = space.low.tolist(), space.high.tolist()
        described["dtype"] = str(space.dtype)
    return described


def describe_space(space: gym.Space, channels: Literal["first", "last"] | None = None) -> Space:
    """Return an observation space in plain values.

    Args:
        space: Observation space.
        channels: Axis of the channels of all images; None: guess it.

    Raises:
        ConfigError: The space can't be converted to network input.
    """
    if isinstance(space, Box):
        shape = list(space.shape)
        if space.dtype == np.uint8 and len(shape) > 3:
            raise ConfigError(
                f"the env's observation space is uint8 of the shape {shape}; valid: pixels [H, W], [H, W, C] or "
                "[C, H, W]; to stack frames, set env.frame_stack"
            )
        if not is_image(space.dtype, shape):
            return {**EMPTY, "shape": shape}
        image: Space = {**EMPTY, "shape": shape, "dtype": "uint8"}
        return {**image, "channels": channels or guess_channels(shape)} if len(shape) == 3 else image
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
        return {**EMPTY, "type": "dict", "spaces": {str(name): describe_space(part, channels) for name, part in parts}}
    raise ConfigError(
        f"the env's observation space has a {type(space).__name__}; "
        "valid: Box, Discrete, MultiDiscrete, MultiBinary, Dict, Tuple"
    )


def is_image(dtype: Any, shape: list[int]) -> bool:
    """Return whether a box holds pixels: bytes in two or three dimensions.

    Bytes in one dimension, such as Atari's RAM, are a vector.
    """
    return dtype == np.uint8 and len(shape) in (2, 3)


def is_channel_last(space: Space) -> bool:
    """Return whether pixels are `[H, W, C]`, not `[C, H, W]`. Spaces saved by older versions do not say it."""
    shape = space["shape"]
    if "channels" in space:
        return space["channels"] == "last"
    return len(shape) == 3 and shape[-1] in CHANNELS and shape[0] not in CHANNELS


def guess_channels(shape: list[int]) -> Literal["first", "last"]:
    """Return which axis of pixels with three dimensions are the channels.

    They are recognised by 1, 3 or 4 channels, then by a square image, then by far fewer channels than pixels along an
    axis.

    Raises:
        ConfigError: They can't be recognised.
    """
    first, middle, last = shape
    if (first in CHANNELS) != (last in CHANNELS):
        return "last" if last in CHANNELS else "first"
    if (first == middle) != (middle == last):
        return "last" if first == middle else "first"
    if 4 * min(first, last) <= max(first, last):
        return "last" if last < first else "first"
    raise ConfigError(
        f"the observation has pixels of the shape {shape}, which may be [C, H, W] or [H, W, C]: "
        "set env.channels=first or env.channels=last"
    )


def unusual_channels(space: Space) -> list[tuple[list[int], int]]:
    """Return shape and number of channels of the images in a space that have others than 1, 3 or 4."""
    images = [leaf for _, leaf in leaves(space) if leaf["dtype"] == "uint8"]
    counts = [(each["shape"], channel_first(each)["shape"][0]) for each in images]
    return [(shape, count) for shape, count in counts if count not in CHANNELS]


def has_mask(space: Space) -> bool:
    """Return whether a network input has an action mask as one of its parts."""
    return ACTION_MASK in space.get("spaces", {})


def drop_mask(space: Space) -> Space:
    """Return a network input without its action mask: a dict, or the only part that is left."""
    parts = {name: part for name, part in space.get("spaces", {}).items() if name != ACTION_MASK}
    return {**space, "spaces": parts} if len(parts) > 1 else next(iter(parts.values()))


def count_actions(space: gym.Space) -> int:
    """Return the number of actions A in a mask, with those of several choices added up.

    Raises:
        ConfigError: Actions of this space can't be masked.
    """
    if not isinstance(space, Discrete | MultiDiscrete):
        raise ConfigError(
            f"env.action_mask is for Discrete and MultiDiscrete actions, but the env's are a {type(space).__name__}: "
            "set env.action_mask=null"
        )
    return int(space.n) if isinstance(space, Discrete) else int(space.nvec.sum())


def mark_mask(space: Space, key: str, size: int) -> Space:
    """Return an observation space in which the part `key` is marked as the action mask.

    Args:
        space: Observation space.
        key: Name of the part.
        size: Number of actions A (`count_actions`).

    Raises:
        ConfigError: There is no such part, nothing else, or it does not hold one number per action.
    """
    parts = space.get("spaces", {})
    if key not in parts:
        names = f"a Dict with {', '.join(parts)}" if parts else "not a Dict"
        raise ConfigError(
            f"env.action_mask={key} names no part of the env's observation, which is {names}; valid: the name of a "
            "part, or info for masks in info['action_mask']"
        )
    if parts[key]["shape"] != [size]:
        raise ConfigError(
            f"env.action_mask={key} has the shape {parts[key]['shape']}, but the env has {size} actions: a mask is a "
            f"vector [{size}] of 0 and 1"
        )
    if len(parts) == 1:
        raise ConfigError(f"env.action_mask={key} is the only part of the env's observation: add another one")
    mask: Space = {**EMPTY, "type": "mask", "shape": [size], "dtype": "int8"}
    return {**space, "spaces": {**parts, key: mask}}


def add_mask(observation: Any, mask: Any) -> dict[str, Any]:
    """Return an observation, a dict or not, as a dict that also holds an action mask."""
    return {**(observation if isinstance(observation, dict) else {"observation": observation}), ACTION_MASK: mask}


def forbids_all(mask: np.ndarray, action: Space) -> np.ndarray:
    """Return `[N]`: whether a mask `[N, A]` forbids all actions; of several choices, all values of one of them."""
    starts = np.cumsum([0, *action.get("nvec", [])[:-1]])
    return (np.maximum.reduceat(mask, starts, axis=1) == 0).any(1)


def leaves(space: Space, path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], Space]]:
    """Yield the path and the space of each part that is not a dict."""
    if "spaces" not in space:
        yield path, space
    for name, part in space.get("spaces", {}).items():
        yield from leaves(part, (*path, name))


def channel_first(space: Space) -> Space:
    """Return a space of pixels with the channels first: `[H, W, C] -> [C, H, W]`, `[H, W] -> [1, H, W]`."""
    shape = space["shape"]
    if len(shape) == 2:
        return {**EMPTY, "shape": [1, *shape], "dtype": "uint8"}
    return {**EMPTY, "shape": [shape[2], *shape[:2]] if is_channel_last(space) else shape, "dtype": "uint8"}


def to_gym(space: Space) -> gym.Space:
    """Return the gymnasium space of a network input."""
    if space["type"] == "mask":
        return MultiBinary(space["shape"][0])
    if "spaces" in space:
        return Dict({name: to_gym(part) for name, part in space["spaces"].items()})
    low, high = (0, 255) if space["dtype"] == "uint8" else (-np.inf, np.inf)
    return Box(low, high, tuple(space["shape"]), np.dtype(space["dtype"]).type)


def observation_dtypes(space: Space) -> set[str]:
    """Return the dtypes of a network input, without its action mask."""
    return {part["dtype"] for part in space.get("spaces", {"": space}).values() if part["type"] != "mask"}


def to_tensors(space: Space, observation: Any, device: torch.device | None = None) -> Any:
    """Convert a batch of network input to tensors: `[N, *S]`, or such a tensor for each part of a dict."""
    if "spaces" in space:
        return {name: to_tensors(part, observation[name], device) for name, part in space["spaces"].items()}
    batch = torch.from_numpy(np.ascontiguousarray(observation, dtype=space["dtype"]))
    return batch if device is None else batch.to(device)


def action_converter(space: Space, units: str) -> Callable[[np.ndarray], np.ndarray]:
    """Return the function that converts actions `[N, *A]` of the policy to actions of the env.

    Args:
        space: Action space of the env.
        units: Value of `env.action`: `rescale` from [-1, 1] to the bounds, and clip to them; `clip`; or `none`.

    Raises:
        ConfigError: `units` is `rescale`, but the bounds are not finite.
    """
    # Every function returns a new array: an env may write into its action.
    if space["type"] != "box":
        first = np.array(space.get("starts", space["start"]))
        return (lambda actions: actions + first) if first.any() else (lambda actions: actions.copy())
    dtype = np.dtype(space["dtype"])
    low, high = (np.array(bound, dtype).reshape(space["shape"]) for bound in (space["low"], space["high"]))
    if units == "none":
        return lambda actions: actions.astype(dtype)
    if units == "clip" or ((low == -1).all() and (high == 1).all()):
        return lambda actions: np.clip(actions.astype(dtype), low, high)
    if not (has_bound(low).all() and has_bound(high).all()):
        raise ConfigError(
            "env.action=rescale needs finite action bounds, which this env does not have; valid: clip, none"
        )
    scale, middle = (high - low) / 2, (high + low) / 2
    return lambda actions: np.clip(actions.astype(dtype) * scale + middle, low, high)


def tensor_action_converter(space: Space, units: str, device: torch.device) -> Callable[[Tensor], Tensor]:
    """Return `action_converter` for tensors on a device. Its functions, too, return new tensors."""
    if space["type"] != "box":
        first = torch.tensor(space.get("starts", space["start"]), device=device)
        return (lambda actions: actions + first) if first.any() else torch.clone
    dtype = getattr(torch, space["dtype"])
    low, high = (
        torch.tensor(space[bound], dtype=dtype, device=device).reshape(space["shape"])  # type: ignore[literal-required]
        for bound in ("low", "high")
    )
    if units == "none":
        return lambda actions: actions.to(dtype, copy=True)
    if units == "clip" or bool((low == -1).all() and (high == 1).all()):
        return lambda actions: actions.to(dtype).clamp(low, high)
    scale, middle = (high - low) / 2, (high + low) / 2
    return lambda actions: (actions.to(dtype) * scale + middle).clamp(low, high)


def has_bound(bound: np.ndarray) -> np.ndarray:
    """Return whether each bound of an action is one: not infinite, nor the largest number of float32."""
    return np.abs(bound) < np.finfo(np.float32).max / 2


def random_actions(space: gym.Space, *shape: int) -> np.ndarray:
    """Return uniform random actions `[*shape, *A]`, in the policy's units.

    They lie within the bounds that exist. A missing lower bound counts as -1, a missing upper one as 1, or as 2 away
    from the other bound where that leaves no room.
    """
    shape = (*shape, *(space.shape or ()))
    if isinstance(space, Discrete):
        return torch.randint(int(space.n), shape).numpy()
    if isinstance(space, MultiDiscrete):
        return (torch.rand(shape, dtype=torch.float64).numpy() * space.nvec).astype(np.int64)
    assert isinstance(space, Box)
    has_low, has_high = has_bound(space.low), has_bound(space.high)
    low = np.where(has_low, space.low, np.where(has_high, np.where(space.high > -1, -1, space.high - 2), -1))
    high = np.where(has_high, space.high, np.where(has_low, np.where(space.low < 1, 1, space.low + 2), 1))
    return (low + torch.rand(shape).numpy() * (high - low)).astype(np.float32)


def random_allowed_actions(space: gym.Space, mask: Tensor, generator: torch.Generator | None = None) -> Tensor:
    """Return uniform random actions `[N, *A]` among those that the masks `[N, A]` allow.

    They are the argmax of uniform numbers, in which forbidden actions are -1: one argmax per choice if multi-discrete.
    """
    numbers = torch.rand(mask.shape, generator=generator, device=mask.device).masked_fill_(mask == 0, -1.0)
    if isinstance(space, MultiDiscrete):
        return torch.stack([each.argmax(-1) for each in numbers.split(space.nvec.tolist(), -1)], -1)
    return numbers.argmax(-1)
