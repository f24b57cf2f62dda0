"""The rollout: the TensorDict that every collector yields, and how a policy is asked for actions.

A rollout of T steps in N envs is a TensorDict of the batch size `[N, T]`, on the CPU:

    observation       [N, T, *S]  what the policy saw; float32, or uint8 for pixels; a nested TensorDict if it has parts
    action            [N, T, *A]  float32 in the units of the policy, or int64
    next.observation  [N, T, *S]  what the step led to; at the end of an episode its true last observation
    next.reward       [N, T, 1]   float32, as the env gave it
    next.terminated   [N, T, 1]   bool: the episode is over for good, nothing follows
    next.truncated    [N, T, 1]   bool: the episode was cut off, and its last state still has a value
    next.done         [N, T, 1]   bool: one of both
    policy_version    [N, T, 1]   int64: iterations that the policy which acted had learned from
    env_index         [N, T, 1]   int64: the number of the env, from collectors with several processes
    step_count        [N, T, 1]   int64: steps since the episode began, for algorithms that ask for it

A policy with a memory adds its state. Within one env, step t + 1 follows step t, except where `done`.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict.nn import TensorDictModule
from torch import Tensor

from levin.core.spaces import IS_FIRST

POLICY_VERSION = "policy_version"
ENV_INDEX = "env_index"


@dataclass(frozen=True, kw_only=True)
class WholeEpisodes:
    """Rollouts `[1, T]` of complete episodes only, with as many as it takes.

    Args:
        transitions: At least so many of them.
        episodes: At least so many of them.
        twins: They come in pairs, of which both have the same seed.
    """

    transitions: int = 1
    episodes: int = 1
    paired_episodes: bool = False


def act(policy: TensorDictModule, batch: Any, is_first: np.ndarray) -> Tensor:
    """Return the actions `[N, *A]` for a batch of observations.

    Args:
        is_first: `[N]`, whether each observation begins an episode; only policies with a memory are told.
    """
    if IS_FIRST not in policy.in_keys:
        return policy.module(batch)
    device = next(policy.parameters()).device
    return policy.module(batch, torch.from_numpy(is_first).unsqueeze(-1).to(device))
