"""A trained policy as one function of tensors: raw observations and memory in, action of the env and memory out."""

from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from levin.core.errors import ConfigError
from levin.core.network_input import select_part
from levin.core.spaces import IS_FIRST, Space, leaves, tensor_action_converter
from levin.data.rollout import act
from levin.runs.policy import Policy

OBSERVATION, ACTION = "observation", "action"
DTYPES = {"float32": torch.float32, "uint8": torch.uint8, "int64": torch.int64, "int8": torch.int8}


class PolicyGraph(nn.Module):
    """Deterministic policy without attributes that change: its memory is an input and an output.

    The inputs are, in this order and each with a batch dimension N: the parts of an observation as the env gives them,
    then for a policy with memory `is_first` `[N, 1]` bool and each tensor of the memory `[N, *]`. The outputs are the
    action `[N, *A]` in the env's units, and the memory after the step.

    Args:
        policy: Policy that `levin.load` returns. It can't be called any more afterwards.

    Attributes:
        observations: Name -> space of each part of an observation.
        memory: Name -> shape of each tensor of the memory, without N; all zeros before the first step.
        memory_paths: Name -> path of each tensor of the memory in the policy's module.

    Raises:
        ConfigError: The policy has a memory that is not in buffers `[N, *]` of its modules.
    """

    def __init__(self, policy: Policy) -> None:
        super().__init__()
        paths = dict(leaves(policy.shown))
        names = {path: ".".join(path) or OBSERVATION for path in paths}
        self.observations: dict[str, Space] = {names[path]: space for path, space in paths.items()}
        self.paths = dict(zip(self.observations, paths, strict=True))
        self.space, self.read = policy.env["observation"], policy.network_input
        self.has_memory = IS_FIRST in policy.policy.in_keys
        self.memory_paths = self._find_memory(policy) if self.has_memory else {}
        self.slots = {name: _owner(policy.module, path) for name, path in self.memory_paths.items()}
        self.memory = {name: tuple(module.get_buffer(key).shape[1:]) for name, (module, key) in self.slots.items()}
        for module, key in self.slots.values():
            # Export refuses to assign to buffers, while a plain attribute is only a value between two operations.
            delattr(module, key)
        self.module = policy.module
        self.to_env = tensor_action_converter(policy.env["action"], policy.env["action_units"], torch.device("cpu"))

    @property
    def input_names(self) -> list[str]:
        """Names of the inputs, in their order."""
        return [*self.observations, *([IS_FIRST] if self.has_memory else []), *self.memory]

    @property
    def output_names(self) -> list[str]:
        """Names of the outputs, in their order."""
        return [ACTION, *(f"next_{name}" for name in self.memory)]

    def example(self, num: int) -> tuple[Tensor, ...]:
        """Return inputs for N = `num` at the beginning of an episode: zeros, with masks that allow all actions."""
        is_first = [torch.ones(num, 1, dtype=torch.bool)] if self.has_memory else []
        memory = [torch.zeros(num, *shape) for shape in self.memory.values()]
        return (*self._empty_observation(num), *is_first, *memory)

    def forward(self, *inputs: Tensor) -> tuple[Tensor, ...]:
        given = dict(zip(self.input_names, inputs, strict=True))
        for name, (module, key) in self.slots.items():
            setattr(module, key, given[name])
        batch = self._network_input(given)
        action = self.module(batch, given[IS_FIRST]) if self.has_memory else self.module(batch)
        return self.to_env(action), *(getattr(module, key) for module, key in self.slots.values())

    def split(self, observation: Any) -> list[np.ndarray]:
        """Return the parts `[N, *S]` of a batch of the env's observations, in the order of the inputs."""
        return [
            np.ascontiguousarray(select_part(observation, path), dtype=self.observations[name]["dtype"])
            for name, path in self.paths.items()
        ]

    def _empty_observation(self, num: int) -> list[Tensor]:
        """Return the parts of N observations of zeros, with masks that allow all actions."""
        spaces = self.observations.values()
        fill = [torch.ones if each["type"] == "mask" else torch.zeros for each in spaces]
        return [make(num, *each["shape"], dtype=DTYPES[each["dtype"]]) for make, each in zip(fill, spaces, strict=True)]

    @torch.no_grad()
    def _find_memory(self, policy: Policy) -> dict[str, str]:
        """Return the buffers that a step of two envs changes: name -> path in the policy's module."""
        given = dict(zip(self.observations, self._empty_observation(2), strict=True))
        before = dict(policy.module.named_buffers())
        act(policy.policy, self._network_input(given), np.ones(2, dtype=bool))
        changed = {name: buffer for name, buffer in policy.module.named_buffers() if buffer is not before.get(name)}
        if not changed or any(len(buffer) != 2 for buffer in changed.values()):
            raise ConfigError(
                f"{type(policy.algorithm).__name__} can't be exported: the memory of its policy must be in buffers "
                "[N, *] that every step replaces"
            )
        return {f"memory_{path.rpartition('.')[2]}": path for path in changed}

    def _network_input(self, given: dict[str, Tensor]) -> Any:
        """Return the input of the networks, from the parts of an observation by their names."""
        return _to_dtypes(self.space, self.read.tensors(self._nest(given)))

    def _nest(self, given: dict[str, Tensor]) -> Any:
        """Return the observation as nested dicts, or as one tensor."""
        if OBSERVATION in self.paths and not self.paths[OBSERVATION]:
            return given[OBSERVATION]
        nested: dict[str, Any] = {}
        for name, path in self.paths.items():
            inner = nested
            for step in path[:-1]:
                inner = inner.setdefault(step, {})
            inner[path[-1]] = given[name]
        return nested


def _owner(module: Any, path: str) -> tuple[nn.Module, str]:
    """Return the module that a buffer belongs to, and the buffer's name in it."""
    owner, _, key = path.rpartition(".")
    return module.get_submodule(owner), key


def _to_dtypes(space: Space, batch: Any) -> Any:
    """Return network input with the dtypes of its space."""
    if "spaces" in space:
        return {name: _to_dtypes(part, batch[name]) for name, part in space["spaces"].items()}
    return batch.to(DTYPES[space["dtype"]])
