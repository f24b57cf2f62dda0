"""Convert observations of all kinds of spaces to the tensors that networks read."""

import math
from typing import Any

import numpy as np
import torch
from torch import Tensor

from levin.core.errors import ConfigError, ObservationError
from levin.core.spaces import ACTION_MASK, EMPTY, IS_FIRST, VECTOR, Space, channel_first, is_channel_last, leaves

# Keys of a rollout, which parts of an observation can't have as names.
# "state" is renamed by TorchRL's GymWrapper.
RESERVED = {
    *("observation", "action", "reward", "terminated", "truncated", "done", "next", "state", IS_FIRST, ACTION_MASK)
}


class NetworkInput:
    """Converter of observation batches of an env to network input.

    A box of numbers is kept as it is. Pixels become `[C, H, W]`. Everything else is flattened, with discrete values
    one-hot, and joined to one vector. Images beside a vector or other images give a dict: each image under its name,
    all the rest as `vector`. With an action mask (`mark_mask`) it is a dict in any case, with the mask as the last
    part, `action_mask` `[A]` int8.

    Args:
        space: Observation space of the env.

    Attributes:
        space: Space of the network input.
        is_identity: Whether observations already are network input.
        mask: Path of the action mask in an observation; None: there is none.

    Raises:
        ConfigError: Two parts have the same name.
    """

    def __init__(self, space: Space) -> None:
        self.space: Space = space
        parts_read = list(leaves(space))
        masks = {path: leaf for path, leaf in parts_read if leaf["type"] == "mask"}  # one, or none
        self.mask = next(iter(masks), None)
        self.is_identity = space["type"] == "box" and bool(space["shape"])
        self.is_identity &= space["dtype"] != "uint8" or (len(space["shape"]) != 2 and not is_channel_last(space))
        if self.is_identity:
            self.space = channel_first(space) if space["dtype"] == "uint8" else space
            return
        parts_read = [(path, leaf) for path, leaf in parts_read if path not in masks]
        self._images = {_key_name(path): (path, leaf) for path, leaf in parts_read if leaf["dtype"] == "uint8"}
        self._numbers = [(path, leaf) for path, leaf in parts_read if leaf["dtype"] != "uint8"]
        parts = {name: channel_first(leaf) for name, (_, leaf) in self._images.items()}
        if self._numbers:
            parts[VECTOR] = {**EMPTY, "shape": [sum(_flat_size(leaf) for _, leaf in self._numbers)]}
        if len(parts) < len(parts_read) - len(self._numbers) + bool(self._numbers):
            raise ConfigError(
                f"two parts of the env's observation have the same name (all parts but images are joined as {VECTOR}); "
                "rename one of them in the env"
            )
        if self.mask:
            parts[ACTION_MASK] = masks[self.mask]
        self.space = {**EMPTY, "type": "dict", "spaces": parts} if len(parts) > 1 else next(iter(parts.values()))

    def __call__(self, observation: Any) -> Any:
        """Convert a batch `[N, *S]` of observations, or a dict or tuple of such batches, to network input."""
        if self.is_identity:
            return observation
        converted = {
            name: _to_channel_first(select_part(observation, path), leaf) for name, (path, leaf) in self._images.items()
        }
        if self._numbers:
            flat = [_flatten(select_part(observation, path), leaf) for path, leaf in self._numbers]
            converted[VECTOR] = np.concatenate(flat, axis=-1, dtype=np.float32, casting="unsafe")
        if self.mask:
            converted[ACTION_MASK] = _to_mask(select_part(observation, self.mask))
        return converted if len(converted) > 1 else next(iter(converted.values()))

    def tensors(self, observation: Any) -> Any:
        """Convert a batch of observations as a call does, but from and to tensors, and without errors."""
        if self.is_identity:
            return observation
        converted: dict[str, Tensor] = {}
        for name, (path, leaf) in self._images.items():
            image = _select_tensor(observation, path)
            moved = image.movedim(-1, 1) if is_channel_last(leaf) else image
            converted[name] = image.unsqueeze(1) if len(leaf["shape"]) == 2 else moved
        if self._numbers:
            flat = [_flatten_tensor(_select_tensor(observation, path), leaf) for path, leaf in self._numbers]
            converted[VECTOR] = torch.cat([each.float() for each in flat], -1)
        if self.mask:
            converted[ACTION_MASK] = _select_tensor(observation, self.mask).to(torch.int8)
        return converted if len(converted) > 1 else next(iter(converted.values()))


