"""Rollout, the TensorDict of one iteration that every collector yields, and how to get actions from a policy.

A rollout of T steps in N envs is a TensorDict with the batch size `[N, T]`. It is on the CPU and contiguous, but from
`collector=batched` on the device of the policy and transposed.

    observation       [N, T, *S]  input of the policy; float32, or uint8 for pixels; a nested TensorDict if it has parts
    action            [N, T, *A]  float32 in the units of the policy, or int64
    next.observation  [N, T, *S]  observation after the step; where an episode ends, its true last observation
    next.reward       [N, T, 1]   float32, as returned by the env
    next.terminated   [N, T, 1]   bool: the episode is over, and its last state has the value 0
    next.truncated    [N, T, 1]   bool: the episode was cut off, and its last state still has a value
    next.done         [N, T, 1]   bool: terminated or truncated
    policy_version    [N, T, 1]   int64: number of iterations from which the acting policy had learned
    env_index         [N, T, 1]   int64: number of the env; only from collectors with several processes
    step_count        [N, T, 1]   int64: steps since the episode began; only for algorithms that ask for it

A policy with a second output, such as a latent state, adds it under the second of its `out_keys`. Within one env, step
t + 1 follows step t, except where `done`.
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from tensordict import TensorDictBase
from tensordict.nn import TensorDictModule
from torch import Tensor, nn

from levin.core.spaces import IS_FIRST

POLICY_VERSION = "policy_version"
ENV_INDEX = "env_index"


@dataclass(frozen=True, kw_only=True)
class WholeEpisodes:
    """Length of a rollout `[1, T]` that consists of whole episodes, as many as it takes to meet both minimums.

    Args:
        transitions: Minimum number of transitions.
        episodes: Minimum number of episodes.
        paired_episodes: Whether episodes come in pairs with the same seed.
    """

    transitions: int = 1
    episodes: int = 1
    paired_episodes: bool = False


def is_last(done: Tensor) -> Tensor:
    """Return `[N, T, 1]`, whether the next observation of a step is not the observation of the step after it.

    This is so where an episode ends and at the end of the rollout.

    Args:
        done: End flags of a rollout, `[N, T, 1]`.
    """
    last = done.clone()
    last[:, -1] = True
    return last


def successors(values: Tensor, rollout: TensorDictBase, function: Callable[[Any], Tensor]) -> Tensor:
    """Return f(s_{t+1}), `[N, T, *]`, from the values f(s_t) of the same rollout.

    Most are only shifted by one step. f is called for the others (`is_last`), with `[B, *S]`, and returns `[B, *]`.
    """
    after: TensorDictBase = rollout.get("next")
    last = is_last(after["done"]).squeeze(-1)
    shifted = values.roll(-1, 1)
    shifted[last] = function(after["observation"][last])
    return shifted


def act(policy: TensorDictModule, batch: Any, is_first: np.ndarray) -> Tensor:
    """Return the actions `[N, *A]` for a batch of observations.

    Args:
        policy: Policy module.
        batch: Batch of observations, `[N, *S]` or a dict of such tensors.
        is_first: `[N]`, whether each observation begins an episode; only policies with a memory read it.
    """
    if IS_FIRST not in policy.in_keys:
        return policy.module(batch)
    return policy.module(batch, torch.from_numpy(is_first).unsqueeze(-1).to(policy_device(policy)))


def policy_device(policy: nn.Module) -> torch.device:
    """Return the device of a policy's parameters; the CPU if it has none."""
    return next(iter(policy.parameters()), torch.empty(0)).device


def random_steps_left(random_env_steps: int, num_envs: int, vector_steps: int) -> int:
    """Return how many more vector steps of `num_envs` envs have random actions, after `vector_steps`."""
    return max(0, -(-random_env_steps // num_envs) - vector_steps)
