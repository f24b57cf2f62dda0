"""Wrap the vector env for TorchRL's own collectors."""

from typing import Any

import torch
from gymnasium.spaces import Box, Dict
from gymnasium.vector import AutoresetMode, VectorWrapper
from gymnasium.vector.utils import batch_space
from tensordict import NestedKey, TensorDictBase
from torchrl.envs import (
    DTypeCastTransform,
    EnvBase,
    GymWrapper,
    InitTracker,
    RenameTransform,
    TransformedEnv,
)

from levin.core.spaces import ACTION_MASK, IS_FIRST, has_bound, random_actions, random_allowed_actions
from levin.envs.vector import SeededVectorEnv

ALLOWED = "allowed_actions"  # name of the action mask on its way through `GymWrapper`


class RenamedMask(VectorWrapper):
    """Wrapper of a vector env that calls the action mask `ALLOWED`.

    `GymWrapper` takes a part named `action_mask` for a mask of pairs of choices if its shape `[N, A]` is (2, 2).
    """

    def __init__(self, env: SeededVectorEnv) -> None:
        super().__init__(env)
        self.single_observation_space = Dict(self._rename(env.single_observation_space))
        self.observation_space = batch_space(self.single_observation_space, env.num_envs)

    @property
    def autoreset_mode(self) -> AutoresetMode:
        return self.metadata["autoreset_mode"]

    def _rename(self, parts: Any) -> dict[str, Any]:
        return {ALLOWED if name == ACTION_MASK else name: part for name, part in parts.items()}

    def reset(
        self, *, seed: Any = None, options: dict[str, Any] | None = None
    ) -> tuple[dict[str, Any], dict[str, Any]]:
        observation, info = self.env.reset(seed=seed, options=options)
        return self._rename(observation), info

    def step(self, actions: Any) -> tuple[dict[str, Any], Any, Any, Any, dict[str, Any]]:  # type: ignore[override]
        observation, *rest = self.env.step(actions)
        return self._rename(observation), *rest  # type: ignore[return-value]


class MaskedGymWrapper(GymWrapper):
    """`GymWrapper` whose random actions are among those that the action masks allow."""

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        assert tensordict is not None
        mask = tensordict["observation", ACTION_MASK]
        return tensordict.set("action", random_allowed_actions(self._env.single_action_space, mask))


class OpenGymWrapper(GymWrapper):
    """`GymWrapper` with random actions for boxes that lack a bound, where TorchRL's own would be infinite."""

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        assert tensordict is not None
        actions = random_actions(self._env.single_action_space, self._env.num_envs)
        return tensordict.set("action", torch.from_numpy(actions))


def to_torchrl(env: SeededVectorEnv, *, is_first: bool) -> EnvBase:
    """Wrap the vector env as a TorchRL `EnvBase` with the keys of Levin's rollouts.

    Args:
        env: Vector env.
        is_first: Whether the policy reads `is_first`, the flag of an episode's first step.
    """
    masked = bool(env.read.mask)
    space, wrapper = env.single_action_space, MaskedGymWrapper if masked else GymWrapper
    if isinstance(space, Box) and not (has_bound(space.low) & has_bound(space.high)).all():
        wrapper = OpenGymWrapper
    wrapped = wrapper(RenamedMask(env) if masked else env, categorical_action_encoding=True)
    if parts := list(env.observation.get("spaces", {})):
        given: list[NestedKey] = [ALLOWED if part == ACTION_MASK else part for part in parts]
        nested: list[NestedKey] = [("observation", part) for part in parts]
        wrapped = TransformedEnv(wrapped, RenameTransform(in_keys=given, out_keys=nested))
    else:
        dtype, needed = wrapped.observation_spec["observation"].dtype, getattr(torch, env.observation["dtype"])
        if dtype != needed:
            wrapped = TransformedEnv(wrapped, DTypeCastTransform(dtype, needed, in_keys=["observation"]))
    return TransformedEnv(wrapped, InitTracker(init_key=IS_FIRST)) if is_first else wrapped
