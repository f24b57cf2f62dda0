"""What is left of a run when training is over: observation in, action out."""

from pathlib import Path
from typing import Any

import numpy as np
import torch

from levin.algorithms.base import Algorithm
from levin.core.spaces import NetworkInput, action_converter, is_unbatched, to_tensors, unsqueeze
from levin.data.rollout import act
from levin.runs.load import load_algorithm


class Policy:
    """A trained policy with its normaliser inside: raw observation in, action in the env's own units out.

    Observations are what the env shows, `[*S]` or a batch `[N, *S]`, and the actions then `[*A]` or `[N, *A]`. Stacks
    of frames are the caller's to keep. The policy is deterministic. One with a memory is told where episodes begin,
    `policy(observation, is_first)`; without a word, its first call is where.
    """

    def __init__(self, algorithm: Algorithm) -> None:
        self.algorithm = algorithm.eval()
        self.env = algorithm.env
        self.policy = algorithm.policy(deterministic=True)
        self.module = self.policy.module
        self._begun = False
        self.shown = self.env.get("shown", self.env["observation"])
        self._read = NetworkInput(self.shown)
        self._to_env = action_converter(self.env["action"], self.env["action_units"])

    @classmethod
    def load(cls, run: Path) -> "Policy":
        """The newest policy of a run folder."""
        return cls(load_algorithm(run))

    @torch.inference_mode()
    def __call__(self, observation: Any, is_first: bool | np.ndarray | None = None) -> np.ndarray:
        single = is_unbatched(self.shown, observation)
        batch = unsqueeze(observation) if single else observation
        batch = to_tensors(self.env["observation"], self._read(batch))
        first = np.asarray(not self._begun if is_first is None else is_first)
        num = len(next(iter(batch.values())) if isinstance(batch, dict) else batch)
        action = self._to_env(act(self.policy, batch, np.broadcast_to(first, num).copy()).numpy())
        self._begun = True
        return action[0] if single else action
