"""Wrap the vector env for TorchRL's own collectors."""

import torch
from gymnasium.spaces import Box
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
    space, wrapper = env.single_action_space, MaskedGymWrapper if env.read.mask else GymWrapper
    if isinstance(space, Box) and not (has_bound(space.low) & has_bound(space.high)).all():
        wrapper = OpenGymWrapper
    wrapped = wrapper(env, categorical_action_encoding=True)
    if parts := list(env.observation.get("spaces", {})):
        nested: list[NestedKey] = [("observation", part) for part in parts]
        wrapped = TransformedEnv(wrapped, RenameTransform(in_keys=parts, out_keys=nested))
    else:
        given, needed = wrapped.observation_spec["observation"].dtype, getattr(torch, env.observation["dtype"])
        if given != needed:
            wrapped = TransformedEnv(wrapped, DTypeCastTransform(given, needed, in_keys=["observation"]))
    return TransformedEnv(wrapped, InitTracker(init_key=IS_FIRST)) if is_first else wrapped
