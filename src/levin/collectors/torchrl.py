"""Wrap the vector env for TorchRL's own collectors."""

import torch
from tensordict import NestedKey, TensorDictBase
from torchrl.envs import (
    DTypeCastTransform,
    EnvBase,
    GymWrapper,
    InitTracker,
    RenameTransform,
    TransformedEnv,
)

from levin.core.spaces import ACTION_MASK, IS_FIRST, random_allowed_actions
from levin.envs.vector import SeededVectorEnv


class MaskedGymWrapper(GymWrapper):
    """`GymWrapper` whose random actions are among those that the action masks allow."""

    def rand_action(self, tensordict: TensorDictBase | None = None) -> TensorDictBase:
        assert tensordict is not None
        mask = tensordict["observation", ACTION_MASK]
        return tensordict.set("action", random_allowed_actions(self._env.single_action_space, mask))


def to_torchrl(env: SeededVectorEnv, *, is_first: bool) -> EnvBase:
    """Wrap the vector env as a TorchRL `EnvBase` with the keys of Levin's rollouts.

    Args:
        env: Vector env.
        is_first: Whether the policy reads `is_first`, the flag of an episode's first step.
    """
    wrapper = MaskedGymWrapper if env.read.mask else GymWrapper
    wrapped = wrapper(env, categorical_action_encoding=True)
    if parts := list(env.observation.get("spaces", {})):
        nested: list[NestedKey] = [("observation", part) for part in parts]
        wrapped = TransformedEnv(wrapped, RenameTransform(in_keys=parts, out_keys=nested))
    else:
        given, needed = wrapped.observation_spec["observation"].dtype, getattr(torch, env.observation["dtype"])
        if given != needed:
            wrapped = TransformedEnv(wrapped, DTypeCastTransform(given, needed, in_keys=["observation"]))
    return TransformedEnv(wrapped, InitTracker(init_key=IS_FIRST)) if is_first else wrapped
