"""Load a run's trained policy and call it on raw observations."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from levin.algorithms.base import Algorithm
from levin.core.network_input import NetworkInput, is_unbatched, unsqueeze
from levin.core.spaces import ACTION_MASK, action_converter, add_mask, forbids_all, to_tensors
from levin.data.rollout import act
from levin.runs.load import load_algorithm


class Policy:
    """Deterministic trained policy that maps raw observations to actions in the env's own units.

    Observations are those of the env, `[*S]` or a batch `[N, *S]`; the actions are then `[*A]` or `[N, *A]`. The policy
    normalises its input itself, but does not stack frames: with `env.frame_stack` the caller passes stacked ones.

    A policy with memory must know where episodes begin: `policy(observation, is_first)`. Without `is_first`, only the
    first call begins an episode.

    A policy that was trained with `env.action_mask=info` must know the mask: `policy(observation, action_mask=mask)`.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm.eval()
        self.env = algorithm.env
        self.policy = algorithm.policy(deterministic=True)
        self.module = self.policy.module
        self._called = False
        self.shown = self.env.get("shown", self.env["observation"])
        self.network_input = NetworkInput(self.shown)
        self._to_env = action_converter(self.env["action"], self.env["action_units"])

    @classmethod
    def load(cls, run: Path) -> "Policy":
        """Load the newest policy of a run folder."""
        return cls(load_algorithm(run))

    @torch.inference_mode()
    def __call__(
        self, observation: Any, is_first: bool | np.ndarray | None = None, action_mask: np.ndarray | None = None
    ) -> np.ndarray:
        if action_mask is not None:
            observation = add_mask(observation, action_mask)
        if self.network_input.mask and not (
            isinstance(observation, dict) and self.network_input.mask[0] in observation
        ):
            raise ValueError("this policy was trained with action masks: call policy(observation, action_mask=mask)")
        single = is_unbatched(self.shown, observation)
        batch = unsqueeze(observation) if single else observation
        batch = to_tensors(self.env["observation"], self.network_input(batch))
        if self.network_input.mask and forbids_all(batch[ACTION_MASK].numpy(), self.env["action"]).any():
            raise ValueError("the action mask allows no action")
        first = np.asarray(not self._called if is_first is None else is_first)
        num = len(next(iter(batch.values())) if isinstance(batch, dict) else batch)
        action = self._to_env(act(self.policy, batch, np.broadcast_to(first, num).copy()).numpy())
        self._called = True
        return action[0] if single else action
