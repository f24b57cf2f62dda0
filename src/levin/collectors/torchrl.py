"""Wrap vector envs for TorchRL's own collectors."""

import torch
from tensordict import NestedKey
from torchrl.envs import (
    DoubleToFloat,
    EnvBase,
    GymWrapper,
    InitTracker,
    RenameTransform,
    TransformedEnv,
)

from levin.core.spaces import IS_FIRST
from levin.envs.vector import SeededVectorEnv


def to_torchrl(env: SeededVectorEnv, *, is_first: bool) -> EnvBase:
    """The vector env as TorchRL's collectors take it, with the keys of ours."""
    wrapped = GymWrapper(env, categorical_action_encoding=True)
    if parts := list(env.observation.get("spaces", {})):
        nested: list[NestedKey] = [("observation", part) for part in parts]
        wrapped = TransformedEnv(wrapped, RenameTransform(in_keys=parts, out_keys=nested))
    elif wrapped.observation_spec["observation"].dtype == torch.float64:
        wrapped = TransformedEnv(wrapped, DoubleToFloat(in_keys=["observation"]))
    return TransformedEnv(wrapped, InitTracker(init_key=IS_FIRST)) if is_first else wrapped