def _key_name(path: tuple[str, ...]) -> str:
    """Return a name for an image that is valid in modules and rollouts: its path in the observation, joined by `_`."""
    name = "_".join(path).replace(".", "_")
    return f"{name}_pixels" if name in RESERVED or hasattr(torch.nn.ModuleDict(), name) else name


def select_part(observation: Any, path: tuple[str, ...]) -> np.ndarray:
    """Return the part of an observation at a path."""
    for name in path:
        observation = observation[int(name)] if isinstance(observation, tuple) else observation[name]
    return np.asarray(observation)


def _select_tensor(observation: Any, path: tuple[str, ...]) -> Tensor:
    """Return the part of an observation, a tensor or a dict of tensors, at a path."""
    for name in path:
        observation = observation[name]
    return observation


def _to_channel_first(observation: np.ndarray, space: Space) -> np.ndarray:
    """Return a batch of pixels with the channels first: `[N, *S] -> [N, C, H, W]`."""
    if len(space["shape"]) == 2:
        return observation[:, None]
    return np.moveaxis(observation, -1, 1) if is_channel_last(space) else observation


def _flat_size(space: Space) -> int:
    """Return the length D of an observation that `_flatten` has flattened."""
    return sum(space.get("nvec", [])) or space["n"] or math.prod(space["shape"])


def _flatten(observation: np.ndarray, space: Space) -> np.ndarray:
    """Flatten a batch of numbers, with discrete values one-hot: `[N, *S] -> [N, D]`.

    Raises:
        ObservationError: A discrete value is outside its space.
    """
    flat = observation.reshape(len(observation), -1)
    if space["type"] == "box":
        return flat
    sizes, starts = space.get("nvec", [space["n"]]), space.get("starts", [space["start"]])
    wrong = (flat < starts) | (flat >= np.add(starts, sizes))
    if wrong.any():
        env, entry = (int(index[0]) for index in np.nonzero(wrong))
        first, last = starts[entry], starts[entry] + sizes[entry] - 1
        where = f"entry {entry} of " if len(sizes) > 1 else ""
        raise ObservationError(
            env, f"{where}the observation is {flat[env, entry]}, outside its space, which has {first} to {last}"
        )
    one_hot = [flat[:, i, None] - starts[i] == np.arange(size) for i, size in enumerate(sizes)]
    return np.concatenate(one_hot, axis=-1)


def _flatten_tensor(observation: Tensor, space: Space) -> Tensor:
    """Flatten a batch of numbers as `_flatten` does, `[N, *S] -> [N, D]`, with NaN for values outside their space."""
    flat = observation.flatten(1) if observation.ndim > 1 else observation.unsqueeze(1)
    if space["type"] == "box":
        return flat
    sizes, starts = space.get("nvec", [space["n"]]), space.get("starts", [space["start"]])
    one_hot = [flat[:, i, None] - starts[i] == torch.arange(size, device=flat.device) for i, size in enumerate(sizes)]
    joined = torch.cat(one_hot, -1).float()
    return joined.masked_fill(joined.sum(-1, keepdim=True) < len(sizes), math.nan)


def _to_mask(mask: np.ndarray) -> np.ndarray:
    """Convert a batch of action masks of any dtype to int8, `[N, A] -> [N, A]`.

    Raises:
        ObservationError: A mask has a number other than 0 and 1.
    """
    wrong = (mask != 0) & (mask != 1)
    if wrong.any():
        raise ObservationError(
            int(np.nonzero(wrong)[0][0]),
            f"the action mask holds {mask[wrong][0]}; valid: 1 for allowed actions, else 0",
        )
    return mask.astype(np.int8)


def is_unbatched(space: Space, observation: Any) -> bool:
    """Return whether this is a single observation of an observation space, not a batch."""
    path, leaf = next(leaves(space))
    return select_part(observation, path).ndim == len(leaf["shape"])


def unsqueeze(observation: Any) -> Any:
    """Add a batch dimension to a single observation, or to each of its parts."""
    if isinstance(observation, dict):
        return {name: unsqueeze(part) for name, part in observation.items()}
    if isinstance(observation, tuple):
        return tuple(map(unsqueeze, observation))
    return np.asarray(observation)[None]
